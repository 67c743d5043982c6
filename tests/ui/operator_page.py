"""A gateway with the operator's page, and a browser that is signed in, as far as HTTP goes."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from gateway.accounts.operator_sessions import COOKIE
from tests.server.running import JSON, Running, serving, settings
from tests.server.wire import Answer

OPERATOR_KEY: Final = "sk-operator-of-the-page"
API_KEY: Final = "sk-some-client"


class Page:
    """A browser's page: its cookie, and its CSRF token."""

    def __init__(self, gateway: Running, cookie: str = "", csrf_token: str = "") -> None:
        self.gateway = gateway
        self.cookie = cookie
        self.csrf_token = csrf_token

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send what the page sends; a header given here takes the place of its own."""
        usual = {"Cookie": f"{COOKIE}={self.cookie}", "X-CSRF-Token": self.csrf_token}
        sent = {**usual, **(JSON if body is not None else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
        return await self.gateway.ask(
            method, f"/ui/api/{path}", sent, b"" if body is None else msgspec.json.encode(body)
        )

    async def change(self, name: str, value: str) -> Answer:
        """Look at a setting, and give it another value."""
        body = {"value": value, "changed_at": (await self.setting(name))["changed_at"]}
        return await self.ask("PATCH", f"settings/{name}", body)

    async def setting(self, name: str) -> dict[str, Any]:
        """Return how a setting is shown."""
        listed = (await self.ask("GET", "settings")).json()["data"]
        return next((one for one in listed if one["name"] == name), {"changed_at": None})


async def signed_in(gateway: Running, key: str = OPERATOR_KEY) -> Page:
    """Sign in."""
    answer = await sign_in(gateway, key)
    assert answer.status == 200, answer
    return Page(gateway, cookie_of(answer), answer.json()["csrf_token"])


async def sign_in(gateway: Running, key: str, **headers: str) -> Answer:
    """Send an operator key."""
    sent = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await gateway.ask("POST", "/ui/api/sign-in", sent, msgspec.json.encode({"key": key}))


def cookie_of(answer: Answer) -> str:
    """Return the cookie that an answer sets."""
    name, _, rest = (answer.header("set-cookie") or "").partition("=")
    assert name == COOKIE
    return rest.partition(";")[0].strip('"')


@contextlib.asynccontextmanager
async def page(**chosen: Any) -> AsyncIterator[Page]:
    """Serve, and sign in."""
    usual = {"operator_key": OPERATOR_KEY, "api_keys": (API_KEY,)}
    async with serving(settings(**{**usual, **chosen})) as gateway:
        yield await signed_in(gateway, chosen.get("operator_key", OPERATOR_KEY))
