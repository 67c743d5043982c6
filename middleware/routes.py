"""The router's own name of a request's route: what a log line or a label may hold instead of the client's path."""

from aiohttp import web


def route_of(request: web.Request) -> str:
    """Return the pattern of the route that was matched; ``other`` for every path that matched none."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"
