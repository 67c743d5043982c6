"""One turn over the App Server's WebSocket: the input, the frames that answer it, and how it is stopped.

A turn may take several runs on Letta (one per step of the agent), each with a stop reason of its own; what ends it is
``turn_finished``. Inputs that wait for another turn on the same conversation would be merged into one run: the
registry lets one turn at a time through, and an input that has to wait for somebody else's turn is heard from the
moment that it is accepted.

A call of a client's tool ends the delivery, not the turn: that is parked, and goes on in the next ``AppServerTurn`` of
its conversation. What the user says with the results waits in the server's queue until they are in: the server takes it
in between two steps of the same turn, behind the results (letta 0.34.12).
"""

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.errors import (
    ConversationBusy,
    GatewayError,
    TurnCancelled,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
)
from gateway.letta import app_server_wire as wire
from gateway.letta import failures
from gateway.letta.app_server_parked import NO_RESULT, ParkedTurn
from gateway.letta.app_server_socket import Socket, gone, new_request_id
from gateway.letta.app_server_tools import ClientCalls, Toolkit, toolkit_of
from gateway.letta.app_server_wire import Incoming, Runtime
from gateway.letta.app_server_words import cut, said_to_agent
from gateway.letta.backend import Ready, Take, always_ready
from gateway.letta.deadlines import TurnDeadlines
from gateway.letta.delivery import Delivery
from gateway.letta.frames import FrameDecoder
from gateway.letta.wire import ImageContent, TextContent, otid_of
from gateway.translation.agent_events import Batch, Failure, Stop, Usage
from gateway.translation.agent_turn import AgentTurn, ToolResult

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

MOST_WAITING: Final = 1_048_576
"""Bytes of frames that may wait for a slow client; the socket is shared, so it cannot be held back for one of them."""
ACCEPT: Final = 10.0
"""Seconds for an input to be accepted before it can be stopped."""
QUEUED: Final = 5.0
"""Seconds that an input stays in the server's queue at a time."""
COLD: Final = 5.0
"""Seconds for which a first turn on a thread may keep others of that kind waiting."""
SETTLE: Final = 3.0
"""Seconds for an aborted turn to end."""


class _RunAbandoned(Exception):
    """The conversation waits for a run that nobody hears any more."""


