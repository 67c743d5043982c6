"""Storing an answer beside telling it: its begin before anything is sent, its end once, whoever goes away meanwhile."""

import asyncio
from typing import Final, Literal, Protocol, TypeAlias

import structlog

from gateway.conversations.chats import ChatTurn
from gateway.errors import GatewayError, ResponseCancelled, ShuttingDown, StorageUnavailable
from gateway.tasks import TaskSet

AnswerEnd: TypeAlias = Literal["complete", "failed", "interrupted", "cancelled", "unsent"]
"""How an answer ended: ``interrupted`` where its client or the gateway went away, ``cancelled`` where its owner wanted
that, ``unsent`` where it is as if it had not been asked for: the same request is a new one."""

_log: Final = structlog.get_logger("gateway.answers")


class Keeper(Protocol):
    """Stores one answer; ``name`` is by what others find it while it is under way, None where they do not."""

    name: str | None

    async def begin(self) -> None:
        """Store what is asked, before anything is sent; raises ``StorageUnavailable``."""
        ...

    async def opened(self, turn: ChatTurn) -> None:
        """Note the turn by which the answer comes."""
        ...

    async def end(self, how: AnswerEnd, error: GatewayError | None) -> bytes:
        """Store the answer as it stands, and return what is told of that; raises ``StorageUnavailable``."""
        ...


class Keeping:
    """The work with one answer's keeper, if it has one: each step is done to its end though its client is gone."""

    def __init__(self, keeper: Keeper | None, tasks: TaskSet) -> None:
        self._keeper = keeper
        self._tasks = tasks
        self._beginning: asyncio.Task[None] | None = None
        self._is_ending = False

    async def begin(self) -> None:
        """Have stored what is asked; raises ``StorageUnavailable``."""
        if self._keeper is None:
            return
        self._beginning = self._tasks.spawn(self._keeper.begin(), "keep question")
        try:
            await asyncio.shield(self._beginning)
        except StorageUnavailable as error:
            error.should_retry = True  # nothing was said yet
            raise

    async def opened(self, turn: ChatTurn) -> None:
        """Have noted that the agent has the message."""
        if self._keeper is not None:
            await self._keeper.opened(turn)

    async def complete(self) -> bytes:
        """Have stored the whole answer, and return what is told of that; raises ``StorageUnavailable``."""
        if self._keeper is None or self._is_ending:
            return b""
        self._is_ending = True
        ending = self._tasks.spawn(self._end(self._keeper, "complete", None), "keep answer")
        try:
            return await asyncio.shield(ending)
        except StorageUnavailable as error:
            error.should_retry = False  # the message reached the agent
            raise

    async def fail(self, error: GatewayError, *, is_unsent: bool) -> None:
        """Have stored how far it came, or that it never was."""
        if self._keeper is None or self._is_ending:
            return
        self._is_ending = True
        how: AnswerEnd = "unsent" if is_unsent else _end_of(error)
        ending = self._tasks.spawn(self._end(self._keeper, how, error), "keep answer")
        try:
            await asyncio.shield(ending)
        except StorageUnavailable as failure:
            _log.warning("answer not kept", code=failure.code, reason=failure.reason)

    def leave(self) -> None:
        """Let be stored how far it came: nobody waits for it any more."""
        if self._keeper is not None and self._beginning is not None and not self._is_ending:
            self._is_ending = True
            self._tasks.spawn(self._end(self._keeper, "interrupted", None), "keep answer")

    async def _end(self, keeper: Keeper, how: AnswerEnd, error: GatewayError | None) -> bytes:
        if self._beginning is not None:  # its client may have gone while it was being stored
            await asyncio.wait({self._beginning})
        return await keeper.end(how, error)


def _end_of(error: GatewayError) -> AnswerEnd:
    match error:
        case ResponseCancelled():
            return "cancelled"
        case ShuttingDown():
            return "interrupted"
        case _:
            return "failed"
