"""Who may call what: one row for each route. A route without its row here fails the tests."""

from typing import Final

import msgspec

from gateway.keys import Access
from tests.server.people import PASSWORD


class Rule(msgspec.Struct, frozen=True):
    """Who may call a route, what is answered to whom it is for, and the body that it takes.

    ``{key}``, ``{response}``, ``{model}``, ``{user}`` and ``{label}`` in a path are Ann's own.
    """

    access: Access
    served: int = 200
    body: object = None


_HELLO: Final = {"model": "{model}", "messages": [{"role": "user", "content": "Hello"}]}
_DAVE: Final = {"email": "dave@example.com", "password": PASSWORD}
_ANN: Final = {"email": "ann@example.com", "password": PASSWORD}

RULES: Final[dict[tuple[str, str], Rule]] = {
    ("GET", "/health"): Rule("open"),
    ("GET", "/ready"): Rule("open"),
    ("GET", "/metrics"): Rule("operator"),
    ("GET", "/v1/models"): Rule("api"),
    ("GET", "/v1/models/{model:.+}"): Rule("api"),
    ("POST", "/v1/chat/completions"): Rule("api", body=_HELLO),
    ("POST", "/v1/responses"): Rule("api", body={"model": "{model}", "input": "Hello"}),
    ("GET", "/v1/responses/{response}"): Rule("api"),
    ("DELETE", "/v1/responses/{response}"): Rule("api"),
    ("GET", "/v1/responses/{response}/input_items"): Rule("api"),
    ("POST", "/v1/responses/{response}/cancel"): Rule("api", 400),  # it has ended
    ("GET", "/.well-known/jwks.json"): Rule("open"),
    ("GET", "/api/v1/openapi.json"): Rule("open"),
    ("POST", "/api/v1/auth/register"): Rule("open", 201, _DAVE),
    ("POST", "/api/v1/auth/login"): Rule("open", 200, _ANN),
    ("POST", "/api/v1/auth/refresh"): Rule("open", 401, {"refresh_token": "none"}),
    ("POST", "/api/v1/auth/logout"): Rule("user", 204),
    ("POST", "/api/v1/auth/password"): Rule(
        "user", 200, {"current_password": PASSWORD, "new_password": "another fine password"}
    ),
    ("GET", "/api/v1/auth/me"): Rule("user"),
    ("POST", "/api/v1/chat/message"): Rule("user", 200, {"message": "Hello", "stream": False}),
    ("GET", "/api/v1/chat/history"): Rule("user"),
    ("DELETE", "/api/v1/chat/history"): Rule("user", 204),
    ("GET", "/api/v1/agent/status"): Rule("user"),
    ("GET", "/api/v1/agent/memory"): Rule("user"),
    ("PATCH", "/api/v1/agent/memory/{label}"): Rule("user", 200, {"value": "Ann likes tea."}),
    ("POST", "/api/v1/agent/reset"): Rule("user"),
    ("GET", "/api/v1/user/profile"): Rule("user"),
    ("PATCH", "/api/v1/user/profile"): Rule("user", 200, {"name": "Anna"}),
    ("GET", "/api/v1/user/usage"): Rule("user"),
    ("GET", "/api/v1/user/export"): Rule("user"),
    ("DELETE", "/api/v1/user"): Rule("user", 204),
    ("GET", "/api/v1/user/keys"): Rule("user"),
    ("POST", "/api/v1/user/keys"): Rule("user", 201, {"name": "phone"}),
    ("DELETE", "/api/v1/user/keys/{key}"): Rule("user", 204),
    ("GET", "/api/v1/admin/users"): Rule("admin"),
    ("POST", "/api/v1/admin/users"): Rule("admin", 201, _DAVE),
    ("GET", "/api/v1/admin/users/{user}"): Rule("admin"),
    ("PATCH", "/api/v1/admin/users/{user}"): Rule("admin", 200, {"budget": {"amount": "5", "period": "month"}}),
    ("DELETE", "/api/v1/admin/users/{user}"): Rule("admin", 204),
    ("POST", "/api/v1/admin/users/{user}/password"): Rule("admin", 200, {"password": "another fine password"}),
    ("POST", "/api/v1/admin/users/{user}/block"): Rule("admin"),
    ("POST", "/api/v1/admin/users/{user}/unblock"): Rule("admin"),
    ("GET", "/api/v1/admin/users/{user}/usage"): Rule("admin"),
    ("GET", "/api/v1/admin/usage"): Rule("admin"),
}
