"""Whether a dependency answers, asked at most once a second, however many ask: ``/ready`` is open to everybody."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from gateway.errors import GatewayError
from gateway.tasks import TaskSet

TTL: Final = 1.0
"""Seconds for which an answer stands."""


class Health(msgspec.Struct, frozen=True):
    """How it fared: the error's code where it did not answer, and the time that took, in seconds."""

    failure: str | None
    seconds: float


class Probe:
    """The question, asked by one for all who ask at the same time; ``ping`` raises where there is no answer."""

    def __init__(self, ping: Callable[[], Awaitable[None]], tasks: TaskSet) -> None:
        self._ping = ping
        self._tasks = tasks
        self._asked = 0.0
        self._answer: asyncio.Task[Health] | None = None

    async def health(self) -> Health:
        """Return how it fares: as it was found within the last second, or as it is now."""
        answer = self._answer
        if answer is None or (answer.done() and time.monotonic() - self._asked > TTL):
            self._asked = time.monotonic()
            answer = self._answer = self._tasks.spawn(self._ask(), "probe")
        return await asyncio.shield(answer)

    async def _ask(self) -> Health:
        started = time.monotonic()
        failure = None
        try:
            await self._ping()
        except GatewayError as error:
            failure = error.code or error.type
        return Health(failure, time.monotonic() - started)
