"""What an App Server and its model have of the clients' words: from its own files, and from the model's requests."""

import re
from collections import Counter
from typing import Any, Final

import msgspec

from gateway.letta.demo_model import RunningDemoModel
from tests.live.app_server import AppServer

_REMINDER: Final = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
WORD: Final = re.compile(r"\bw\d+[a-z]\d+\b")
"""The word by which each message of a client's is known: chat, step of the chat, try."""


class Step(msgspec.Struct, frozen=True):
    """What a step of the agent's took, in tokens."""

    prompt_tokens: int
    completion_tokens: int


class Heard(msgspec.Struct, frozen=True):
    """``messages`` counts those that hold a word, ``steps`` are by the names that the model gave its answers."""

    messages: Counter[str]
    steps: dict[str, Step]
    conversations: list[list[tuple[str, str]]]
    """Role and text of what was said in each."""

    @property
    def tokens(self) -> tuple[int, int]:
        """Return the prompt and completion tokens of all steps."""
        steps = self.steps.values()
        return sum(step.prompt_tokens for step in steps), sum(step.completion_tokens for step in steps)


def heard_by(letta: AppServer) -> Heard:
    """Return what all conversations hold; a copy of one holds nothing that is not in the original."""
    names: dict[str, set[str]] = {}
    steps: dict[str, Step] = {}
    conversations = []
    for file in (letta.log.parent / ".letta" / "lc-local-backend" / "conversations").glob("*/messages.jsonl"):
        messages = [line["message"] for line in map(_line, file.read_bytes().splitlines()) if "message" in line]
        conversations.append([(message["role"], _said(message["content"])) for message in messages])
        for message in messages:
            if message["role"] == "assistant":
                if "usage" in message:
                    steps[message["responseId"]] = _step(message["usage"])
                continue
            for word in WORD.findall(_said(message["content"])):
                names.setdefault(word, set()).add(message.get("otid") or message["toolCallId"])
    return Heard(Counter({word: len(found) for word, found in names.items()}), steps, conversations)


def asked_of(model: RunningDemoModel) -> Counter[str]:
    """Count the requests in which a word was news to the model."""
    found: Counter[str] = Counter()
    for request in model.requests:
        news: set[str] = set()
        for message in reversed(msgspec.json.decode(request.body)["messages"]):
            if message["role"] == "assistant":
                break
            if message["role"] != "system":
                news.update(WORD.findall(_said(message["content"])))
        found.update(news)
    return found


def _line(line: bytes) -> dict[str, Any]:
    return msgspec.json.decode(line, type=dict[str, Any])


def _said(content: str | list[dict[str, Any]] | None) -> str:
    """Return the text of a message without what was told on the side: who says a transcript again says no message."""
    parts = [{"text": content}] if isinstance(content, str) else content or []
    return _REMINDER.sub("", "\n".join(part.get("text") or "" for part in parts)).strip()


def _step(usage: dict[str, int]) -> Step:
    return Step(usage["input"] + usage["cacheRead"], usage["output"])
