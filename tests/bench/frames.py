"""What the fake upstream says, as ready bytes: Letta V1 frames and OpenAI chunks around one time stamp.

Every text delta is ` @<monotonic seconds>`, of fixed width. No other byte of an answer is an `@`, so whoever reads
the answer can count deltas by counting that byte, in any encoding that leaves ASCII alone, and can date each one.
"""

import json
import time
from typing import Any, NamedTuple

MARK = b"@"
STAMP_WIDTH = 16
LAST_CHUNK = b"0\r\n\r\n"


class Script(NamedTuple):
    """One stream in chunked encoding: what opens it, what stands around each stamp, what closes it."""

    opening: bytes
    before: bytes
    after: bytes
    closing: bytes


def stamp() -> bytes:
    """Give the present moment on the clock that every process of this machine shares."""
    return b"%016.6f" % time.monotonic()


def age_of_first_stamp(data: bytes, now: float) -> float | None:
    """Tell how old the first delta in these bytes is, or nothing if it is cut by the end of the read."""
    start = data.find(MARK) + 1
    digits = data[start : start + STAMP_WIDTH]
    return now - float(digits) if start and len(digits) == STAMP_WIDTH else None


def agent_id(number: int) -> str:
    """Name the agent with this number as Letta would."""
    return f"agent-00000000-0000-4000-8000-{number:012d}"


def agent_name(number: int) -> str:
    """Name the agent with this number as a person would: the first is just "bench"."""
    return f"bench-{number}" if number else "bench"


def agent(number: int) -> dict[str, Any]:
    """Describe an agent with the fields of a recorded listing, its tools and memory left empty."""
    person = "user-00000000-0000-4000-8000-000000000000"
    return {
        "created_by_id": person,
        "last_updated_by_id": person,
        "created_at": "2026-11-20T15:16:15.063458Z",
        "updated_at": "2026-11-20T15:16:24.537771Z",
        "id": agent_id(number),
        "name": agent_name(number),
        "tool_rules": [],
        "message_ids": [],
        "system": "You are a helpful agent.",
        "agent_type": "letta_v1_agent",
        "llm_config": {
            "model": "gpt-4o-mini",
            "model_endpoint_type": "openai",
            "model_endpoint": "http://127.0.0.1:9800/v1",
            "provider_name": "openai",
            "provider_category": "base",
            "context_window": 128000,
            "handle": "openai-proxy/gpt-4o-mini",
            "temperature": 1.0,
            "max_tokens": 16384,
        },
        "embedding_config": None,
        "model": "openai-proxy/gpt-4o-mini",
        "embedding": None,
        "memory": {"blocks": [], "file_blocks": [], "prompt_template": ""},
        "blocks": [],
        "tools": [],
        "sources": [],
        "tags": [],
        "identity_ids": [],
        "identities": [],
        "tool_exec_environment_variables": [],
        "secrets": [],
        "project_id": None,
        "pending_approval": None,
        "message_buffer_autoclear": False,
        "multi_agent_group": None,
        "managed_group": None,
        "last_stop_reason": "end_turn",
        "timezone": "UTC",
        "hidden": None,
    }


def letta_script(serial: int, events: int) -> Script:
    """Write the stream of a Letta V1 turn: a ping, the deltas, the stop reason, the usage, the end."""
    run = f"run-00000000-0000-4000-8000-{serial:012d}"
    otid = f"00000000-0000-4000-8000-{serial:012d}"
    opening = _letta_frame("ping", f"ping-{otid}", run, otid=None, step=None)
    delta = _letta_frame("assistant_message", f"message-{otid}", run, otid=otid, step=f"step-{otid}")
    usage = {
        "message_type": "usage_statistics",
        "completion_tokens": events,
        "prompt_tokens": 100,
        "total_tokens": 100 + events,
        "step_count": 1,
        "run_ids": None,
        "cached_input_tokens": None,
        "cache_write_tokens": None,
        "reasoning_tokens": None,
        "context_tokens": 100 + events,
    }
    endings = ({"message_type": "stop_reason", "stop_reason": "end_turn"}, usage)
    return _script(
        _event(opening), {**delta, "content": " @"}, [*(_event(ending) for ending in endings), b"data: [DONE]\n\n"]
    )


def openai_script(serial: int, model: str) -> Script:
    """Write the same deltas as the chunks of an OpenAI completion."""
    opening = _openai_chunk(serial, model, {"role": "assistant", "content": ""}, None)
    delta = _openai_chunk(serial, model, {"content": " @"}, None)
    ending = _openai_chunk(serial, model, {}, "stop")
    return _script(_event(opening), delta, [_event(ending), b"data: [DONE]\n\n"])


def openai_completion(serial: int, model: str, events: int) -> bytes:
    """Write the same deltas as one whole OpenAI answer."""
    message = {"role": "assistant", "content": (" @" + stamp().decode()) * events}
    usage = {"prompt_tokens": 100, "completion_tokens": events, "total_tokens": 100 + events}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    head = {"id": f"chatcmpl-{serial}", "object": "chat.completion", "created": 1795187775, "model": model}
    return json.dumps({**head, "choices": [choice], "usage": usage}).encode()


def _letta_frame(kind: str, identity: str, run: str, *, otid: str | None, step: str | None) -> dict[str, Any]:
    return {
        "id": identity,
        "date": "2026-11-20T15:16:15+00:00",
        "name": None,
        "message_type": kind,
        "otid": otid,
        "sender_id": None,
        "step_id": step,
        "is_err": None,
        "seq_id": None,
        "run_id": run,
    }


def _openai_chunk(serial: int, model: str, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    head = {"id": f"chatcmpl-{serial}", "object": "chat.completion.chunk", "created": 1795187775, "model": model}
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _script(opening: bytes, delta: dict[str, Any], endings: list[bytes]) -> Script:
    left, right = _event(delta).split(MARK)
    size = len(left) + len(MARK) + STAMP_WIDTH + len(right)
    closing = b"".join(map(_chunk, endings)) + LAST_CHUNK
    return Script(_chunk(opening), b"%x\r\n%b%b" % (size, left, MARK), right + b"\r\n", closing)
