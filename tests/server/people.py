"""A gateway with users as they really are: registered, with an agent, a session and a personal key each."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from gateway import keys
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.passwords import Passwords
from gateway.letta.scripted import ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import Listener
from tests.accounts.identities import CHEAP
from tests.server.running import FRIEND, JSON, Running, settings
from tests.server.wire import Answer, Headers
from tests.storage.late import late_database

PASSWORD: Final = "correct horse battery staple"
API_KEY: Final = "sk-operators-own"
OPERATOR_KEY: Final = "sk-operator"


class Person(msgspec.Struct):
    """A user, with what they come in by; ``secrets`` are texts that nobody else may ever see."""

    id: str
    email: str
    token: str
    refresh_token: str
    key: str
    key_id: str
    agent_id: str
    response_id: str = ""
    message_id: str = ""
    secrets: tuple[str, ...] = ()

    @property
    def bearer(self) -> dict[str, str]:
        """Return the header of their session."""
        return bearer(self.token)


def bearer(credential: str) -> dict[str, str]:
    """Return the header of a credential."""
    return {"Authorization": f"Bearer {credential}"}


class Town(Running):
    """A gateway that serves users; Ann and Ben have talked with their agents."""

    ann: Person
    ben: Person

    async def send(self, method: str, path: str, credential: str | None, body: object = None) -> Answer:
        """Send a request with a JSON body, if any."""
        headers: Headers = {**(JSON if body is not None else {}), **(bearer(credential) if credential else {})}
        return await self.ask(method, path, headers, b"" if body is None else msgspec.json.encode(body))

    async def api(self, method: str, path: str, who: Person, body: object = None) -> Answer:
        """Send a request of a user's to the platform."""
        return await self.send(method, f"/api/v1{path}", who.token, body)

    async def admin(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request of the operator's."""
        return await self.send(method, f"/api/v1/admin{path}", OPERATOR_KEY, body)

    async def settle_down(self, name: str) -> Person:
        """Register a user, and make them a key."""
        account = {"email": f"{name}@example.com", "password": PASSWORD, "name": name.title()}
        answer = await self.send("POST", "/api/v1/auth/register", None, account)
        assert answer.status == 201, answer
        session: dict[str, Any] = answer.json()
        made = await self.send("POST", "/api/v1/user/keys", session["access_token"], {"name": f"{name}'s laptop"})
        assert made.status == 201, made
        return Person(
            id=session["user"]["id"],
            email=account["email"],
            token=session["access_token"],
            refresh_token=session["refresh_token"],
            key=made.json()["key"],
            key_id=made.json()["id"],
            agent_id=session["user"]["agent"]["id"],
        )

    async def talk(self, who: Person) -> None:
        """Let a user leave something of theirs in every corner."""
        secret = f"the secret of {who.email}"
        said = await self.api("POST", "/chat/message", who, {"message": secret, "stream": False})
        assert said.status == 200, said
        who.message_id = said.json()["message"]["id"]
        stored = await self.send("POST", "/v1/responses", who.key, {"model": who.agent_id, "input": secret})
        assert stored.status == 200, stored
        who.response_id = stored.json()["id"]
        assert (await self.api("PATCH", "/agent/memory/human", who, {"value": secret})).status == 200
        assert (await self.api("PATCH", "/user/profile", who, {"metadata": {"note": secret}})).status == 200
        who.secrets = (secret, who.id, who.email, who.key_id, who.agent_id, who.response_id, who.message_id)

    async def ended_token(self, who: Person) -> str:
        """Return the access token of a session that has ended."""
        account = {"email": who.email, "password": PASSWORD}
        login = await self.send("POST", "/api/v1/auth/login", None, account)
        token: str = login.json()["access_token"]
        assert (await self.send("POST", "/api/v1/auth/logout", token)).status == 204
        return token

    def expired_token(self, who: Person) -> str:
        """Return an access token that was right an hour ago."""
        tokens = self.identity._tokens
        session_id = tokens.claims(who.token).sid
        tokens._now = lambda: time.time() - 3_600
        expired = tokens.issue(who.id, session_id)
        tokens._now = time.time
        return expired

    @property
    def identity(self) -> LocalIdentity:
        """Return who knows the passwords."""
        identity = self.app[keys.IDENTITY]
        assert isinstance(identity, LocalIdentity)
        return identity


@contextlib.asynccontextmanager
async def town(*, talks: bool = True, **chosen: Any) -> AsyncIterator[Town]:
    """Serve for as long as the context, as on a network: with keys, and no proxy that is trusted."""
    usual = {
        "api_keys": (API_KEY,),
        "operator_key": OPERATOR_KEY,
        "trusted_networks": (),
        "registration": "open",
        "rate_limit": "100000/minute",
    }
    backend = ScriptedBackend([FRIEND])
    async with late_database() as database:
        app = build_app(settings(**{**usual, **chosen}), database, backend=backend)
        listener = Listener(app, "127.0.0.1", 0)
        await listener.start()
        gateway = Town(app, backend, listener, "127.0.0.1")
        gateway.identity._hashes = Passwords(CHEAP)
        try:
            gateway.ann, gateway.ben = await gateway.settle_down("ann"), await gateway.settle_down("ben")
            if talks:
                await gateway.talk(gateway.ann)
                await gateway.talk(gateway.ben)
            yield gateway
        finally:
            await listener.stop()
