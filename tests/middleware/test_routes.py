from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from aiohttp.web_urldispatcher import MatchInfoError, UrlMappingMatchInfo

from gateway.server.routes import ROUTES, add_routes
from middleware.routes import route_of


async def matched(method: str, path: str) -> web.Request:
    app = web.Application()
    add_routes(app, ROUTES)
    request = make_mocked_request(method, path)
    match = await app.router.resolve(request)
    assert isinstance(match, UrlMappingMatchInfo)
    request._match_info = match
    return request


async def test_pattern_stands_for_every_path_that_it_matches() -> None:
    assert route_of(await matched("GET", "/v1/models/friend")) == "/v1/models/{model}"
    assert route_of(await matched("HEAD", "/v1/models/a/b")) == "/v1/models/{model}"
    assert route_of(await matched("POST", "/v1/chat/completions")) == "/v1/chat/completions"
    assert route_of(await matched("PATCH", "/api/v1/agent/memory/human")) == "/api/v1/agent/memory/{label}"
    assert route_of(await matched("POST", "/api/v1/admin/users/ada/block")) == "/api/v1/admin/users/{user}/block"


async def test_path_or_method_that_matches_none() -> None:
    for method, path in (("GET", "/secret"), ("PUT", "/v1/models"), ("GET", "/v1/models/"), ("GET", "//health")):
        request = await matched(method, path)
        assert isinstance(request.match_info, MatchInfoError)
        assert route_of(request) == "other"
