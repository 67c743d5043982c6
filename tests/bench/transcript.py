"""Reads a whole HTTP answer back, strictly: the driver only counts, this checks what it counted."""

from tests.bench.frames import MARK


def chunks(answer: bytes) -> list[bytes]:
    """Undo the chunked encoding of an answer, head and all; what is not exactly that is a ValueError."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    found: list[bytes] = []
    while True:
        size, line, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        payload, end, rest = rest[:length], rest[length : length + 2], rest[length + 2 :]
        if not line or len(payload) != length or end != b"\r\n":
            raise ValueError(f"a chunk of {length} bytes is cut")
        if not length:
            return found
        found.append(payload)


def deltas(answer: bytes) -> list[bytes]:
    """Give the SSE events of an answer that carry text, one entry each, in their order."""
    body = b"".join(chunks(answer)).replace(b"\r\n", b"\n")
    if not body.endswith(b"data: [DONE]\n\n"):
        raise ValueError("the stream ends without [DONE]")
    return [event for event in body.split(b"\n\n") if event.startswith(b"data: ") and MARK in event]


def fault(answer: bytes, expected: int) -> str | None:
    """Say what is wrong with an answer that should carry this many deltas, one to an event, in order."""
    try:
        events = deltas(answer)
    except ValueError as error:
        return str(error)
    stamps = [event.split(MARK)[1] for event in events]
    if len(events) != expected:
        return f"{len(events)} events instead of {expected}"
    if any(event.count(MARK) != 1 for event in events):
        return "an event carries more than one delta"
    return None if stamps == sorted(stamps) else "the deltas are out of order"
