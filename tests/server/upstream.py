"""A Letta server of a few lines: it says what the test lets it say, over a raw socket."""

import asyncio
import contextlib
import json
import re
from typing import Final, Self

FRAMES: Final = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
AGENT_ID: Final = "agent-00000000-0000-4000-8000-000000000001"


class Upstream:
    """Listens for as long as the context.

    A turn says ``words`` words, ``pause`` seconds apart, waits for ``gate``, and ends. ``heads`` are the request lines
    that came, ``secrets`` the credentials; ``streams`` counts turns under way, ``cancelled`` the cancels.
    """

    def __init__(self, *, words: int = 3, pause: float = 0.0) -> None:
        self.words = words
        self.pause = pause
        self.gate = asyncio.Event()
        self.gate.set()
        self.heads: list[str] = []
        self.secrets: list[str] = []
        self.streams = 0
        self.cancelled = 0
        self.agents = [{"id": AGENT_ID, "name": "friend", "created_at": "2026-01-01T00:00:00Z"}]
        self._over = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1_000)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Listen no more."""
        assert self._server is not None
        self._server.close()
        self._over.set()

    @property
    def url(self) -> str:
        """Return where it is."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head.split("\r\n")[0])
            self.secrets += re.findall(r"(?i)\r\nauthorization: (.*)\r\n", head)
            length = re.search(r"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            await self._answer(head, writer)
        writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        if "/messages/stream" in head:
            self.streams += 1
            try:
                await self._stream(writer)
            finally:
                self.streams -= 1
        elif "/messages/cancel" in head:
            self.cancelled += 1
            self._over.set()
            _write_json(writer, {})
        elif "/health" in head:
            _write_json(writer, {"version": "0.16.8", "status": "ok"})
        elif "/app-server-info" in head:
            _write_json(writer, {"detail": "Not Found"}, "404 Not Found")
        else:
            _write_json(writer, self.agents)

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(FRAMES.encode())
        await _frame(writer, message_type="ping")
        for number in range(self.words):
            await _frame(writer, message_type="assistant_message", id="message-1", content=f"word{number} ")
            await asyncio.sleep(self.pause)
        gate, over = self._task(self.gate), self._task(self._over)
        await asyncio.wait({gate, over}, return_when=asyncio.FIRST_COMPLETED)
        if self._over.is_set():
            await _frame(writer, message_type="stop_reason", stop_reason="cancelled")
        else:
            await _frame(writer, message_type="stop_reason", stop_reason="end_turn")
            await _frame(writer, message_type="usage_statistics", prompt_tokens=1, completion_tokens=2, total_tokens=3)
        writer.write(b"data: [DONE]\n\n")
        for task in (gate, over):
            task.cancel()

    @staticmethod
    def _task(event: asyncio.Event) -> asyncio.Task[bool]:
        return asyncio.get_running_loop().create_task(event.wait())


async def _frame(writer: asyncio.StreamWriter, **frame: object) -> None:
    writer.write(
        f"data: {json.dumps({'id': 'x', 'date': '2026-01-01T00:00:00Z', 'run_id': 'run-1', **frame})}\n\n".encode()
    )
    await writer.drain()


def _write_json(writer: asyncio.StreamWriter, answer: object, status: str = "200 OK") -> None:
    body = json.dumps(answer).encode()
    lines = (
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    head = "\r\n".join((*lines, "", ""))
    writer.write(head.encode() + body)
