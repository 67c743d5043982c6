"""Every route as one row: method, path, handler, and who may call it."""

from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from gateway import keys
from gateway.handlers import chat_completions, models, operations, responses


class Route(msgspec.Struct, frozen=True):
    """One route."""

    method: str
    path: str
    handler: Handler
    access: keys.Access


OPERATIONS: Final = (
    Route("GET", "/health", operations.health, "open"),
    Route("GET", "/ready", operations.ready, "open"),
    Route("GET", "/metrics", operations.metrics, "operator"),
)

ROUTES: Final = (
    *OPERATIONS,
    Route("GET", "/v1/models", models.list_models, "api"),
    Route("GET", "/v1/models/{model:.+}", models.retrieve, "api"),
    Route("POST", "/v1/chat/completions", chat_completions.create, "api"),
    Route("POST", "/v1/responses", responses.create, "api"),
    Route("GET", "/v1/responses/{response}", responses.retrieve, "api"),
    Route("DELETE", "/v1/responses/{response}", responses.delete, "api"),
    Route("GET", "/v1/responses/{response}/input_items", responses.list_input_items, "api"),
    Route("POST", "/v1/responses/{response}/cancel", responses.cancel, "api"),
)


def add_routes(app: web.Application, routes: tuple[Route, ...]) -> None:
    """Put routes into an application, with the rule of who may call them."""
    access: dict[str, keys.Access] = {}
    for route in routes:
        resource = app.router.add_route(route.method, route.path, route.handler).resource
        assert resource is not None  # noqa: S101 - add_route makes one
        access[resource.canonical] = route.access
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)

    def access_of(request: web.Request) -> keys.Access:
        resource = request.match_info.route.resource
        # What no route matched is a 404 or 405 for everybody: it tells nothing and runs nothing.
        return access.get(resource.canonical, "api") if resource is not None else "open"

    app[keys.ACCESS] = access_of
