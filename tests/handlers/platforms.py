"""A gateway with users: Ann and Ben have an agent of their own each, Cara has none yet, and one agent is nobody's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import select

from gateway import keys
from gateway.accounts.errors import InvalidToken
from gateway.accounts.profiles import Budget, Profile
from gateway.letta.backend import PERSONAL_TAG, Agent
from gateway.letta.scripted import ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.storage.tables import turns
from gateway.translation.platform_types import HistoryPage, Message
from tests.server.running import FRIEND, JSON, Running, settings
from tests.server.wire import Answer, Connection, request, until
from tests.storage.late import LateDatabase, late_database

ANN: Final = "00000000-0000-4000-8000-00000000000a"
BEN: Final = "00000000-0000-4000-8000-00000000000b"
CARA: Final = "00000000-0000-4000-8000-00000000000c"
SECRET: Final = "a secret of forty characters at the least"
MESSAGE: Final = "/api/v1/chat/message"
HISTORY: Final = "/api/v1/chat/history"


def agent_of(user: str) -> Agent:
    """Return a user's own agent."""
    return Agent(f"agent-{user}", f"own-{user[-1]}", 1_700_000_000, (PERSONAL_TAG, f"{PERSONAL_TAG}:{user}"))


def token(user: str) -> dict[str, str]:
    """Return the header by which a user comes to the platform."""
    return {"Authorization": f"Bearer token-{user}"}


def key(user: str) -> dict[str, str]:
    """Return the header by which a user comes to the OpenAI surface."""
    return {"Authorization": f"Bearer sk-lg-{user}"}


class KnownCallers:
    """Credentials that say whose they are."""

    async def caller_of_key(self, key: str) -> keys.Caller | None:
        user = key.removeprefix("sk-lg-")
        return keys.Caller(user, user, key_id=f"key-{user}") if user in (ANN, BEN, CARA) else None

    async def caller_of_token(self, token: str) -> keys.Caller:
        user = token.removeprefix("token-")
        if user not in (ANN, BEN, CARA):
            raise InvalidToken
        return keys.Caller(user, user, session_id=f"session-{user}")

    def forget(self, user_id: str) -> None:
        assert user_id in (ANN, BEN, CARA)


class Platform(Running):
    """A gateway that serves users."""

    database: LateDatabase

    async def say(self, message: Any = "Hello?", *, user: str = ANN, **more: Any) -> Answer:
        """Send a message, and hear the whole answer."""
        headers: dict[str, str] = more.pop("headers", {})
        return await self.ask("POST", MESSAGE, {**JSON, **token(user), **headers}, body(message, **more))

    async def history(self, query: str = "", *, user: str = ANN) -> Answer:
        """Ask for a page of the history."""
        return await self.ask("GET", HISTORY + query, token(user))

    async def messages(self, user: str = ANN) -> list[Message]:
        """Return a user's messages, oldest first."""
        answer = await self.history("?limit=100", user=user)
        assert answer.status == 200
        return msgspec.json.decode(answer.body, type=HistoryPage).data[::-1]

    async def eventually(self, so: Callable[[list[Message]], bool]) -> list[Message]:
        """Return Ann's messages once they are so."""
        async with asyncio.timeout(5):
            while not so(messages := await self.messages()):  # noqa: ASYNC110 - it is seen from outside
                await asyncio.sleep(0.005)
        return messages

    async def ended(self) -> list[Message]:
        """Return Ann's messages once no answer runs any more."""
        return await self.eventually(lambda messages: all(message.status != "running" for message in messages))

    async def booked(self) -> list[tuple[str, str, str]]:
        """Return owner, source and status of every turn in the ledger."""
        async with self.database.read() as connection:
            rows = await connection.execute(
                select(turns.c.owner, turns.c.source, turns.c.status).order_by(turns.c.started_at)
            )
            return [(row.owner, row.source, row.status) for row in rows]

    async def settled(self) -> None:
        """Wait until nothing is left of any turn."""
        await until(lambda: self.app[keys.TURNS].held == 0)
        assert all(turn.closed for turn in self.backend.turns if turn.opened)

    async def start(self, connection: Connection, message: str = "Hello?", **more: Any) -> None:
        """Send a message on a connection, and see the agent get it."""
        before = len(self.backend.turns)
        await connection.send(sent(message, **more))
        await until(lambda: len(self.backend.turns) > before and self.backend.turns[-1].opened)

    async def spend(self, user: str, micros: int) -> None:
        """Give a user a budget."""
        assert await self.app[keys.PROFILES].change(user, budget=Budget(micros, "total")) is not None


def body(message: Any = "Hello?", **more: Any) -> bytes:
    """Return the body of a message."""
    return msgspec.json.encode({"message": message, **more})


def sent(message: Any = "Hello?", *, user: str = ANN, headers: Mapping[str, str] | None = None, **more: Any) -> bytes:
    """Return a whole request that sends a message."""
    return request("POST", MESSAGE, {**JSON, **token(user), **(headers or {})}, body(message, **more))


def events(answer: Answer | bytes) -> list[tuple[str, Any]]:
    """Return the events of a stream, by name."""
    data = answer if isinstance(answer, bytes) else answer.body
    blocks = [block.split("\n") for block in data.decode().split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), msgspec.json.decode(line.removeprefix("data: "))) for name, line in blocks]


@contextlib.asynccontextmanager
async def platform(**chosen: Any) -> AsyncIterator[Platform]:
    """Serve for as long as the context."""
    backend = ScriptedBackend([FRIEND, agent_of(ANN), agent_of(BEN)])
    async with late_database() as database:
        app = build_app(settings(**{"secret_key": SECRET, **chosen}), database, backend=backend)
        credentials: keys.Credentials = KnownCallers()
        app[keys.CREDENTIALS] = credentials
        for user in (ANN, BEN, CARA):
            agent_id = None if user == CARA else agent_of(user).id
            profile = Profile(
                id=user, email=f"{user}@example.com", letta_agent_id=agent_id, created_at=1.0, updated_at=1.0
            )
            assert await app[keys.PROFILES].add(profile)
        listener = Listener(app, "127.0.0.1", 0)
        await listener.start()
        gateway = Platform(app, backend, listener, "127.0.0.1")
        gateway.database = database
        try:
            yield gateway
        finally:
            await listener.stop()
