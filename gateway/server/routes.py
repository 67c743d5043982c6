"""Every route as one row: method, path, handler, and who may call it."""

from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from gateway import keys
from gateway.handlers import (
    chat_completions,
    models,
    openapi,
    operations,
    platform_admin,
    platform_agent,
    platform_auth,
    platform_chat,
    platform_usage,
    platform_user,
    responses,
)
from gateway.handlers.forwarding import forwarded
from gateway.ui import changes, chat, overview, pages, people, session


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

OPENAI: Final = (
    Route("GET", "/v1/models", models.list_models, "api"),
    Route("GET", "/v1/models/{model:.+}", models.retrieve, "api"),
    Route("POST", "/v1/chat/completions", forwarded(chat_completions.create), "api"),
    Route("POST", "/v1/responses", forwarded(responses.create), "api"),
    Route("GET", "/v1/responses/{response}", forwarded(responses.retrieve), "api"),
    Route("DELETE", "/v1/responses/{response}", forwarded(responses.delete), "api"),
    Route("GET", "/v1/responses/{response}/input_items", forwarded(responses.list_input_items), "api"),
    Route("POST", "/v1/responses/{response}/cancel", forwarded(responses.cancel), "api"),
)

PLATFORM: Final = (
    Route("GET", "/.well-known/jwks.json", platform_auth.jwks, "open"),
    Route("GET", "/api/v1/openapi.json", openapi.document, "open"),
    Route("POST", "/api/v1/auth/register", platform_auth.register, "open"),
    Route("POST", "/api/v1/auth/login", platform_auth.login, "open"),
    Route("POST", "/api/v1/auth/refresh", platform_auth.refresh, "open"),
    Route("POST", "/api/v1/auth/logout", platform_auth.logout, "user"),
    Route("POST", "/api/v1/auth/password", platform_auth.change_password, "user"),
    Route("GET", "/api/v1/auth/me", platform_auth.me, "user"),
    Route("POST", "/api/v1/chat/message", forwarded(platform_chat.send), "user"),
    Route("GET", "/api/v1/chat/history", platform_chat.history, "user"),
    Route("DELETE", "/api/v1/chat/history", platform_chat.delete_history, "user"),
    Route("GET", "/api/v1/agent/status", platform_agent.status, "user"),
    Route("GET", "/api/v1/agent/memory", platform_agent.memory, "user"),
    Route("PATCH", "/api/v1/agent/memory/{label}", platform_agent.write_memory, "user"),
    Route("POST", "/api/v1/agent/reset", platform_agent.reset, "user"),
    Route("GET", "/api/v1/user/profile", platform_user.profile, "user"),
    Route("PATCH", "/api/v1/user/profile", platform_user.change_profile, "user"),
    Route("GET", "/api/v1/user/usage", platform_usage.usage, "user"),
    Route("GET", "/api/v1/user/export", platform_user.export, "user"),
    Route("DELETE", "/api/v1/user", platform_user.delete, "user"),
    Route("GET", "/api/v1/user/keys", platform_user.list_keys, "user"),
    Route("POST", "/api/v1/user/keys", platform_user.create_key, "user"),
    Route("DELETE", "/api/v1/user/keys/{key}", platform_user.delete_key, "user"),
    Route("GET", "/api/v1/admin/users", platform_admin.list_users, "admin"),
    Route("POST", "/api/v1/admin/users", platform_admin.create_user, "admin"),
    Route("GET", "/api/v1/admin/users/{user}", platform_admin.retrieve_user, "admin"),
    Route("PATCH", "/api/v1/admin/users/{user}", platform_admin.change_user, "admin"),
    Route("DELETE", "/api/v1/admin/users/{user}", platform_admin.delete_user, "admin"),
    Route("POST", "/api/v1/admin/users/{user}/password", platform_admin.set_password, "admin"),
    Route("POST", "/api/v1/admin/users/{user}/block", platform_admin.block_user, "admin"),
    Route("POST", "/api/v1/admin/users/{user}/unblock", platform_admin.unblock_user, "admin"),
    Route("GET", "/api/v1/admin/users/{user}/usage", platform_usage.user_usage, "admin"),
    Route("GET", "/api/v1/admin/usage", platform_usage.all_usage, "admin"),
)

ROUTES: Final = (*OPERATIONS, *OPENAI, *PLATFORM)
"""The API: what its description describes."""

PAGE: Final = (
    Route("GET", "/ui", pages.page, "open"),
    Route("GET", "/ui/", pages.page, "open"),
    Route("GET", "/ui/{file}", pages.file, "open"),
    Route("POST", "/ui/api/sign-in", session.sign_in, "open"),
    Route("GET", "/ui/api/session", session.session, "page"),
    Route("DELETE", "/ui/api/session", session.sign_out, "page"),
    Route("GET", "/ui/api/overview", overview.overview, "page"),
    Route("GET", "/ui/api/models", models.list_models, "page"),
    Route("GET", "/ui/api/models/{model:.+}", models.retrieve, "page"),
    Route("POST", "/ui/api/chat", forwarded(chat.chat), "page"),
    Route("GET", "/ui/api/settings", changes.list_settings, "page"),
    Route("PATCH", "/ui/api/settings/{name}", changes.change, "page"),
    Route("DELETE", "/ui/api/settings/{name}", changes.reset, "page"),
    Route("GET", "/ui/api/keys", people.list_api_keys, "page"),
    Route("GET", "/ui/api/usage", platform_usage.all_usage, "page"),
    Route("GET", "/ui/api/users", platform_admin.list_users, "page"),
    Route("POST", "/ui/api/users", platform_admin.create_user, "page"),
    Route("PATCH", "/ui/api/users/{user}", platform_admin.change_user, "page"),
    Route("POST", "/ui/api/users/{user}/block", platform_admin.block_user, "page"),
    Route("POST", "/ui/api/users/{user}/unblock", platform_admin.unblock_user, "page"),
    Route("GET", "/ui/api/users/{user}/usage", platform_usage.user_usage, "page"),
    Route("GET", "/ui/api/users/{user}/keys", people.list_user_keys, "page"),
    Route("DELETE", "/ui/api/users/{user}/keys/{key}", people.delete_user_key, "page"),
)
"""The operator's page: of no API that others are promised."""


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
