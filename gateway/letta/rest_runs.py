"""What turns took over Letta's REST API: the steps of a run, and the run that a turn began.

A step keeps the ``X-Api-Request-Log-Id`` of the request that began its run, from its beginning on; where that header
does not get through, the ``otid`` of the turn's message is looked for, which is stored once the run's first step is
over. The usage of a run that Letta itself offers leaves out steps after the fiftieth, and what came from a cache; the
usage of a step is stored when it is over, and not at all where it was cancelled or failed (letta 0.16.8).
"""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Sequence
from typing import Final

import letta_client
import msgspec
from letta_client import Omit, omit

from gateway.errors import AgentGone, UpstreamTimeout
from gateway.letta.backend import SentTurn
from gateway.letta.rest_ask import Ask, Raw, anything
from gateway.letta.wire import OWN_THREAD, otid_of
from gateway.translation.agent_events import Usage

MARK_HEADER: Final = "X-Api-Request-Log-Id"
LIVE: Final = frozenset({"created", "running"})
SETTLE: Final = 3.0
"""Seconds for a run to be over once its stream is, or it was stopped."""
LOOK: Final = 0.2
"""Seconds between two looks at a run."""
BEFORE: Final = 300.0
"""Seconds by which Letta's clock may be behind."""
AFTER: Final = 900.0
"""Seconds by which Letta's clock may be ahead, and within which a turn gets from here to there."""
PAGE: Final = 100
MOST_PAGES: Final = 1_000


class RunRow(msgspec.Struct):
    """A run; ``conversation_id`` is None on an agent's own thread."""

    id: str
    status: str
    created_at: dt.datetime
    conversation_id: str | None = None


class StepRow(msgspec.Struct):
    """A step of a run."""

    id: str
    status: str | None = None
    request_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_input_tokens: int | None = None
    reasoning_tokens: int | None = None

    def usage(self) -> Usage:
        """Return what it took."""
        return Usage(
            self.prompt_tokens or 0, self.completion_tokens or 0, self.cached_input_tokens, self.reasoning_tokens
        )


class MessageRow(msgspec.Struct):
    """A message of a run."""

    otid: str | None = None


_decode_run: Final = msgspec.json.Decoder(RunRow).decode
_decode_runs: Final = msgspec.json.Decoder(list[RunRow]).decode
_decode_steps: Final = msgspec.json.Decoder(list[StepRow]).decode
_decode_messages: Final = msgspec.json.Decoder(list[MessageRow]).decode


class Runs:
    """The runs of agents; raises what ``Ask`` raises."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask) -> None:
        self._control = control
        self._ask = ask

    async def usage(self, run_id: str) -> Usage | None:
        """Return what a run took; None where it is not there, raises ``UpstreamTimeout`` while it goes on."""
        try:
            await self._see_over(run_id)
            return _sum(await self._steps(run_id))
        except AgentGone:  # its agent was deleted, and the run with it
            return None

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Stop the run that a turn began, and return what it took; None where it began none."""
        try:
            run = await self._began_by(turn)
            if run is None:
                return None
            if run.status in LIVE:
                await self._ask(self._cancel(turn.agent_id, run.id), anything)
                await self._see_settled(run.id)
            return _sum(await self._steps(run.id))
        except AgentGone:
            return None

    async def _see_over(self, run_id: str) -> None:
        end = asyncio.get_running_loop().time() + SETTLE
        while asyncio.get_running_loop().time() < end:
            if (await self._ask(self._retrieve(run_id), _decode_run)).status not in LIVE:
                return
            await asyncio.sleep(LOOK)
        raise UpstreamTimeout("The Letta server goes on with the turn.", should_retry=False)

    async def _see_settled(self, run_id: str) -> None:
        """Give a stopped run a moment: its step may just have come to its end, or will never."""
        end = asyncio.get_running_loop().time() + SETTLE
        while asyncio.get_running_loop().time() < end:
            if all(step.status != "pending" for step in await self._steps(run_id)):
                return
            await asyncio.sleep(LOOK)

    async def _began_by(self, turn: SentTurn) -> RunRow | None:
        around = [run async for run in self._around(turn)]
        candidates = sorted(around, key=lambda run: abs(run.created_at.timestamp() - turn.sent_at))
        for run in candidates:
            if any(step.request_id == turn.mark for step in await self._steps(run.id)):
                return run
        for run in candidates:
            messages = await self._ask(self._list_messages(run.id), _decode_messages)
            if any((message.otid or "").startswith(otid_of(turn.mark)) for message in messages):
                return run
        return None

    async def _around(self, turn: SentTurn) -> AsyncIterator[RunRow]:
        """Give the runs of the turn's thread that began at about its time, the newest first."""
        after: str | Omit = omit
        for _ in range(MOST_PAGES):
            page = await self._ask(self._list(turn, after), _decode_runs)
            for run in page:
                since = run.created_at.timestamp() - turn.sent_at
                if since < -BEFORE:
                    return
                if since < AFTER and (run.conversation_id or OWN_THREAD) == (turn.conversation_id or OWN_THREAD):
                    yield run
            if len(page) < PAGE:
                return
            after = page[-1].id

    async def _steps(self, run_id: str) -> list[StepRow]:
        steps: dict[str, StepRow] = {}
        after: str | Omit = omit
        for _ in range(MOST_PAGES):
            page = await self._ask(self._list_steps(run_id, after), _decode_steps)
            known = len(steps)
            steps.update((step.id, step) for step in page)
            if len(page) < PAGE or len(steps) == known:
                break
            after = page[-1].id
        return list(steps.values())

    async def _retrieve(self, run_id: str) -> Raw:
        return await self._control.runs.with_raw_response.retrieve(run_id)

    async def _cancel(self, agent_id: str, run_id: str) -> Raw:
        return await self._control.agents.messages.with_raw_response.cancel(agent_id, run_ids=[run_id])

    async def _list(self, turn: SentTurn, after: str | Omit) -> Raw:
        return await self._control.runs.with_raw_response.list(
            agent_id=turn.agent_id, conversation_id=turn.conversation_id or omit, after=after, limit=PAGE, order="desc"
        )

    async def _list_steps(self, run_id: str, after: str | Omit) -> Raw:
        return await self._control.runs.steps.with_raw_response.list(run_id, after=after, limit=PAGE, order="asc")

    async def _list_messages(self, run_id: str) -> Raw:
        return await self._control.runs.messages.with_raw_response.list(run_id, limit=PAGE, order="asc")


def _sum(steps: Sequence[StepRow]) -> Usage:
    total = Usage(0, 0)
    for step in steps:
        total = total.plus(step.usage())
    return total
