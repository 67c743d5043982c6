"""Turns on the App Server that wait for results of the client's tools.

The server asks for one call of a step at a time, and for the next one when that is answered (letta 0.34.12). It answers
a call by itself after five minutes and goes on, with nobody to hear it: what waits is ended before that.
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from gateway.errors import BackendError, UpstreamInvalid
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_socket import Socket, new_request_id
from gateway.letta.app_server_tools import Toolkit
from gateway.letta.app_server_wire import Incoming, Runtime
from gateway.letta.frames import FrameDecoder
from gateway.translation.agent_events import Usage

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

LONGEST: Final = 285.0
"""Seconds that a turn may wait at most."""
ANSWER: Final = 3.0
"""Seconds for an ended turn to end on the server."""
NO_RESULT: Final = "No result: the client went on without running this call."


class ParkedTurn:
    """A turn that waits; ``names`` are the tools of the step's calls by their ids, as the client knows them."""

    def __init__(
        self, backend: "AppServerBackend", socket: Socket, runtime: Runtime, toolkit: Toolkit, names: dict[str, str]
    ) -> None:
        self._backend = backend
        self.socket = socket
        self.runtime = runtime
        self.toolkit = toolkit
        self.names = names
        self.requests: dict[str, str] = {}
        """The server's requests that are to be answered, by the ids of their calls."""
        self.frames: list[tuple[Incoming, int]] = []
        """What the server told meanwhile."""
        self._last_words = FrameDecoder(by_step=True)
        self._ending: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        limit = min(backend.config.parked_timeout, LONGEST)
        self._limit = asyncio.get_running_loop().call_later(limit, self._end_later)

    @property
    def used(self) -> Usage | None:
        """Return what it took while it was ended: a step that was quicker than the end."""
        return self._last_words.used

    @property
    def is_ending(self) -> bool:
        """Tell whether nobody can resume it any more."""
        return self._ending is not None or self._over.is_set()

    def heard(self, frame: Incoming, size: int) -> None:
        """Take a frame of the conversation."""
        match frame.type:
            case "external_tool_call_request":
                self.requests[frame.tool_call_id] = frame.request_id or ""
                if self._ending is not None:
                    self._backend.tasks.spawn(self._refuse(), "answer call")
            case "stream_delta":
                if self._ending is None:
                    self.frames.append((frame, size))
                elif frame.subagent_id is None:
                    with contextlib.suppress(UpstreamInvalid):  # nobody is there to be told
                        self._last_words.decode(bytes(frame.delta), [])
            case "turn_finished":
                self.lost()
            case _:
                return

    def lost(self) -> None:
        """Learn that the turn is over."""
        self.leave()
        self._over.set()

    def leave(self) -> None:
        """Let another listener have it, or nobody."""
        self._limit.cancel()
        self.socket.forget(self.runtime, self)
        self._backend.threads.parked.pop(self.runtime, None)

    async def end(self) -> bool:
        """Answer the calls with an error, stop the turn and see it end; False where it does not within some seconds.

        A turn that is stopped while the server waits for a call takes ten seconds to end, so that comes after the
        answer (letta 0.34.12).
        """
        await asyncio.shield(self._end_later())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER):
                await self._over.wait()
                return True
        self.lost()
        return False

    def _end_later(self) -> asyncio.Task[None]:
        if self._ending is None:
            self._limit.cancel()
            self._ending = self._backend.tasks.spawn(self._end(), "end parked turn")
        return self._ending

    async def _end(self) -> None:
        with contextlib.suppress(BackendError):  # the socket is gone, and the turn with it
            await self._refuse()
            await self.socket.send(wire.Abort(request_id=new_request_id(), runtime=self.runtime))

    async def _refuse(self) -> None:
        while self.requests:
            _, request_id = self.requests.popitem()
            await self.socket.send(wire.answer_of(request_id, NO_RESULT, succeeded=False))