class AppServerTurn:
    """A ``RunningTurn`` of an ``AppServerBackend``."""

    def __init__(self, backend: "AppServerBackend", turn: AgentTurn) -> None:
        self._backend = backend
        self._turn = turn
        self._runtime: Runtime | None = None
        self._attempts = 0
        self._request_id = ""
        self._results: dict[str, ToolResult] = {}
        self._frames = FrameDecoder(by_step=True)
        self._calls = ClientCalls(Toolkit())
        self._superseded: dict[str, str] = {}
        self._delivery = Delivery()
        self._waiting: deque[tuple[Batch, int]] = deque()
        self._waiting_bytes = 0
        self._is_flooded = False
        self._deadlines: TurnDeadlines | None = None
        self._opening: asyncio.Task[None] | None = None
        self._socket: Socket | None = None
        self._queue_item: str | None = None
        self._is_withdrawn = False
        self._is_sent = False
        self._is_parked = False
        self._is_lost = False
        self._must_move = False
        self._has_moved = False
        self._is_stopping = False
        self._is_stopped = False
        self._requests: dict[str, str] = {}
        self._resumed: frozenset[str] = frozenset()
        self._joins = False
        self._answers = False
        self._news = asyncio.Event()
        self._accepted = asyncio.Event()
        self._place: asyncio.TimerHandle | None = None
        self._finished = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False

    @property
    def ended(self) -> bool:
        """Tell whether Letta is done with the turn, or never had it, or waits for the client's tools."""
        return self._finished.is_set() or self._is_parked or not self._is_sent

    async def open(self) -> None:
        """Send the turn and wait for the server to start it; raises ``ConversationBusy`` while it does not."""
        self._raise_error()
        self._begin_anew()
        if self._deadlines is not None:
            self._deadlines.stop()
        self._deadlines = TurnDeadlines(self._backend.config.limits, self.abort)
        self._opening = self._backend.tasks.spawn(self._start(), "turn")
        try:
            await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            if self._opening.cancelled():
                self._raise_error()
            raise
        if not self._accepted.is_set():  # what went wrong since then is for ``deliver``, after what came before it
            self._raise_error()

    def _begin_anew(self) -> None:
        self._give_place()
        self._request_id = self._new_id()
        self._queue_item = None
        self._is_withdrawn = False
        self._is_sent = False
        for event in (self._news, self._accepted, self._finished):
            event.clear()

    def _new_id(self) -> str:
        """Return what names the turn's message this time: the server drops one that it has seen."""
        self._attempts += 1
        return new_request_id() if self._turn.mark is None else otid_of(self._turn.mark, self._attempts)

    def abort(self, error: GatewayError) -> None:
        """End ``open`` or ``deliver`` with this error."""
        if self._error is not None:
            return
        self._error = error
        self._delivery.fail(error)
        if self._opening is not None:
            self._opening.cancel()

    async def deliver(self, take: Take, ready: Ready) -> None:
        """Hand over the batches, one for each frame that has any, from where the turn stands.

        A gateway that was killed in a turn leaves a run that never ends: until the server is started again it takes no
        input on that conversation (letta 0.34.12), and the agent goes on in a copy of it.
        """
        try:
            await self._delivery.run(take, ready, self._hand_on)
        except _RunAbandoned:
            await self._move()
            await self._delivery.run(take, ready, self._hand_on)

    async def _move(self) -> None:
        """Send the turn once more, in a copy of its conversation."""
        self._must_move, self._has_moved = False, True
        if self._socket is not None and self._runtime is not None:
            self._socket.forget(self._runtime, self)
            await self._backend.threads.leave(self._runtime)
        self._frames.trouble = ""
        await self.open()

    async def cancel(self) -> None:
        """Abort the turn on the server, and see it end.

        An aborted turn whose model is silent ends only when that says something, and until then no other one starts
        on its conversation (letta 0.34.12): the agent goes on in a copy of it.
        """
        socket, runtime = self._socket, self._runtime
        if self.ended or socket is None or runtime is None:
            return
        if not self._accepted.is_set() and await self._take_back(socket, runtime):
            return
        self._is_stopping = True
        if self._joins:
            await self._leave_queue(socket, runtime)
        await self._answer_calls()  # a turn that is stopped while a call waits takes ten seconds to end
        await socket.ask(wire.Abort(request_id=new_request_id(), runtime=runtime), SETTLE)
        self._is_stopped = True
        try:
            async with asyncio.timeout(SETTLE):
                await self._finished.wait()
        except TimeoutError:
            await self._backend.threads.leave(runtime)

    async def drain(self) -> None:
        """Let the turn go on to its end, unheard."""
        if self.ended:
            return
        self._is_flooded = False
        await self.deliver(_unheard, always_ready)

    async def usage(self) -> Usage | None:
        """Return what the steps took that came to their end; raises where it is not known that no other one will."""
        if not self._is_sent:
            return None
        if self._is_lost or not (self._finished.is_set() or self._is_parked or self._is_stopped):
            raise UpstreamTimeout("What the turn took is not known yet.", should_retry=False)
        return self._frames.used or Usage(0, 0)

    def close(self) -> None:
        """Hear no more of it."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._deadlines is not None:
            self._deadlines.stop()
        if self._opening is not None:
            self._opening.cancel()
        self._give_place()
        if self._socket is not None and self._runtime is not None:
            self._socket.forget(self._runtime, self)
        self._backend.metrics.skipped_frames.inc(self._frames.unknown)

    # What the socket tells -------------------------------------------------------------------------------------------

    def heard(self, frame: Incoming, size: int) -> None:
        """Take a frame of the conversation; what comes before the input is accepted belongs to another turn."""
        match frame.type:
            case "stream_delta":
                if self._accepted.is_set() and frame.subagent_id is None:
                    self._decode(frame.delta, size)
            case "input_accepted":
                if frame.request_id == self._request_id and frame.accepted and frame.disposition != "queued":
                    self._accept()
            case "external_tool_call_request":
                self._called(frame.tool_call_id, frame.request_id or "")
            case "turn_finished":
                self._finish(frame)
            case "update_queue":
                self._look_at_queue(frame)
            case "update_loop_status":
                self._look_at_loop(frame)
            case _:
                return

    def lost(self) -> None:
        """Learn that the socket is gone, and the turn with it."""
        if self._finished.is_set():
            return
        self._is_lost = True
        self._finish_unheard()
        self._end(UpstreamTruncated(should_retry=False))

    def _accept(self) -> None:
        self._joins = False
        self._accepted.set()
        self._news.set()

    def _finish_unheard(self) -> None:
        self._finished.set()
        self._give_place()
        self._accept()

    def _decode(self, delta: msgspec.Raw, size: int) -> None:
        if self._finished.is_set():
            return
        batch: Batch = []
        try:
            self._frames.decode(bytes(delta), batch)
            if self._error is not None:
                return  # nobody listens any more, but what a step took counts
            told = self._calls.sort(batch)
            if self._calls.waits:
                told += self._released(delta)
        except GatewayError as error:
            self._end(error)
            return
        if batch:
            self._break_silence()
        if told:
            self._tell(told, size)

    def _released(self, delta: msgspec.Raw) -> Batch:
        """Return the calls of the client's tools once the server has checked them."""
        try:
            refused = wire.refused_calls(bytes(delta))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamInvalid(should_retry=False) from error
        return [] if refused is None else self._calls.release(refused)

    def _break_silence(self) -> None:
        if self._deadlines is not None and self._deadlines.silent:
            self._deadlines.silent = False
            self._give_place()

    def _tell(self, batch: Batch, size: int) -> None:
        if self._is_flooded:
            return
        self._waiting.append((batch, size))
        self._waiting_bytes += size
        self._hand_on()
        if self._waiting_bytes > MOST_WAITING:
            self._is_flooded = True
            self._waiting.clear()
            self._waiting_bytes = 0

    def _look_at_loop(self, frame: Incoming) -> None:
        if self._accepted.is_set() and frame.loop_status.status == wire.MODEL_ASKED:
            self._give_place()

    def _finish(self, frame: Incoming) -> None:
        if self._finished.is_set() or self._joins or not self._accepted.is_set():
            return
        self._finished.set()
        self._give_place()
        trouble = frame.error or self._frames.trouble
        if failures.is_abandoned_run(trouble) and not self._has_moved:
            self._must_move = True
        else:
            self._waiting.append(([_end(frame.stop_reason, trouble)], 0))
        self._hand_on()

    def _look_at_queue(self, frame: Incoming) -> None:
        for item in frame.queue:
            if item.client_message_id == self._request_id:
                self._queue_item = item.id
                self._news.set()
        for removed in frame.removed:
            if removed.client_message_id != self._request_id:
                continue
            if removed.disposition == "dequeued":
                self._accept()
            elif not self._accepted.is_set() and not self._is_withdrawn:
                self._finish_unheard()
                self._end(TurnCancelled(should_retry=False))

    # Calls of the client's tools -------------------------------------------------------------------------------------

    def _called(self, call_id: str, request_id: str) -> None:
        if call_id not in self._resumed and self._is_heard:
            self._park(call_id, request_id)
            return
        self._requests[call_id] = request_id
        if self._answers or not self._is_heard:
            self._backend.tasks.spawn(self._answer_calls(), "answer calls")

    @property
    def _is_heard(self) -> bool:
        is_over = self._finished.is_set() or self._is_stopping or self._error is not None
        return self._accepted.is_set() and not is_over

    def _park(self, call_id: str, request_id: str) -> None:
        """Leave the turn to whoever brings the results; every call of the step is told by now."""
        socket, runtime, calls = self._socket, self._runtime, self._calls
        if socket is None or runtime is None:
            return
        parked = ParkedTurn(self._backend, socket, runtime, calls.toolkit, calls.names)
        parked.requests[call_id] = request_id
        self._backend.threads.parked[runtime] = parked
        socket.hear(runtime, parked)
        self._is_parked = True
        if self._deadlines is not None:
            self._deadlines.stop()
        self._give_place()
        self._waiting.append(([*calls.release(), Stop("requires_approval")], 0))
        self._hand_on()

    async def _resume(self, parked: ParkedTurn) -> None:
        """Go on with a parked turn: its calls get their results, and the user's words come behind them."""
        socket, runtime = parked.socket, parked.runtime
        parked.leave()
        self._calls = ClientCalls(parked.toolkit, frozenset(parked.names))
        self._resumed = frozenset((*parked.names, *parked.requests))
        self._requests = parked.requests
        socket.hear(runtime, self)
        self._is_sent = True
        self._accept()
        content = self._match_results(parked.names)
        if content:
            self._joins = True
            await self._put_in(socket, runtime, content)
        for frame, size in parked.frames:
            self.heard(frame, size)
        self._answers = True  # and not before the user's words wait behind the calls
        await self._answer_calls()

    def _match_results(self, names: dict[str, str]) -> str | list[TextContent | ImageContent]:
        """Keep the results that calls wait for, and return what is left to be said."""
        strangers: list[ToolResult] = []
        rests: list[ToolResult] = []
        for result in self._turn.returns:
            if result.call_id not in self._resumed:
                strangers.append(result)
                continue
            self._results[result.call_id], rest = cut(result)
            if rest is not None:
                rests.append(rest)
        return said_to_agent(self._turn, strangers, names, rests)

    async def _answer_calls(self) -> None:
        """Answer what the server asked; what has no result is answered too, as it would wait for it."""
        while self._requests and self._socket is not None:
            call_id, request_id = self._requests.popitem()
            result = None if self._is_stopping else self._results.get(call_id)
            text, succeeded = (NO_RESULT, False) if result is None else (result.text, result.succeeded)
            await self._socket.send(wire.answer_of(request_id, text, succeeded=succeeded))

    async def _leave_queue(self, socket: Socket, runtime: Runtime) -> None:
        """Take back what the user said with the results: an input that is left there would start the next turn."""
        self._joins = False
        if self._queue_item is not None:
            command = wire.RemoveQueued(request_id=new_request_id(), runtime=runtime, item_id=self._queue_item)
            await self._backend.reply(socket, command, within=ACCEPT)

    # The way out -----------------------------------------------------------------------------------------------------

    def _hand_on(self) -> None:
        delivery, waiting = self._delivery, self._waiting
        if self._is_flooded and delivery.takes:
            delivery.fail(ConnectionResetError("the client takes too little"))
        while waiting and delivery.takes:
            batch, size = waiting.popleft()
            self._waiting_bytes -= size
            delivery.hand(batch)
        if waiting or not delivery.takes:
            return
        if self._error is not None:
            delivery.fail(self._error)
        elif self._must_move:
            delivery.fail(_RunAbandoned())
        elif self._finished.is_set() or self._is_parked:
            delivery.end()

    def _end(self, error: Exception) -> None:
        """End the delivery with this error, after what is still to be handed over."""
        if self._error is None:
            self._error = error
        self._hand_on()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _start(self) -> None:
        if self._backend.threads.is_warm(self._turn):
            await self._send()
            return
        await self._backend.cold_starts.acquire()
        self._place = asyncio.get_running_loop().call_later(COLD, self._give_place)
        await self._send()

    def _give_place(self) -> None:
        """Let the next cold turn start."""
        if self._place is not None:
            self._place.cancel()
            self._place = None
            self._backend.cold_starts.release()

    async def _send(self) -> None:
        turn, backend = self._turn, self._backend
        toolkit = toolkit_of(turn.tools, backend.tools_of(turn.agent_id))
        while True:
            socket, runtime = self._socket, self._runtime = await backend.threads.place_of(turn, toolkit)
            parked = backend.threads.parked.get(runtime)
            if parked is None:
                break
            if not parked.is_ending and parked.toolkit.digest == toolkit.digest:
                await self._resume(parked)
                return
            # A turn keeps the tools that it began with: one with other tools is another one.
            self._superseded = parked.names
            if not await parked.end():
                await backend.threads.leave(runtime)
            self._frames.used = parked.used
        await backend.threads.offer(socket, runtime, toolkit)
        self._calls = ClientCalls(toolkit)
        if socket.is_lost:
            raise gone()
        socket.hear(runtime, self)
        self._is_sent = True
        await self._put_in(socket, runtime, said_to_agent(turn, turn.returns, self._superseded))
        if not self._accepted.is_set():
            await self._wait_for_another(socket, runtime)

    async def _put_in(self, socket: Socket, runtime: Runtime, content: str | list[TextContent | ImageContent]) -> None:
        toolkit = self._calls.toolkit
        command = wire.input_of(content, runtime, self._request_id, toolkit.server_tools, tuple(toolkit.names))
        reply = await self._backend.reply(socket, command, within=self._backend.config.limits.turn)
        if not (reply.success and reply.accepted):
            if not self._resumed:
                self._finish_unheard()
            raise failures.of_refusal(reply.error)

    async def _wait_for_another(self, socket: Socket, runtime: Runtime) -> None:
        """Wait while the server is at another turn of this conversation; take the input back when that takes long.

        It may be one that was aborted while its model was silent: until that says something, the server neither ends
        the turn nor starts another one (letta 0.34.12).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUEUED):
                await self._accepted.wait()
                return
        try:
            taken_back = await self._take_back(socket, runtime)
        except TimeoutError:
            raise UpstreamTimeout("The Letta server holds the message back.", should_retry=False) from None
        if taken_back and not socket.is_lost:
            raise ConversationBusy

    async def _take_back(self, socket: Socket, runtime: Runtime) -> bool:
        """Take back an input that waits for another turn; False where its own turn came meanwhile."""
        async with asyncio.timeout(ACCEPT):
            await self._news.wait()
            if self._queue_item is not None and not self._accepted.is_set():
                command = wire.RemoveQueued(request_id=new_request_id(), runtime=runtime, item_id=self._queue_item)
                self._is_withdrawn = True
                if (await self._backend.reply(socket, command, within=ACCEPT)).success:
                    self._finished.set()
                    return True
            await self._accepted.wait()
        return self._finished.is_set()


def _end(reason: str | None, trouble: str) -> Stop | Failure:
    good = failures.good_stop(reason)
    if good is not None:
        return Stop(good)
    return Stop("refusal") if failures.is_refusal(trouble) else Failure(failures.of_finish(reason, trouble))


def _unheard(_: Batch) -> bool:
    return True
