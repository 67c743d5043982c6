"""What the gateway writes to standard error, read back."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import structlog

from gateway.server import logs


class RecordedLogs:
    """The lines that were written so far."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        """Return all that was written."""
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the lines, each of them one JSON object."""
        return [msgspec.json.decode(line) for line in self.text.split("\n") if line]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Return the access log."""
        return [line for line in self.lines if line["event"] == "request"]


@contextlib.contextmanager
def recorded_logs(
    environment: Literal["development", "production"] = "production", level: str = "DEBUG"
) -> Iterator[RecordedLogs]:
    """Configure logging as ``serve`` does, for as long as the context; everything is put back at its end."""
    root = logging.getLogger()
    touched = [logging.getLogger(name) for name in ("httpx", "httpcore", "letta_client", "asyncio")]
    before = root.handlers[:], root.level, [logger.level for logger in touched]
    stream = io.StringIO()
    try:
        with contextlib.redirect_stderr(stream):
            logs.configure(environment, level)
        assert sys.stderr is not stream
        yield RecordedLogs(stream)
    finally:
        root.handlers[:], level_before, levels = before
        root.setLevel(level_before)
        for logger, value in zip(touched, levels, strict=True):
            logger.setLevel(value)
        logging.getLogger("aiohttp.server").disabled = False
        structlog.reset_defaults()
