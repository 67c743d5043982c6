import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway.errors import GatewayError, UpstreamTimeout
from gateway.letta.deadlines import NEVER, Limits, TurnDeadlines

FAST = Limits(first_event=0.4, silence=0.1, turn=0.4)


class Watched:
    """A turn under watch, and the errors it was aborted with."""

    def __init__(self, limits: Limits) -> None:
        self.aborts: list[GatewayError] = []
        self.times: list[float] = []
        self._loop = asyncio.get_running_loop()
        self.started = self._loop.time()
        self.deadlines = TurnDeadlines(limits, self._abort)
        self.deadlines.waiting_since = self.started

    def _abort(self, error: GatewayError) -> None:
        self.aborts.append(error)
        self.times.append(self._loop.time() - self.started)

    async def hears_for(self, seconds: float) -> None:
        """Hear something every few milliseconds."""
        until = self._loop.time() + seconds
        while self._loop.time() < until:
            self.deadlines.waiting_since = self._loop.time()
            await asyncio.sleep(0.005)


@contextmanager
def watched(limits: Limits = FAST) -> Iterator[Watched]:
    turn = Watched(limits)
    yield turn
    turn.deadlines.stop()


async def test_silence() -> None:
    with watched() as turn:
        await asyncio.sleep(0.2)
        (error,) = turn.aborts
        assert isinstance(error, UpstreamTimeout)
        assert (error.status, error.code, error.should_retry) == (504, "upstream_silent", False)
        assert "0.1 seconds" in error.message
        assert turn.times[0] > 0.099


async def test_pings_alone_are_no_beginning() -> None:
    with watched(Limits(first_event=0.05, silence=9, turn=9)) as turn:
        await turn.hears_for(0.1)
        assert [error.code for error in turn.aborts] == ["upstream_timeout"]
        assert "0.05 seconds" in turn.aborts[0].message


async def test_turn_that_goes_on_and_on() -> None:
    with watched(Limits(first_event=0.02, silence=9, turn=0.05)) as turn:
        turn.deadlines.silent = False
        await turn.hears_for(0.1)
        assert [error.code for error in turn.aborts] == ["turn_timeout"]
        assert "0.05 seconds" in turn.aborts[0].message
        assert turn.aborts[0].should_retry is False


async def test_silence_after_some_words() -> None:
    with watched() as turn:
        turn.deadlines.silent = False
        await turn.hears_for(0.15)
        await asyncio.sleep(0.15)
        assert [error.code for error in turn.aborts] == ["upstream_silent"]
        assert turn.times[0] > 0.24


async def test_turn_is_aborted_once() -> None:
    with watched() as turn:
        await asyncio.sleep(0.25)
        assert len(turn.aborts) == 1


async def test_turn_that_ended_is_not_watched() -> None:
    with watched() as turn:
        turn.deadlines.stop()
        await asyncio.sleep(0.15)
        assert turn.aborts == []


async def test_nothing_is_waited_for_yet() -> None:
    aborts: list[GatewayError] = []
    deadlines = TurnDeadlines(Limits(first_event=0.2, silence=0.05, turn=9), aborts.append)
    await asyncio.sleep(0.1)
    assert aborts == []
    await asyncio.sleep(0.15)
    assert [error.code for error in aborts] == ["upstream_timeout"]
    deadlines.stop()


async def test_client_that_is_slow_to_take_is_not_a_silent_server() -> None:
    with watched() as turn:
        turn.deadlines.waiting_since = NEVER
        await asyncio.sleep(0.25)
        assert turn.aborts == []
        turn.deadlines.waiting_since = asyncio.get_running_loop().time()
        await asyncio.sleep(0.25)
        assert [error.code for error in turn.aborts] == ["upstream_silent"]


async def test_one_timer_however_much_is_heard() -> None:
    with watched(Limits()) as turn:
        timer = turn.deadlines._timer
        for _ in range(1_000):
            turn.deadlines.waiting_since = asyncio.get_running_loop().time()
        assert turn.deadlines._timer is timer


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(first_event=0.01, silence=9, turn=9), "upstream_timeout"),
        (Limits(first_event=9, silence=0.01, turn=9), "upstream_silent"),
        (Limits(first_event=9, silence=9, turn=0.01), "turn_timeout"),
    ],
)
async def test_nearest_deadline_decides(limits: Limits, code: str) -> None:
    with watched(limits) as turn:
        await asyncio.sleep(0.04)
        assert [error.code for error in turn.aborts] == [code]
