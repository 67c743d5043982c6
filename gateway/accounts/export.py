"""Everything that is kept of a user, as one JSON object in pieces: an export may be larger than the memory."""

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from sqlalchemy import select

from gateway.accounts.answers import KeyAnswer, UserAnswer, key_answer, user_answer
from gateway.accounts.history import History
from gateway.accounts.own_agents import OwnAgents
from gateway.accounts.profiles import Profile
from gateway.accounts.usage import UsageReports
from gateway.accounts.user_keys import UserKeys
from gateway.errors import AgentGone
from gateway.letta.backend import AgentBackend, MemoryBlock
from gateway.storage.engine import Database
from gateway.storage.tables import responses

PIECE: Final = 65_536
"""Bytes from which a piece is handed over."""
PAGE: Final = 500
"""Turns that are read at once."""

_encode: Final = msgspec.json.Encoder().encode


class Beginning(msgspec.Struct, frozen=True):
    """What an export begins with."""

    user: UserAnswer
    memory: tuple[MemoryBlock, ...]
    keys: tuple[KeyAnswer, ...]


class Export:
    """Reads what there is of a user."""

    def __init__(
        self,
        database: Database,
        backend: AgentBackend,
        *,
        own_agents: OwnAgents,
        history: History,
        usage: UsageReports,
        user_keys: UserKeys,
    ) -> None:
        self._database = database
        self._backend = backend
        self._own_agents = own_agents
        self._history = history
        self._usage = usage
        self._user_keys = user_keys

    async def pieces(self, profile: Profile) -> AsyncIterator[bytes]:
        """Yield the object; what raises before the first piece is the errors of Letta and the database."""
        keys = tuple(key_answer(key) for key in await self._user_keys.list(profile.id))
        user = user_answer(profile, await self._own_agents.name_of(profile))
        beginning = _encode(Beginning(user, await self._memory(profile), keys))
        parts = {
            b"usage": self._turns(profile.id),
            b"messages": self._messages(profile.id),
            b"responses": self._responses(profile.id),
        }
        buffer = bytearray(beginning.removesuffix(b"}"))
        for name, items in parts.items():
            buffer += b',"' + name + b'":['
            separator = b""
            async for item in items:
                buffer += separator + item
                separator = b","
                if len(buffer) >= PIECE:
                    yield bytes(buffer)
                    buffer.clear()
            buffer += b"]"
        yield bytes(buffer + b"}")

    async def _memory(self, profile: Profile) -> tuple[MemoryBlock, ...]:
        if profile.letta_agent_id is None:
            return ()
        try:
            return await self._backend.memory(profile.letta_agent_id)
        except AgentGone:
            return ()

    async def _turns(self, user_id: str) -> AsyncIterator[bytes]:
        after: str | None = None
        while True:
            page = await self._usage.turns_of(user_id, PAGE, after)
            for turn in page:
                yield _encode(turn)
            if len(page) < PAGE:
                return
            after = page[-1].id

    async def _messages(self, user_id: str) -> AsyncIterator[bytes]:
        async for message in self._history.export(user_id):
            yield _encode(message)

    async def _responses(self, user_id: str) -> AsyncIterator[bytes]:
        """Yield stored responses one by one: each may be of megabytes."""
        after = ""
        while True:
            statement = (
                select(responses)
                .where(responses.c.owner == user_id, responses.c.id > after)
                .order_by(responses.c.id)
                .limit(1)
            )
            async with self._database.read() as connection:
                row = (await connection.execute(statement)).one_or_none()
            if row is None:
                return
            input_items = bytes(row.input_items) or b"[]"
            yield b'{"response":' + bytes(row.response) + b',"input_items":' + input_items + b"}"
            after = row.id
