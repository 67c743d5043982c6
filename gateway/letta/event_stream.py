"""An incremental parser of server-sent events: bytes in, split anywhere; the data of whole events out.

After https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation: lines end in LF, CRLF
or CR, a BOM may lead, comments and unknown fields are ignored, several ``data`` lines are joined by a newline. Letta's
events come as one ``data:`` line each, most often one event per network read: that case takes the short way.
"""

from typing import Final

from gateway.errors import UpstreamInvalid

MAX_EVENT: Final = 1_048_576
"""Bytes of one event: no frame of Letta's comes near, and a peer that sends no blank line must not fill the memory."""

_BOM: Final = b"\xef\xbb\xbf"
_KNOWN_EVENTS: Final = frozenset({b"", b"message", b"error"})


class EventStream:
    """The parser of one stream: ``feed`` what was read; it returns the data of every event that is now whole.

    Events of a type that nobody asked for are skipped and counted in ``skipped``. While ``between`` is true the next
    byte begins an event, whatever came before.
    """

    def __init__(self) -> None:
        self._tail = bytearray()
        self._scanned = 0
        self._after_cr = False
        self._start = True
        self.between = False
        self.skipped = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that ``data`` completes; raises ``UpstreamInvalid`` on an endless event."""
        if self._start and data:
            data = self._skip_bom(data)
        if self._after_cr or b"\r" in data:
            data = self._normalise(data)
        is_whole = not self._tail and data.endswith(b"\n\n")
        found = self._events(data) if is_whole else self._feed_buffered(data)
        self.between = not (self._tail or self._after_cr or self._start)
        return found

    def _feed_buffered(self, data: bytes) -> list[bytes]:
        tail = self._tail
        tail += data
        end = tail.rfind(b"\n\n", max(0, self._scanned - 1))
        if end < 0:
            self._scanned = len(tail)
            if len(tail) > MAX_EVENT:
                raise UpstreamInvalid(should_retry=False)
            return []
        whole = bytes(tail[: end + 2])
        del tail[: end + 2]
        self._scanned = len(tail)
        return self._events(whole)

    def _skip_bom(self, data: bytes) -> bytes:
        """Take the leading BOM away, however it is split."""
        held = bytes(self._tail) + data
        if len(held) < len(_BOM) and _BOM.startswith(held):
            self._tail = bytearray(held)
            return b""
        self._start = False
        self._tail.clear()
        return held.removeprefix(_BOM)

    def _normalise(self, data: bytes) -> bytes:
        """Make every line end a LF: a CR that ends one read and the LF that begins the next are one line end."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _events(self, whole: bytes) -> list[bytes]:
        found: list[bytes] = []
        for block in whole.split(b"\n\n"):
            if block.startswith(b"data: ") and b"\n" not in block:
                found.append(block[6:])
            elif block:
                self._event(block, found)
        return found

    def _event(self, block: bytes, found: list[bytes]) -> None:
        event = b""
        data: list[bytes] = []
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data.append(value)
            elif name == b"event":
                event = value
        if not data:
            return
        if event in _KNOWN_EVENTS:
            found.append(b"\n".join(data))
        else:
            self.skipped += 1
