"""People who use the platform API of a running gateway, and its operator."""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp
import msgspec

from tests.server.subprocesses import GatewayProcess

OPERATOR_KEY: Final = "sk-operator-of-services"
PASSWORD: Final = "correct horse battery staple"
_PATIENCE: Final = 60.0


class Said(msgspec.Struct, frozen=True):
    """An answer, decoded where it is JSON."""

    status: int
    body: Any
    text: str


async def ask(gateway: GatewayProcess, method: str, path: str, body: object = None, *, key: str | None = None) -> Said:
    """Ask with a key or an access token, or without."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body)
    url = f"http://127.0.0.1:{gateway.port}{path}"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_PATIENCE)) as session,
        session.request(method, url, data=data, headers=headers) as answer,
    ):
        text = await answer.text()
    return Said(answer.status, json.loads(text) if text.startswith(("{", "[")) else None, text)


class Person:
    """A user who is logged in."""

    def __init__(self, gateway: GatewayProcess, session: dict[str, Any]) -> None:
        self.gateway = gateway
        self.id: str = session["user"]["id"]
        self.email: str = session["user"]["email"]
        self.token: str = session["access_token"]
        self.refresh_token: str = session["refresh_token"]

    async def ask(self, method: str, path: str, body: object = None) -> Said:
        """Ask as this user."""
        return await ask(self.gateway, method, path, body, key=self.token)

    async def say(self, message: str, *, stream: bool = False) -> Said:
        """Say something to their own agent."""
        return await self.ask("POST", "/api/v1/chat/message", {"message": message, "stream": stream})

    async def personal_key(self) -> str:
        """Make an API key of their own."""
        key: str = (await self.ask("POST", "/api/v1/user/keys", {"name": "tests"})).body["key"]
        return key

    async def has_an_agent(self) -> str:
        """Wait for their agent, and return its id: one that Letta did not make in time comes with the next login."""

        async def ready() -> str | None:
            status = (await self.ask("GET", "/api/v1/agent/status")).body
            if status["state"] == "ready":
                return str(status["agent"]["id"])
            await logged_in(self.gateway, self.email)
            return None

        found: str = await eventually(ready)
        return found


async def registered(gateway: GatewayProcess, email: str | None = None, password: str = PASSWORD) -> Person:
    """Register somebody new."""
    email = email or f"{uuid.uuid4().hex[:12]}@example.com"
    said = await ask(gateway, "POST", "/api/v1/auth/register", {"email": email, "password": password})
    assert said.status == 201, said.text
    return Person(gateway, said.body)


async def logged_in(gateway: GatewayProcess, email: str, password: str = PASSWORD) -> Person:
    """Log somebody in."""
    said = await ask(gateway, "POST", "/api/v1/auth/login", {"email": email, "password": password})
    assert said.status == 200, said.text
    return Person(gateway, said.body)


async def eventually(look: Callable[[], Awaitable[Any]]) -> Any:
    """Look until there is something, and return it."""
    end = time.monotonic() + _PATIENCE
    while not (found := await look()):
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.25)
    return found
