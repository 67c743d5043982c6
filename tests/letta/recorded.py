"""Streams that were recorded from a real letta 0.16.8 server, and what the gateway makes of each.

A recording is ``tests/data/v1/<name>.txt``: request, status line, body, as they went over the wire. Beside those of
turns stands ``<name>.jsonl``: one line per event that an OpenAI client gets, as ``ChatStream`` writes them with
``include_usage``, read by eye when it was made or changed. Write the ones that are missing with::

    python -m tests.letta.recorded            # and with --all: every one, to look at the difference
"""

import re
import sys
from pathlib import Path
from typing import Final

from gateway.errors import GatewayError
from gateway.letta.frames import TurnStream
from gateway.translation.chat_stream import ChatStream

FOLDER: Final = Path(__file__).parent.parent / "data" / "v1"
_HEAD: Final = re.compile(rb"\A.*?^200 text/event-stream[^\n]*\n\n", re.DOTALL | re.MULTILINE)


def names() -> list[str]:
    """Return the recordings of turns."""
    return sorted(path.stem for path in FOLDER.glob("*.txt") if _HEAD.search(path.read_bytes()))


def stream(name: str) -> bytes:
    """Return the bytes that Letta sent."""
    return _HEAD.sub(b"", (FOLDER / f"{name}.txt").read_bytes(), count=1).rstrip(b"\n") + b"\n\n"


def expected(name: str) -> list[str]:
    """Return the JSON of each event that the client gets, ``[DONE]`` among them."""
    return (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()


def answered(*reads: bytes) -> bytes:
    """Return what the gateway makes of a stream that comes in these reads, as the handler does it."""
    turn = TurnStream()
    chat = ChatStream(completion_id="chatcmpl-1", created=1_700_000_000, model="friend", include_usage=True)
    said = b""
    try:
        for data in reads:
            said += chat.receive(turn.feed(data))
        said += chat.receive(turn.end())
        if chat.error is None:
            return said + chat.finish()
    except GatewayError as error:
        return said + chat.fail(error)
    return said + chat.fail(chat.error)


def events(said: bytes) -> list[str]:
    """Return the JSON of each event."""
    return [event.removeprefix("data: ") for event in said.decode().split("\n\n")[:-1]]


if __name__ == "__main__":
    for recording in names():
        beside = FOLDER / f"{recording}.jsonl"
        if "--all" in sys.argv or not beside.exists():
            beside.write_text("\n".join(events(answered(stream(recording)))) + "\n", "utf-8")
            print(beside)
