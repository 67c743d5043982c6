"""How a server-sent event is written: one line of data, then a blank line.

See https://html.spec.whatwg.org/multipage/server-sent-events.html. The JSON encoder never emits a raw newline, so one
``data:`` line is enough.
"""

from typing import Final

BEGIN: Final = b"data: "
END: Final = b"\n\n"
DONE: Final = b"data: [DONE]\n\n"

MAX_LINE: Final = 65_536
"""No line longer than this leaves the gateway: Open WebUI and every aiohttp client before 3.14 fail at 128 KiB."""


def event(data: bytes) -> bytes:
    """Frame one JSON document."""
    return BEGIN + data + END


def named_event(name: bytes, data: bytes) -> bytes:
    """Frame one JSON document as an event of that name, by which browsers tell events apart."""
    return b"event: " + name + b"\n" + BEGIN + data + END
