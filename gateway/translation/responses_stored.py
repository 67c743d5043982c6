"""Stored responses -> what was said before: the transcript that a following response goes on from."""

from collections.abc import Sequence
from typing import Final

import msgspec

from gateway.translation.agent_turn import Said
from gateway.translation.responses_items import history, read_items


class Stored(msgspec.Struct, frozen=True):
    """Of a stored response: its items, each as JSON."""

    output: list[msgspec.Raw] = []


_decode: Final = msgspec.json.Decoder(Stored).decode
_decode_items: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def said_before(stored: Sequence[tuple[bytes, bytes]]) -> tuple[Said, ...]:
    """Return what was said up to now: ``stored`` are input items and responses as JSON, oldest first."""
    raws: list[msgspec.Raw] = []
    for input_items, response in stored:
        raws += _decode_items(input_items)
        raws += _decode(response).output
    return history(read_items(raws)) if raws else ()


def output_of(response: bytes) -> bytes:
    """Return the output's items of a stored response as a JSON array."""
    return msgspec.json.encode(_decode(response).output)
