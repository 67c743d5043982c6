"""The deadlines of one turn: first event, silence, the whole; one lazy timer, nothing per read but a clock."""

import asyncio
import operator
from collections.abc import Callable
from typing import Final

import msgspec

from gateway.errors import GatewayError, UpstreamTimeout

NEVER: Final = float("inf")


class Limits(msgspec.Struct, frozen=True):
    """How long a turn may take, in seconds."""

    connect: float = 5.0
    first_event: float = 120.0
    silence: float = 60.0
    turn: float = 900.0


class TurnDeadlines:
    """Watches one turn and calls ``abort`` with the error of the first deadline that runs out.

    ``waiting_since`` is set to the loop's time before every read and to ``NEVER`` after it, so that a client that is
    slow to take what was read is not Letta's silence; ``silent`` is cleared by the first event.
    """

    def __init__(self, limits: Limits, abort: Callable[[GatewayError], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._abort = abort
        self._started = self._loop.time()
        self.silent = True
        self.waiting_since = NEVER  # until the stream is read: before it the other two count
        self._timer = self._loop.call_at(self._next_due()[0], self._check)

    def stop(self) -> None:
        """Stop watching, and let go of who is watched."""
        self._timer.cancel()
        self._abort = _stopped

    def _next_due(self) -> tuple[float, Callable[[Limits], GatewayError]]:
        waiting_since = min(self.waiting_since, self._loop.time())
        due = [(self._started + self._limits.turn, _too_long), (waiting_since + self._limits.silence, _silent)]
        if self.silent:
            due.append((self._started + self._limits.first_event, _no_answer))
        return min(due, key=operator.itemgetter(0))

    def _check(self) -> None:
        due, error = self._next_due()
        if due <= self._loop.time():
            self._abort(error(self._limits))
        else:
            self._timer = self._loop.call_at(due, self._check)


def _stopped(_: GatewayError) -> None:
    """Nobody is watched any more."""


def _too_long(limits: Limits) -> GatewayError:
    return UpstreamTimeout(
        f"The turn took longer than {limits.turn:g} seconds and was stopped. The message was delivered.",
        code="turn_timeout",
        should_retry=False,
    )


def _silent(limits: Limits) -> GatewayError:
    return UpstreamTimeout(
        f"The Letta server fell silent for {limits.silence:g} seconds. The message was delivered.",
        code="upstream_silent",
        should_retry=False,
    )


def _no_answer(limits: Limits) -> GatewayError:
    return UpstreamTimeout(
        f"The agent did not begin to answer within {limits.first_event:g} seconds. It may have the message.",
        should_retry=False,
    )
