"""What a client makes of a streamed answer: its lines parsed, its chunks folded."""

import json
from typing import Any

import msgspec

DONE = "[DONE]"


def lines(stream: bytes) -> list[bytes]:
    """Return the lines of a stream, which must be whole events of one ``data:`` line each."""
    if not stream:
        return []
    assert stream.endswith(b"\n\n")
    events = stream[:-2].split(b"\n\n")
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return events


def read(stream: bytes) -> list[Any]:
    """Return what each event holds: chunks as dictionaries, and ``[DONE]``."""
    payloads = [line.removeprefix(b"data: ") for line in lines(stream)]
    return [DONE if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


class FoldedCall(msgspec.Struct):
    """A tool call, put together from its fragments."""

    id: str
    name: str = ""
    arguments: str = ""


class Folded(msgspec.Struct):
    """An answer, put together from its chunks as OpenAI's SDKs do."""

    text: str = ""
    reasoning: str = ""
    calls: list[FoldedCall] = []
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False


def fold(events: list[Any]) -> Folded:
    """Put an answer together."""
    folded = Folded()
    for event in events:
        if event == DONE:
            folded.done = True
        elif "error" in event:
            folded.error = event["error"]
        else:
            _fold_chunk(event, folded)
    return folded


def _fold_chunk(chunk: dict[str, Any], folded: Folded) -> None:
    folded.usage = chunk.get("usage") or folded.usage
    for choice in chunk["choices"]:
        delta = choice["delta"]
        folded.text += delta.get("content", "")
        folded.reasoning += delta.get("reasoning", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for fragment in delta.get("tool_calls", ()):
            if fragment["index"] == len(folded.calls):
                folded.calls.append(FoldedCall(fragment["id"]))
            else:
                assert "id" not in fragment, "SDKs would join it to the one before"
            call = folded.calls[fragment["index"]]
            call.name += fragment["function"].get("name", "")
            call.arguments += fragment["function"].get("arguments", "")
        folded.finish_reason = choice["finish_reason"] or folded.finish_reason
