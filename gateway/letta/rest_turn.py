"""One turn over Letta's REST API: the request, the stream of frames, and how it is stopped.

Which calls wait in a conversation is known to Letta alone: somebody else may have left them, or settled them. A turn
that brings results looks first; one that brings none looks where Letta refuses it, and is sent once more.

A client's disconnect does not stop a run on Letta; ``POST /v1/agents/{id}/messages/cancel`` with the run's id does.
The id comes with the first frame, so the request goes on in a task of its own: whoever gives up waiting for it can
still learn what to cancel.
"""

import asyncio
import contextlib
import io
from typing import TYPE_CHECKING, Final

import aiohttp
import structlog
from msgspec import structs

from gateway.errors import (
    AgentGone,
    ConversationGone,
    GatewayError,
    PendingApproval,
    UpstreamInvalid,
    UpstreamTimeout,
    dealt_with,
)
from gateway.letta import upstream_errors
from gateway.letta.backend import Ready, Take, always_ready
from gateway.letta.deadlines import NEVER, TurnDeadlines
from gateway.letta.delivery import Delivery
from gateway.letta.failures import ReturnsRefused
from gateway.letta.frames import TurnStream
from gateway.letta.read_hook import told_of_reads
from gateway.letta.rest_bridge import Loan, bridge_name
from gateway.letta.rest_returns import NOTHING, Settled, settle
from gateway.letta.rest_runs import MARK_HEADER
from gateway.letta.rest_tools import ClientTools, native_names
from gateway.letta.wire import otid_of, turn_body
from gateway.translation.agent_events import Batch, Failure, Usage
from gateway.translation.agent_turn import AgentTurn

if TYPE_CHECKING:
    from gateway.letta.rest import RestBackend

ERROR_BODY: Final = 65_536
ERROR_BODY_WAIT: Final = 2.0
"""Seconds for the body of an error: it only adds to what the status says."""
LEARN_RUN: Final = 10.0
"""Seconds to learn the id of a run that is to be cancelled: it comes with the first frame, at once."""
END_OF_BODY: Final = 10.0
"""Seconds for the end of the body to follow Letta's last word, or a cancellation that took longer than ``SETTLE``."""
SETTLE: Final = 2.0
"""Seconds for a cancelled run to end."""
LARGE_BODY: Final = 1_048_576
CONNECT_PAUSES: Final = (0.1, 0.3)
"""Seconds before each further try to connect."""

_UNSETTLED: Final = (PendingApproval, ReturnsRefused)
"""How Letta refuses a turn that settles other calls than those that wait."""
_BROKEN: Final = (*upstream_errors.FOREIGN, RuntimeError)
"""What reading raises where the connection is gone; RuntimeError where aiohttp itself closed it, after garbage."""

_log: Final = structlog.get_logger("gateway.letta")


