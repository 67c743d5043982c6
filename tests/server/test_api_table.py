from gateway.server.api_document import path_of
from gateway.server.api_table import SHAPES
from gateway.server.routes import ROUTES


def test_every_route_has_its_shape_and_no_shape_is_left_over() -> None:
    assert SHAPES.keys() == {(route.method, path_of(route)) for route in ROUTES}


def test_only_what_has_a_body_takes_one() -> None:
    for (method, path), shape in SHAPES.items():
        assert shape.takes is None or method in ("POST", "PATCH"), path
        assert shape.query is None or method == "GET", path
        assert shape.gives, path
        assert (204 in shape.gives) == (None in shape.gives.values() and path != "/metrics"), path