class RestTurn:
    """A ``RunningTurn`` of a ``RestBackend``."""

    def __init__(self, backend: "RestBackend", turn: AgentTurn) -> None:
        self._backend = backend
        self._turn = turn
        self._stream = TurnStream()
        self._request: asyncio.Task[aiohttp.ClientResponse] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._deadlines: TurnDeadlines | None = None
        self._error: GatewayError | None = None
        self._cancelled = False
        self._closed = False
        self._delivery = Delivery()
        self._loan: Loan | None = None
        self._has_heard = False
        self._has_looked = False
        self._must_look = False
        self._seen = 0
        self._is_lost = False
        self._attempts = 0
        self._may_run = False
        self._now = asyncio.get_running_loop().time

    @property
    def ended(self) -> bool:
        """Tell whether Letta is done with the turn, or never had it."""
        if self._request is None or self._stream.frames.over:
            return True
        return self._request.done() and (self._request.cancelled() or self._request.exception() is not None)

    async def open(self) -> None:
        """Send the turn and wait for Letta to take it."""
        self._raise_if_aborted()
        self._backend.check()
        if self._deadlines is not None:
            self._deadlines.stop()  # of the try before, which Letta refused
        self._deadlines = TurnDeadlines(self._backend.config.limits, self.abort)
        self._has_looked = False
        try:
            await self._start()
        except _UNSETTLED:
            self._has_looked = True
            await self._start()

    async def _start(self) -> None:
        """Send the turn, in place of the try before."""
        self._count_skipped()
        if self._response is not None:
            self._free(self._response)
        self._stream, self._response = TurnStream(), None
        self._seen, self._is_lost, self._has_heard = 0, False, False
        self._request = self._backend.tasks.spawn(self._send(), "turn")
        await self._answered(self._request)
        self._raise_if_aborted()

    def abort(self, error: GatewayError) -> None:
        """End the request or the delivery with this error."""
        if self._error is not None:
            return
        self._error = error
        self._delivery.fail(error)
        if self._response is None:
            if self._request is not None:
                self._request.cancel()
        elif self._stream.frames.run_id is None:
            self._response.close()  # it cannot be cancelled, so nobody stays to hear its end

    async def deliver(self, take: Take, ready: Ready) -> None:
        """Hand over the batches, one for each network read that has any, from where the stream stands.

        Where Letta's first word is that other calls wait than the turn settles, nobody hears it: the turn is sent once
        more.
        """
        try:
            await self._deliver(take, ready)
        except _UNSETTLED:
            if not self._must_look:
                raise
            self._must_look, self._has_looked = False, True
            await self._start()
            await self._deliver(take, ready)

    async def _deliver(self, take: Take, ready: Ready) -> None:
        assert self._response is not None and self._deadlines is not None  # noqa: S101, PT018 - open() came before
        try:
            with told_of_reads(self._response, self._hand_on, self._lost):
                await self._delivery.run(take, ready, self._hand_on)
        finally:
            self._deadlines.waiting_since = NEVER

    def _hand_on(self) -> None:
        """Hand over what has come: called after every read."""
        delivery, deadlines = self._delivery, self._deadlines
        if not delivery.takes or deadlines is None:
            return  # aiohttp keeps what comes meanwhile, and stops reading when that is much
        try:
            while batch := self._next_batch():
                deadlines.silent = False
                if not delivery.hand(batch):
                    deadlines.waiting_since = NEVER
                    return
        except GatewayError as error:
            delivery.fail(error)
            return
        if batch is None:
            delivery.end()
        deadlines.waiting_since = self._now()

    def _lost(self) -> None:
        self._is_lost = True
        self._hand_on()

    def _next_batch(self) -> Batch | None:
        """Return the events of the next read that has any: none when it is yet to come, None when none will."""
        self._raise_if_aborted()
        assert self._response is not None  # noqa: S101 - open() came before
        content, stream = self._response.content, self._stream
        while content.total_bytes != self._seen and not stream.done:
            data = content.read_nowait() if content.exception() is None else _unread(self._response)
            self._seen += len(data)
            batch = stream.feed(data)
            if batch:
                if not self._has_heard:
                    self._hear_first(batch)
                return batch
        broken = content.exception()
        if stream.done or content.is_eof():
            return stream.end() or None
        if broken is None and not self._is_lost:
            return []
        if not stream.frames.over:
            raise upstream_errors.truncated() from broken
        return stream.end() or None

    def _hear_first(self, batch: Batch) -> None:
        self._has_heard = True
        failed = batch[0]
        if not self._has_looked and isinstance(failed, Failure) and isinstance(failed.error, _UNSETTLED):
            self._must_look = True
            raise failed.error

    async def cancel(self) -> None:
        """Cancel the run on Letta, and give it a moment to end.

        V1 marks the run at once and looks at the mark when the model's next chunk comes, so a silent model keeps its
        stream open; what a cancelled run said or was told is not stored either way (letta 0.16.8).
        """
        if self.ended or self._request is None:
            return
        async with asyncio.timeout(LEARN_RUN):
            response = await self._answered(self._request)
            try:
                while self._stream.frames.run_id is None and (data := await response.content.readany()):
                    self._stream.feed(data)
            except _BROKEN:
                self._stream.feed(_unread(response))  # what it named before is all there is
        run_id = self._stream.frames.run_id
        if run_id is None:
            return
        await self._backend.cancel_run(self._turn.agent_id, run_id)
        self._cancelled = True
        with contextlib.suppress(*_BROKEN):
            async with asyncio.timeout(SETTLE):
                # To the end of the body, not of the frames: ``_free`` says why.
                while data := await response.content.readany():
                    self._stream.feed(data)

    async def drain(self) -> None:
        """Let the run go on to its end, unheard."""
        if self.ended or self._request is None:
            return
        await self._answered(self._request)
        await self.deliver(_unheard, always_ready)

    async def usage(self) -> Usage | None:
        """Return what the run took: as its stream told at its end, for all its steps, or as Letta has it."""
        frames = self._stream.frames
        if frames.over and frames.used is None:
            await self._hear_the_rest()
        if frames.used is not None:
            return frames.used
        if frames.run_id is not None:
            return await self._backend.runs.usage(frames.run_id)
        if self._may_run:  # or may begin to just now: only later can Letta say
            raise UpstreamTimeout("Whether the Letta server took the turn is not known yet.", should_retry=False)
        return None

    async def _hear_the_rest(self) -> None:
        """Read to the end of the body, unheard: what the turn took comes behind its end, and V1 cleans up before it."""
        if self._response is not None:
            with contextlib.suppress(*_BROKEN):
                async with asyncio.timeout(SETTLE):
                    while data := await self._response.content.readany():
                        self._stream.feed(data)

    def close(self) -> None:
        """Free the connection and the timer."""
        if self._closed:
            return
        self._closed = True
        if self._deadlines is not None:
            self._deadlines.stop()
        if self._request is not None and not self._request.done():
            self._request.cancel()
        elif self._response is None:
            self._request = None  # it failed: its task holds the frames of that, and they this turn
        if self._response is not None:
            self._free(self._response)
        if self._loan is not None:
            self._backend.tasks.spawn(self._loan.give_back(), "give tools back")
        self._count_skipped()

    def _count_skipped(self) -> None:
        self._backend.metrics.skipped_frames.inc(self._stream.frames.unknown + self._stream.events.skipped)

    def _free(self, response: aiohttp.ClientResponse) -> None:
        """Give the connection back, once the body is at its end where the turn is over or cancelled.

        V1 cleans up between the two: a connection that is closed meanwhile can leave it with a database lock that
        stops the agent's next turn for a minute (letta 0.16.8, after a failed run as after a cancelled one).
        """
        if (self._stream.frames.over or self._cancelled) and not response.content.at_eof():
            self._backend.tasks.spawn(_read_to_the_end(response), "end of stream")
        else:
            _release(response)

    def _raise_if_aborted(self) -> None:
        if self._error is not None:
            raise self._error

    async def _answered(self, request: asyncio.Task[aiohttp.ClientResponse]) -> aiohttp.ClientResponse:
        """Wait for the response; who gives up waiting leaves the request under way."""
        try:
            return await asyncio.shield(request)
        except asyncio.CancelledError:
            if request.cancelled():
                self._backend.observe(None)
                self._raise_if_aborted()
            raise

    async def _send(self) -> aiohttp.ClientResponse:
        backend, turn = self._backend, self._turn
        if turn.conversation_id is not None:
            await backend.prompts.see_current(turn.conversation_id)
        settled = NOTHING
        # Results are never sent on trust: where Letta has an answer to a call, it drops a second one and says nothing.
        if turn.returns or self._has_looked:
            settled = settle(turn.returns, await self._waiting_calls())
        body = await self._body(settled)
        with backend.budget.request():
            response = await self._connect(body)
        backend.observe(response.status)
        if response.status == 200 and response.content_type == "text/event-stream":  # noqa: PLR2004
            self._response = response  # whoever waits for it: from here on it is closed with the turn
            return response
        self._may_run = response.status >= 500  # noqa: PLR2004
        raise await self._refusal(response)

    async def _waiting_calls(self) -> tuple[str, ...]:
        try:
            return await self._backend.waiting_calls(self._turn.agent_id, self._turn.conversation_id)
        except UpstreamInvalid as error:
            if self._has_looked:  # what Letta said first is what its operator should hear of
                raise PendingApproval from error
            raise

    async def _body(self, settled: Settled) -> bytes:
        """Return what goes out, and have the stream know whose calls are whose."""
        turn, backend = self._turn, self._backend
        prompt = await backend.prompts.overlaid(turn.agent_id, turn.overlay) if turn.overlay else None
        if not turn.tools and not settled.answers:
            self._stream = TurnStream(ClientTools())
            return turn_body(turn, settled, otid=self._otid(), prompt=prompt)
        profile = await backend.profile(turn.agent_id)
        offered = turn.tools
        if turn.tools and await backend.needs_bridge(profile):
            names: tuple[str, ...] = tuple(bridge_name(tool) for tool in turn.tools)
            await self._borrow()
            offered = ()
        else:
            names = native_names(turn.tools, profile.own_tools)
            offered = tuple(structs.replace(tool, name=name) for tool, name in zip(turn.tools, names, strict=True))
        tools = ClientTools(turn.tools, names, is_legacy=profile.is_legacy)
        self._stream = TurnStream(tools, [said.call_id for said in settled.answers])
        return turn_body(turn, settled, offered, is_legacy=profile.is_legacy, otid=self._otid(), prompt=prompt)

    def _otid(self) -> str | None:
        self._attempts += 1
        return None if self._turn.mark is None else otid_of(self._turn.mark, self._attempts)

    async def _borrow(self) -> None:
        if self._loan is None:
            bridge = self._backend.bridge
            self._loan = Loan(bridge, self._turn.agent_id)
            await bridge.lend(self._loan, self._turn.agent_id, self._turn.tools)

    async def _refusal(self, response: aiohttp.ClientResponse) -> GatewayError:
        """Return the error of an answer that is no stream."""
        body = b""
        try:
            async with asyncio.timeout(ERROR_BODY_WAIT):
                while len(body) < ERROR_BODY and (data := await response.content.readany()):
                    body += data
        except upstream_errors.FOREIGN:
            pass  # the status says enough
        finally:
            response.close()
        if response.status == 200:  # noqa: PLR2004
            return UpstreamInvalid(should_retry=False)
        error = upstream_errors.for_status(response.status, response.headers, body)
        if isinstance(error, AgentGone) and self._turn.conversation_id is not None:
            return ConversationGone(should_retry=False)
        return error

    async def _connect(self, body: bytes) -> aiohttp.ClientResponse:
        backend, mark = self._backend, self._turn.mark
        headers = None if mark is None else {MARK_HEADER: mark}
        for pause in (*CONNECT_PAUSES, None):
            try:
                # aiohttp writes a large body in pieces only from a file.
                data = body if len(body) < LARGE_BODY else io.BytesIO(body)
                self._may_run = True
                return await backend.session.post(self._path(), data=data, headers=headers, allow_redirects=False)
            except upstream_errors.FOREIGN as error:
                self._may_run = not isinstance(error, upstream_errors.NOT_DELIVERED)
                retriable = upstream_errors.worth_another_try(error)
                if pause is None or not retriable or not backend.budget.allows():
                    backend.observe(None)
                    raise upstream_errors.before_answer(error) from error
            backend.metrics.upstream_retries.inc()
            with backend.budget.retry():
                await asyncio.sleep(pause)
        raise AssertionError  # the last try returns or raises

    def _path(self) -> str:
        if self._turn.conversation_id is not None:
            return f"v1/conversations/{self._turn.conversation_id}/messages"
        return f"v1/agents/{self._turn.agent_id}/messages/stream"


def _unheard(_: Batch) -> bool:
    return True


async def _read_to_the_end(response: aiohttp.ClientResponse) -> None:
    try:
        with contextlib.suppress(*_BROKEN):
            async with asyncio.timeout(END_OF_BODY):
                while await response.content.readany():
                    pass
    finally:  # at the end of the process this is cancelled
        _release(response)


def _release(response: aiohttp.ClientResponse) -> None:
    """Give the connection back; where it broke, the error that the response keeps is dealt with."""
    response.release()
    broken = response.content.exception()
    if broken is not None:
        dealt_with(broken)


def _unread(response: aiohttp.ClientResponse) -> bytes:
    """Return what came before a stream broke: aiohttp tells of the break first, to whoever is slow to read."""
    return response.content._read_nowait(-1)  # noqa: SLF001 - everything public raises
