"""
title: Letta
author: Letta Gateway
description: Letta agents as models of Open WebUI, by way of a Letta Gateway or straight from a Letta V1 server.
version: 0.1.0
license: MIT
requirements: httpx, pydantic

For Open WebUI's Pipelines server, as one file of its folder. Python callers have the same agents as events:

    pipeline = Pipeline()
    pipeline.valves.base_url = "http://127.0.0.1:8080"
    async for event in pipeline.stream("Hello there", "Milo", [], {}):
        print(event.type, event.data)
    await pipeline.on_shutdown()
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import re
import ssl
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, unquote_to_bytes
from weakref import WeakKeyDictionary

import httpx
from pydantic import BaseModel, Field, ValidationError

# --- what pipeline.py and function.py share: written in pipeline.py, copied by `make open-webui-function` ---

Body: TypeAlias = dict[str, Any]
"""A JSON object as Open WebUI hands it over."""

_log: Final = logging.getLogger("letta_pipeline")

MAX_EVENT: Final = 1_048_576
"""Bytes of one server-sent event."""
MAX_ANSWER: Final = 16_777_216
"""Bytes of an answer that is no stream."""
MAX_PAGES: Final = 100
PAGE: Final = 100
MAX_SHOWN: Final = 500
"""Characters of a message that the gateway wrote."""
MAX_SOURCE: Final = 4_000
"""Characters of a tool's result that is shown as a source."""
MAX_REFUSALS: Final = 4
"""Times in one turn that an agent is told that nobody approves its tools."""
CANCEL_WITHIN: Final = 5.0
ASK_WITHIN: Final = 15.0
"""Seconds for what is asked beside the turns."""
REFRESH: Final = 15.0
"""Seconds after which the agents are listed anew."""
TASK_PROMPT: Final = re.compile(
    r"\s*(?:### Task:\s*(?:Generate a concise\b[^\n]{0,40}\btitle|Generate 1-3 broad tags|"
    r"Generate a detailed prompt for am? image|Suggest 3-5 relevant follow-up|Predict 3-5 useful messages|"
    r"Analyze the chat history to determine the necessity of generating search|You are an autocompletion system|"
    r"Summarize the conversation history that will be compacted)|"
    r"Your task is to reflect the speaker's likely facial expression|"
    r"You have been provided with a set of responses from various models to the latest user query|"
    r"Review the completed conversation turn and decide whether long-term memory should change)"
)
"""How Open WebUI begins the one message by which it asks for itself: for titles, tags, follow-ups and the like."""
PICKS_TOOLS: Final = "Your task is to choose and return the correct tool(s) from the list of available tools"
"""What it instructs a model that is to name tools in text."""
GO_ON: Final = "Continue your last answer from where it ended."
"""What an agent is told where its answer is continued: to say the message before it again might do things twice."""
SPEAKING_TOOL: Final = "send_message"
"""What Letta's legacy agents call to say something."""
SEARCHING_TOOLS: Final = frozenset(
    {"archival_memory_search", "conversation_search", "fetch_webpage", "semantic_search_files", "web_search"}
)
"""Tools of Letta's whose results are what an answer rests on."""


# What the caller hears ------------------------------------------------------------------------------------------------


class StreamEvent(BaseModel):
    """One thing that happens in a turn.

    ``data`` holds ``content`` (message, reasoning), ``description`` and ``done`` (status), ``source``, ``document`` and
    ``metadata`` as Open WebUI has them (citation), OpenAI's token counts (usage), ``message`` and ``code`` (the error).
    """

    type: Literal["message", "reasoning", "status", "citation", "usage", "chat:error"]
    data: dict[str, Any]


class LettaError(Exception):
    """A turn failed: ``message`` is safe to show and says what to do next, ``code`` is for programs."""

    def __init__(self, message: str, code: str) -> None:
        self.message = message
        self.code = code
        super().__init__(message)

    def event(self) -> StreamEvent:
        """Return what the caller hears of it."""
        return StreamEvent(type="chat:error", data={"message": self.message, "code": self.code})


def _message(text: str) -> StreamEvent:
    return StreamEvent(type="message", data={"content": text})


def _reasoning(text: str) -> StreamEvent:
    return StreamEvent(type="reasoning", data={"content": text})


def _status(description: str, *, done: bool) -> StreamEvent:
    return StreamEvent(type="status", data={"description": description, "done": done})


# Where Letta is -------------------------------------------------------------------------------------------------------


class Connection(BaseModel):
    """Where the agents are, and how long they are waited for."""

    base_url: str = Field(
        default="http://127.0.0.1:8080",
        description="The address of a Letta Gateway, or of a Letta V1 server; which of them it is, is found out.",
    )
    api_key: str = Field(
        default="",
        description="A key of the gateway's, or the Letta server's password; empty where there is none.",
        json_schema_extra={"input": {"type": "password"}},
    )
    agent_id: str = Field(default="", description="The one agent to offer, by its id or name; empty: all of them.")
    connect_timeout: float = Field(default=5.0, description="Seconds to reach the server.")
    silence_timeout: float = Field(default=120.0, description="Seconds that a running turn may be silent.")
    turn_timeout: float = Field(default=900.0, description="Seconds that a turn may take.")
    verify_tls: bool = Field(default=True, description="Whether the server's TLS certificate is checked.")

    def root(self) -> str:
        """Return the address without ``/v1``, which people add as OpenAI's clients want it, and without its secrets."""
        return str(self._url().copy_with(userinfo=b"")).rstrip("/").removesuffix("/v1").rstrip("/")

    def headers(self) -> dict[str, str]:
        """Return what every request carries."""
        headers = {"Accept-Encoding": "identity"}
        key = self.api_key.strip()
        if not (key.isascii() and key.isprintable()) and key:
            raise LettaError("The valve api_key has characters that no key has. Set it again.", "invalid_api_key")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        elif userinfo := self._url().userinfo:
            # httpx would do the same, and write the address into its log as it is.
            headers["Authorization"] = f"Basic {base64.b64encode(unquote_to_bytes(userinfo)).decode()}"
        return headers

    def timeout(self) -> httpx.Timeout:
        """Return the bounds of a turn's request."""
        connect = max(0.1, self.connect_timeout)
        silence = min(self.silence_timeout, self.turn_timeout)
        return httpx.Timeout(max(0.1, silence), connect=connect, pool=connect)

    def _url(self) -> httpx.URL:
        try:
            url = httpx.URL(self.base_url.strip())
        except (httpx.InvalidURL, ValueError, UnicodeError):
            url = httpx.URL("")
        if url.scheme not in {"http", "https"} or not url.host:
            raise LettaError(
                "The valve base_url is no http(s) address. Set it to that of your Letta Gateway or Letta server.",
                "invalid_base_url",
            )
        return url

    def hide(self, text: str) -> str:
        """Return a text of the server's without our secrets, should it repeat them."""
        for secret in (self.api_key.strip(), self.base_url.rpartition("@")[0].rpartition("//")[2]):
            if secret:
                text = text.replace(secret, "***")
        return text[:MAX_SHOWN]


class Agent(NamedTuple):
    """An agent that can be picked: ``id`` is what the server calls it by."""

    id: str
    name: str


# What is asked --------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """One request of a front end's; ``task`` is what it asks for itself, not for its user."""

    model: str
    messages: list[Any]
    chat_id: str
    task: str

    def instructions(self) -> str:
        """Return what Open WebUI instructs a model: a prompt of its admin's or its user's, and what it remembers."""
        said = [message for message in self.messages if isinstance(message, dict)]
        instructed = (message.get("content") for message in said if message.get("role") in {"system", "developer"})
        texts = (_first_text(content) for content in instructed if isinstance(content, str | list))
        return "\n\n".join(text for text in texts if text.strip())

    def newest(self) -> str | list[Any]:
        """Return the content of the user's newest message; where the agent spoke after it, what has it go on."""
        said = [message for message in self.messages if isinstance(message, dict)]
        if said and said[-1].get("role") == "assistant":
            return GO_ON
        for message in reversed(said):
            if message.get("role") == "user":
                content = message.get("content")
                return content if isinstance(content, str | list) else ""
        return ""


def asked_for(user_message: str | None, model: str, messages: list[Any], body: Body) -> Asked:
    """Read what Open WebUI says: the chat and the task stand in its metadata, or where ``inlet`` put them."""
    said = list(messages or [])
    if user_message and not any(isinstance(message, dict) and message.get("role") == "user" for message in said):
        said.append({"role": "user", "content": user_message})
    body = body or {}
    metadata = body.get("metadata")
    named = {**(metadata if isinstance(metadata, dict) else {}), **{k: v for k, v in body.items() if k in _NAMES}}
    chat_id, task = (value if isinstance(value := named.get(name), str) else "" for name in _NAMES)
    asked = Asked(model, said, chat_id, task)
    return asked._replace(task="task") if not task and _is_task(asked) else asked


def _is_task(asked: Asked) -> bool:
    """Tell whether a front end asks for itself, by its words."""
    said = [message for message in asked.messages if isinstance(message, dict)]
    if sum(message.get("role") in {"user", "assistant"} for message in said) != 1:
        return False
    instructed = (message.get("content") for message in said if message.get("role") == "system")
    if any(isinstance(text, str) and PICKS_TOOLS in text for text in instructed):
        return True
    return TASK_PROMPT.match(_first_text(asked.newest())) is not None


_NAMES: Final = ("chat_id", "task")


def _first_text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return next((text for text in texts if isinstance(text, str)), "")


_INLINE_IMAGE: Final = re.compile(r"data:(image/[\w.+-]+);base64,([A-Za-z0-9+/=\s]+)")


def letta_content(content: str | list[Any]) -> list[Body]:
    """Return a message's content as Letta takes it: texts, and images in it or by their addresses."""
    parts: list[Body] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match part:
            case {"type": "text", "text": str(text)} if text:
                parts.append({"type": "text", "text": _storable(text)})
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                parts.append({"type": "image", "source": _image(url)})
            case _:
                continue
    if not parts:
        raise LettaError("There is nothing to say to the agent: write a message.", "empty_message")
    return parts


def _image(url: str) -> Body:
    inline = _INLINE_IMAGE.fullmatch(url)
    if inline:
        return {"type": "base64", "media_type": inline[1], "data": inline[2]}
    if url.startswith("https://"):
        return {"type": "url", "url": url}
    raise LettaError("This image cannot be sent to the agent. Attach it to the message again.", "invalid_image")


def _storable(text: str) -> str:
    """Return a text without the halves of characters that JSON can carry and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json(document: object) -> bytes:
    try:
        return json.dumps(document).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LettaError("This chat cannot be sent as JSON: begin a new one.", "invalid_request") from error


# What comes in: server-sent events, Letta's frames, OpenAI's chunks ---------------------------------------------------


class EventReader:
    """Bytes, split anywhere -> the data of whole server-sent events."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that these bytes complete."""
        *lines, self._tail = (self._tail + data).replace(b"\r\n", b"\n").split(b"\n")
        found = [event for line in lines if (event := self._line(line)) is not None]
        if len(self._tail) + self._size > MAX_EVENT:
            raise _nonsense()
        return found

    def _line(self, line: bytes) -> bytes | None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        elif not line and self._data:
            event = b"\n".join(self._data)
            self._data, self._size = [], 0
            return event
        return None


def _nonsense() -> LettaError:
    return LettaError(
        "The server's answer makes no sense. Is base_url the address of a Letta Gateway or a Letta V1 server?",
        "invalid_answer",
    )


def _cut_off() -> LettaError:
    return LettaError(
        "The answer broke off before its end. The agent may have heard the message: look at the chat before you "
        "send it again.",
        "answer_cut_off",
    )


_Model = TypeVar("_Model", bound=BaseModel)
_Result = TypeVar("_Result")


def _read(kind: type[_Model], data: bytes) -> _Model:
    """Decode JSON from the server."""
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        pass  # pydantic refuses halves of characters, which Python's JSON writes as escapes
    try:
        document = json.loads(data)
        return kind.model_validate_json(_storable(json.dumps(document, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        raise _nonsense() from error


class _Part(BaseModel):
    text: str | None = None


class _Call(BaseModel):
    tool_call_id: str = ""
    name: str | None = None
    arguments: str | None = None


class _Kind(BaseModel):
    message_type: str = ""
    run_id: str | None = None


class _Frame(_Kind):
    """A frame of Letta's, of any kind: which fields it has depends on that."""

    id: str | None = None
    content: str | list[_Part] | None = None
    reasoning: str | None = None
    hidden_reasoning: str | None = None
    tool_call: _Call | None = None
    tool_calls: _Call | list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    status: str | None = None
    tool_return: Any = None
    stop_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    error_type: str | None = None
    message: Any = None
    detail: Any = None

    def text(self) -> str:
        """Return what the agent says: a string, or parts."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""

    def calls(self) -> list[_Call]:
        """Return the calls; the older field holds the first of several."""
        calls = self.tool_calls or self.tool_call
        return calls if isinstance(calls, list) else [calls] if calls else []


_GOOD_STOPS: Final = frozenset({"end_turn", "tool_rule", "max_steps", "max_tokens_exceeded", "requires_approval"})
_CUT_SHORT: Final = {
    "max_steps": "The agent reached its limit of steps",
    "max_tokens_exceeded": "The agent reached its limit of tokens",
}
_FAILED: Final = (
    "The agent's run failed on the Letta server, whose log says why. The message was delivered.",
    "turn_failed",
)
_STOPS: Final = {
    "cancelled": ("The run was cancelled.", "cancelled"),
    "insufficient_credits": ("The Letta server has no credits left.", "quota_exceeded"),
    "llm_api_error": ("The agent's model provider failed. The message was delivered.", "model_error"),
    "context_window_overflow_in_system_prompt": (
        "The agent's memory alone fills its model's context window: shorten its memory blocks.",
        "context_length_exceeded",
    ),
}
_ERRORS: Final = {
    "llm_rate_limit": ("The agent's model provider asks to wait. Try again in a while.", "rate_limited"),
    "llm_timeout": ("The agent's model provider did not answer in time.", "model_timeout"),
    "llm_authentication": (
        "The agent's model provider refused Letta's key: it has to be set on the Letta server.",
        "model_auth_failed",
    ),
    "llm_error": _STOPS["llm_api_error"],
    "insufficient_credits": _STOPS["insufficient_credits"],
}
_PENDING: Final = "waiting for approval"
_APPROVAL_PENDING: Final = (
    "The agent waits for an approval that somebody else was asked for: give or refuse it where that was.",
    "pending_approval",
)


class LettaDecoder:
    """The frames of one turn -> events, one at a time.

    ``run_id`` is what cancels the turn, ``over`` tells whether Letta said how it ended, ``waiting`` are the calls that
    it waits for an approval of.
    """

    def __init__(self) -> None:
        self.run_id: str | None = None
        self.over = False
        self.waiting: list[str] = []
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._announced: LettaError | None = None
        self._text_id: str | None = None
        self._reasoning_id: str | None = None
        self._called: dict[str, str] = {}
        self._returned: set[str] = set()
        self._spoken: dict[str, SpokenArguments] = {}

    def decode(self, data: bytes) -> Iterator[StreamEvent]:
        """Return the events of a frame; raises ``LettaError`` where it tells of a failure, or does not fit its kind."""
        kind = _read(_Kind, data)
        self.run_id = self.run_id or kind.run_id
        accept = self._ACCEPT.get(kind.message_type)
        if accept is not None:
            yield from accept(self, _read(_Frame, data))

    def end(self) -> None:
        """Take the end of the stream; raises the failure that a stop reason announced."""
        if self._announced is not None:
            raise self._announced
        if not self.over:
            raise _cut_off()

    def _assistant(self, frame: _Frame) -> Iterator[StreamEvent]:
        text = frame.text()
        if text:
            yield self._said(text, frame.id)

    def _said(self, text: str, message_id: str | None) -> StreamEvent:
        # Two messages in one turn (text, a tool, text again) are two paragraphs to the reader.
        apart = "\n\n" if self._text_id is not None and message_id != self._text_id else ""
        self._text_id = message_id or self._text_id or ""
        return _message(apart + text)

    def _thought(self, frame: _Frame) -> Iterator[StreamEvent]:
        if frame.reasoning:
            apart = "\n\n" if self._reasoning_id is not None and frame.id != self._reasoning_id else ""
            self._reasoning_id = frame.id or self._reasoning_id or ""
            yield _reasoning(apart + frame.reasoning)

    def _hidden(self, frame: _Frame) -> Iterator[StreamEvent]:
        if frame.id != self._reasoning_id:
            self._reasoning_id = frame.id
            yield _status("Thought, in private", done=True)

    def _calls(self, frame: _Frame) -> Iterator[StreamEvent]:
        for call in frame.calls():
            name = self._called.get(call.tool_call_id, "")
            if not name and call.name:
                name = self._called[call.tool_call_id] = call.name
                if name != SPEAKING_TOOL:
                    yield _status(f"Using {_shown(name)}", done=False)
            if name == SPEAKING_TOOL and call.arguments:
                spoken = self._spoken.setdefault(call.tool_call_id, SpokenArguments())
                text = spoken.feed(call.arguments)
                if text:
                    yield self._said(text, call.tool_call_id)

    def _asks(self, frame: _Frame) -> Iterator[StreamEvent]:
        for call in frame.calls():
            if call.tool_call_id and call.tool_call_id not in self.waiting:
                self.waiting.append(call.tool_call_id)
            if call.name:
                yield _status(f"{_shown(call.name)} needs an approval, which cannot be given here", done=True)

    def _return(self, frame: _Frame) -> Iterator[StreamEvent]:
        call_id = frame.tool_call_id or ""
        name = frame.name or self._called.get(call_id, "a tool")
        if call_id in self._returned or name == SPEAKING_TOOL:
            return
        self._returned.add(call_id)
        failed = frame.status == "error"
        yield _status(f"{_shown(name)} failed" if failed else f"Used {_shown(name)}", done=True)
        if name in SEARCHING_TOOLS and not failed and isinstance(frame.tool_return, str) and frame.tool_return:
            shown = _storable(frame.tool_return[:MAX_SOURCE])
            source = {"source": {"name": name}, "document": [shown], "metadata": [{"source": name}]}
            yield StreamEvent(type="citation", data=source)

    def _compacted(self, _: _Frame) -> Iterator[StreamEvent]:
        yield _status("Summed up what was said before", done=True)

    def _stop(self, frame: _Frame) -> Iterator[StreamEvent]:
        reason = frame.stop_reason or ""
        self.over = True
        if reason in _CUT_SHORT:
            yield _status(_CUT_SHORT[reason], done=True)
        elif reason not in _GOOD_STOPS:
            # An error_message that says more follows most of these; the end of the stream raises what does not.
            self._announced = LettaError(*_STOPS.get(reason, _FAILED))

    def _used(self, frame: _Frame) -> Iterator[StreamEvent]:
        completion = frame.completion_tokens or 0
        self.prompt_tokens += max(frame.prompt_tokens or 0, (frame.total_tokens or 0) - completion)
        self.completion_tokens += completion
        yield from ()

    def _failed(self, frame: _Frame) -> Iterator[StreamEvent]:
        self.over = True
        yield from ()
        if any(isinstance(text, str) and _PENDING in text for text in (frame.message, frame.detail)):
            raise LettaError(*_APPROVAL_PENDING)
        known = _ERRORS.get(frame.error_type or "")
        if known is not None:
            raise LettaError(*known)
        raise self._announced or LettaError(*_FAILED)

    _ACCEPT: Final = {
        "assistant_message": _assistant,
        "reasoning_message": _thought,
        "hidden_reasoning_message": _hidden,
        "tool_call_message": _calls,
        "tool_return_message": _return,
        "approval_request_message": _asks,
        "summary_message": _compacted,
        "stop_reason": _stop,
        "usage_statistics": _used,
        "error_message": _failed,
    }
    """What becomes of each kind of frame; the others (pings, echoes of what was sent, kinds to come) say nothing."""


def _shown(name: str) -> str:
    return name[:100]


class SpokenArguments:
    """The fragments of a ``send_message`` call's arguments -> what is said, as far as it is known."""

    _BEGIN: Final = re.compile(r'"message"\s*:\s*"')
    _WHOLE: Final = re.compile(r'(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
    _HALF: Final = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")

    def __init__(self) -> None:
        self._rest = ""
        self._begun = False
        self._ended = False

    def feed(self, fragment: str) -> str:
        """Return what a fragment adds."""
        self._rest += fragment
        if not self._begun:
            begin = self._BEGIN.search(self._rest)
            if begin is None:
                return ""
            self._begun, self._rest = True, self._rest[begin.end() :]
        if self._ended:
            return ""
        whole = self._WHOLE.match(self._rest)
        piece = whole[0] if whole else ""
        self._ended = self._rest[len(piece) :].startswith('"')
        if not self._ended and (half := self._HALF.search(piece)):
            piece = piece[: half.start()]  # the other half of the character is yet to come
        self._rest = self._rest[len(piece) :]
        try:
            said: str = json.loads(f'"{piece}"', strict=False)
        except ValueError:
            return _storable(piece)  # an escape that JSON does not know: as it stands
        return _storable(said)


class _Delta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Error(BaseModel):
    message: str | None = None
    code: str | int | None = None


class _Chunk(BaseModel):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    error: _Error | str | None = None


class _Refusal(BaseModel):
    error: _Error | str | None = None


_CUT_SHORT_BY: Final = {
    "length": "The agent reached its limit",
    "content_filter": "The agent's model refused to say more",
}


class ChunkDecoder:
    """The gateway's chunks of one turn -> events; ``over`` tells whether the turn ended as it should."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.over = False

    def decode(self, data: bytes) -> Iterator[StreamEvent]:
        """Return the events of a chunk; raises ``LettaError`` where it tells of a failure."""
        if data == b"[DONE]":
            return
        chunk = _read(_Chunk, data)
        if chunk.error is not None:
            raise told(chunk.error, self._connection)
        for choice in (chunk.choices or [])[:1]:
            delta = choice.delta or _Delta()
            thought = delta.reasoning_content or delta.reasoning
            if thought:
                yield _reasoning(thought)
            if delta.content:
                yield _message(delta.content)
            if choice.finish_reason:
                self.over = True
                if choice.finish_reason in _CUT_SHORT_BY:
                    yield _status(_CUT_SHORT_BY[choice.finish_reason], done=True)
        if chunk.usage:
            yield StreamEvent(type="usage", data=chunk.usage)

    def end(self) -> None:
        """Take the end of the stream."""
        if not self.over:
            raise _cut_off()


def told(error: _Error | str, connection: Connection) -> LettaError:
    """Return the failure that a gateway told of: its messages are made to be shown."""
    if isinstance(error, str):
        error = _Error(message=error)
    message = connection.hide(error.message or "The gateway failed. Try again.")
    return LettaError(message, connection.hide(str(error.code or "gateway_error")))


# Failures on the way --------------------------------------------------------------------------------------------------

_STATUSES: Final = {
    401: ("The server refused the API key: set the valve api_key.", "invalid_api_key"),
    403: ("The server refused the API key: set the valve api_key.", "invalid_api_key"),
    404: ("The server knows no such agent (any more). Pick another model.", "agent_not_found"),
    409: ("The agent is busy, or waits for an approval. Try again in a while.", "conversation_busy"),
    413: ("The message is too long for the server.", "message_too_long"),
    422: ("The server does not accept this message. Begin a new chat, or pick another model.", "invalid_request"),
    429: ("The server asks to wait. Try again in a while.", "rate_limited"),
}
_MANY: Final = 500
_WAITING: Final = "Waiting for the agent's other turn"


def of_status(status: int) -> LettaError:
    """Return the failure of an HTTP status."""
    known = _STATUSES.get(status)
    if known is not None:
        return LettaError(*known)
    if status >= _MANY:
        return LettaError(f"The server failed (HTTP {status}). Try again in a while.", "server_error")
    return LettaError(
        f"The server answered HTTP {status}. Is base_url the address of a Letta Gateway or a Letta V1 server?",
        "unexpected_status",
    )


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_failure(error: Exception) -> LettaError:
    """Return the failure that httpx tells of: nothing of its text, which may hold addresses and keys."""
    if _is_tls(error):
        return LettaError(
            "No secure connection: the server's TLS certificate is not trusted. Name its authority's file in "
            "SSL_CERT_FILE, or turn the valve verify_tls off for a server of your own.",
            "tls_failed",
        )
    match error:
        case httpx.ConnectTimeout() | httpx.PoolTimeout() | httpx.ConnectError():
            return LettaError("The server cannot be reached. Is base_url right, and the server up?", "unreachable")
        case httpx.TimeoutException():
            return LettaError("The server was silent for too long. Try again in a while.", "timeout")
        case httpx.InvalidURL() | httpx.UnsupportedProtocol():
            return LettaError("The valve base_url is no http(s) address.", "invalid_base_url")
        case _:
            return LettaError("The connection to the server broke. Try again in a while.", "connection_lost")


# Letta ----------------------------------------------------------------------------------------------------------------


class _Health(BaseModel):
    version: str
    status: str


class _Prompt(BaseModel):
    text: str


class _ServerInfo(BaseModel):
    letta_code_version: str


class _Row(BaseModel):
    id: str
    name: str | None = None


class _Rows(BaseModel):
    data: list[_Row]


class _AgentRows(BaseModel):
    rows: list[_Row]


INSTRUCTED: Final = """{prompt}

<client_instructions>
Instructions of the client through which you are spoken to. They hold for this turn.

{text}
</client_instructions>
"""
FIRST_WITH_PROMPTS: Final = (0, 16, 7)
"""The version of Letta that first takes a prompt for one turn; older ones let it fall without a word."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_AGENT_ID: Final = re.compile(r"agent-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class _Line:
    """What belongs to one event loop: its client, and who has which agent's turn."""

    def __init__(self, verify: bool) -> None:  # noqa: FBT001 - what httpx calls it
        self.verify = verify
        self.client = httpx.AsyncClient(verify=verify, follow_redirects=False)
        self.turns: dict[str, asyncio.Lock] = {}
        self.users = 0
        self.is_retired = False


class _Aside:
    """What runs in tasks of its own: a caller whose scope is cancelled cannot even await what ends its turn."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _Result], subject: str) -> asyncio.Task[_Result]:
        """Run something to its end, whatever becomes of who waits for it."""
        task = asyncio.get_running_loop().create_task(work, name=subject)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def of(self, subject: str | None = None) -> set[asyncio.Task[Any]]:
        """Return what runs, or what runs for one subject."""
        return {task for task in self._tasks if subject is None or task.get_name() == subject}


class LettaClient:
    """The agents behind one ``Connection``, for callers in any event loop: each loop has one HTTP client."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = WeakKeyDictionary()
        self._asides: WeakKeyDictionary[asyncio.AbstractEventLoop, _Aside] = WeakKeyDictionary()
        self._guard = threading.Lock()
        self._kinds: dict[str, Literal["gateway", "letta"]] = {}
        self._without_prompts: set[str] = set()

    def get_client(self) -> httpx.AsyncClient:
        """Return the running event loop's HTTP client."""
        return self._line().client

    async def close(self) -> None:
        """Close the running event loop's client, once the turns that were left are ended."""
        if asides := self.aside().of():
            await asyncio.wait(asides, timeout=CANCEL_WITHIN * 2)
        with self._guard:
            line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.client.aclose()

    async def agents(self, within: float = ASK_WITHIN) -> list[Agent]:
        """Return the agents that can be picked; raises ``LettaError``."""
        async with self._in_use():
            try:
                async with asyncio.timeout(within):
                    return await self._agents()
            except TimeoutError as error:
                raise of_failure(httpx.ReadTimeout("")) from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise of_failure(error) from error

    async def stream(self, asked: Asked) -> AsyncGenerator[StreamEvent, None]:
        """Run one turn; whatever fails is its last event. Leaving it before its end cancels the turn."""
        open_status: StreamEvent | None = None
        try:
            async with self._in_use(), contextlib.aclosing(self._turn(asked)) as events:
                async for event in events:
                    if event.type == "status":
                        open_status = None if event.data["done"] else event
                    yield event
        except LettaError as error:
            failure = error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = of_failure(error)
        except Exception as error:  # noqa: BLE001 - the caller hears of it, whatever it is
            # The type alone: its text may hold an address or a key.
            _log.error("a turn failed by %s", type(error).__name__)
            failure = LettaError("Something went wrong in this pipeline. Try again.", "internal_error")
        else:
            return
        if open_status is not None:
            yield _status(open_status.data["description"], done=True)
        yield failure.event()

    def aside(self) -> _Aside:
        """Return what the running event loop runs beside the turns."""
        with self._guard:
            return self._asides.setdefault(asyncio.get_running_loop(), _Aside())

    def _line(self) -> _Line:
        loop, verify = asyncio.get_running_loop(), self.connection.verify_tls
        with self._guard:
            line = self._lines.get(loop)
            if line is None or line.client.is_closed or line.verify != verify:
                if line is not None:
                    line.is_retired = True
                line = self._lines[loop] = _Line(verify)
            return line

    @contextlib.asynccontextmanager
    async def _in_use(self) -> AsyncIterator[None]:
        """Keep the line: one that is replaced meanwhile closes when the last one leaves it."""
        line = self._line()
        line.users += 1
        try:
            yield
        finally:
            line.users -= 1
            if line.is_retired and not line.users:
                await line.client.aclose()

    async def _turn(self, asked: Asked) -> AsyncGenerator[StreamEvent, None]:
        kind = await self._kind()
        events = self._gateway_turn(asked) if kind == "gateway" else self._letta_turn(asked)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def _kind(self) -> Literal["gateway", "letta"]:
        """Return what answers at the address: asked once."""
        root = self.connection.root()
        known = self._kinds.get(root)
        if known is not None:
            return known
        status, body = await self._get("/v1/health/")
        if status == httpx.codes.OK and _is(_Health, body):
            self._kinds[root] = "letta"
            version = _VERSION.match(_read(_Health, body).version)
            if version and tuple(map(int, version.groups())) < FIRST_WITH_PROMPTS:
                self._without_prompts.add(root)
            return "letta"
        if status >= _MANY:
            raise of_status(status)
        status, body = await self._get("/app-server-info")
        if status == httpx.codes.OK and _is(_ServerInfo, body):
            raise LettaError(
                "This is a Letta App Server, which speaks by WebSocket: put a Letta Gateway before it, and name that "
                "in the valve base_url.",
                "app_server",
            )
        self._kinds[root] = "gateway"
        return "gateway"

    # By way of a gateway ----------------------------------------------------------------------------------------------

    async def _gateway_turn(self, asked: Asked) -> AsyncGenerator[StreamEvent, None]:
        headers = {}
        if asked.chat_id:
            headers["X-OpenWebUI-Chat-Id"] = quote(_storable(asked.chat_id), safe=" !#$&'()*+,/:;=?@[]")
        if asked.task:
            headers["X-OpenWebUI-Task"] = quote(_storable(asked.task))
        body = {
            "model": asked.model,
            "messages": asked.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        decoder = ChunkDecoder(self.connection)
        async with contextlib.aclosing(self._events("/v1/chat/completions", body, headers)) as events:
            async for data in events:
                for event in decoder.decode(data):
                    yield event
        decoder.end()

    # Straight to Letta ------------------------------------------------------------------------------------------------

    async def _letta_turn(self, asked: Asked) -> AsyncGenerator[StreamEvent, None]:
        """Say the newest message alone: the agent remembers the others."""
        agent_id = await self._agent_id(asked.model)
        message = {"role": "user", "content": letta_content(asked.newest())}
        beside: Body = {}
        if text := asked.instructions():
            if self.connection.root() in self._without_prompts:
                yield _status("Left out the system prompt, which this Letta server takes since 0.16.7", done=True)
            else:
                beside["override_system"] = await self._prompt(agent_id, _storable(text))
        turn = self._aside(agent_id, message, beside) if asked.task else self._own_turn(agent_id, message, beside)
        async with contextlib.aclosing(turn):
            async for event in turn:
                yield event

    async def _prompt(self, agent_id: str, text: str) -> str:
        """Return the agent's own prompt with instructions behind it: Letta writes them down nowhere."""
        body = await self._ask("POST", f"/v1/agents/{quote(agent_id)}/recompile?dry_run=true", None)
        return INSTRUCTED.format(prompt=_read(_Prompt, b'{"text":' + body + b"}").text, text=text)

    async def _own_turn(self, agent_id: str, message: Body, beside: Body) -> AsyncGenerator[StreamEvent, None]:
        """Say something in the agent's own thread, where Letta V1 would let two turns mix."""
        lock = self._line().turns.setdefault(agent_id, asyncio.Lock())
        waited = lock.locked()
        if waited:
            yield _status(_WAITING, done=False)
        try:
            async with asyncio.timeout(max(0.1, self.connection.turn_timeout)):
                await lock.acquire()
        except TimeoutError as error:
            raise LettaError("The agent is busy with another turn. Try again in a while.", "agent_busy") from error
        try:
            if waited:
                yield _status(_WAITING, done=True)
            if ending := self.aside().of(agent_id):
                await asyncio.wait(ending)
            async with contextlib.aclosing(self._rounds(agent_id, None, message, beside)) as events:
                async for event in events:
                    yield event
        finally:
            lock.release()

    async def _aside(self, agent_id: str, message: Body, beside: Body) -> AsyncGenerator[StreamEvent, None]:
        """Ask for a title and the like in a conversation that is deleted: the agent's thread hears nothing of it."""
        made = self.aside().start(self._new_conversation(agent_id), "")
        try:
            conversation_id = await asyncio.shield(made)
            async with contextlib.aclosing(self._rounds(agent_id, conversation_id, message, beside)) as events:
                async for event in events:
                    yield event
        finally:
            await asyncio.shield(self.aside().start(self._delete(made), ""))

    async def _new_conversation(self, agent_id: str) -> str:
        return _read(_Row, await self._ask("POST", f"/v1/conversations/?agent_id={quote(agent_id)}", {})).id

    async def _delete(self, made: asyncio.Task[str]) -> None:
        with contextlib.suppress(httpx.HTTPError, LettaError):  # who asked for it was told
            await self._afterwards("DELETE", f"/v1/conversations/{quote(await made)}", None)

    async def _rounds(
        self, agent_id: str, conversation_id: str | None, message: Body, beside: Body
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run a turn: where the agent asks for approvals, tell it that there are none, so that it goes on."""
        messages = [message]
        prompt_tokens = completion_tokens = 0
        for _ in range(MAX_REFUSALS):
            decoder = LettaDecoder()
            said = {"messages": messages, **beside}
            async with contextlib.aclosing(self._round(agent_id, conversation_id, said, decoder)) as events:
                async for event in events:
                    yield event
            prompt_tokens += decoder.prompt_tokens
            completion_tokens += decoder.completion_tokens
            if not decoder.waiting:
                break
            messages = [{"type": "approval", "approvals": [_refused(call_id) for call_id in decoder.waiting]}]
        else:
            raise LettaError(
                "The agent keeps calling tools that need an approval, which cannot be given here.", "approval_needed"
            )
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        yield StreamEvent(type="usage", data={**counts, "total_tokens": prompt_tokens + completion_tokens})

    async def _round(
        self, agent_id: str, conversation_id: str | None, said: Body, decoder: LettaDecoder
    ) -> AsyncGenerator[StreamEvent, None]:
        body: Body = {**said, "stream_tokens": True, "include_pings": True}
        path = f"/v1/agents/{quote(agent_id)}/messages/stream"
        if conversation_id is not None:
            path = f"/v1/conversations/{quote(conversation_id)}/messages"
            body["streaming"] = True
        events = self._events(path, body, {})
        thread = conversation_id or agent_id
        first = self.aside().start(_next(events), thread)
        try:
            data = await asyncio.shield(first)
            while data is not None:
                if data != b"[DONE]":
                    for event in decoder.decode(data):
                        yield event
                data = await _next(events)
            decoder.end()
        finally:
            # A connection that is closed stops nothing on Letta.
            end = events.aclose() if decoder.over else self._cancel(agent_id, first, events, decoder)
            await asyncio.shield(self.aside().start(end, thread))

    async def _cancel(
        self,
        agent_id: str,
        first: asyncio.Task[bytes | None],
        events: AsyncGenerator[bytes, None],
        decoder: LettaDecoder,
    ) -> None:
        """End a turn that was left: what its run is called stands in its first frame, which may be yet to come."""
        try:
            async with asyncio.timeout(CANCEL_WITHIN):
                data = await first
            run_id = decoder.run_id or (_read(_Kind, data).run_id if data else None)
        except TimeoutError:
            _log.warning("a turn was left before Letta said what its run is called: it goes on")
            return
        except (httpx.HTTPError, LettaError):
            return  # it was refused, which its caller was told
        finally:
            await events.aclose()
        if run_id is not None:
            path = f"/v1/agents/{quote(agent_id)}/messages/cancel"
            await self._afterwards("POST", path, {"run_ids": [run_id]})

    async def _agent_id(self, model: str) -> str:
        if _AGENT_ID.fullmatch(model):
            return model
        named = [
            agent
            for agent in await self._letta_agents(f"&name={quote(_storable(model), safe='')}")
            if agent.name == model
        ]
        if not named:
            raise LettaError(*_STATUSES[404])
        if len(named) > 1:
            raise LettaError("Several agents have this name: use the agent's id.", "ambiguous_agent")
        return named[0].id

    # HTTP -------------------------------------------------------------------------------------------------------------

    async def _agents(self) -> list[Agent]:
        if await self._kind() == "letta":
            return await self._letta_agents()
        rows = _read(_Rows, await self._ask("GET", "/v1/models", None)).data
        return [Agent(row.id, row.name or row.id) for row in rows]

    async def _letta_agents(self, query: str = "") -> list[Agent]:
        agents: list[Agent] = []
        after = ""
        for _ in range(MAX_PAGES):
            page = f"/v1/agents/?limit={PAGE}&order=asc&order_by=created_at{query}{after}"
            body = await self._ask("GET", page, None)
            rows = _read(_AgentRows, b'{"rows":' + body + b"}").rows
            agents += [Agent(row.id, row.name or row.id) for row in rows]
            if len(rows) < PAGE:
                break
            after = f"&after={quote(rows[-1].id)}"
        return agents

    async def _events(self, path: str, body: Body, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
        """Send a turn, and return the data of its events as they come."""
        connection = self.connection
        end = time.monotonic() + max(0.1, connection.turn_timeout)
        sent = {**connection.headers(), **headers, "Content-Type": "application/json", "Accept": "text/event-stream"}
        reader = EventReader()
        client, url = self.get_client(), connection.root() + path
        async with client.stream("POST", url, content=_json(body), headers=sent, timeout=connection.timeout()) as got:
            if got.status_code != httpx.codes.OK:
                raise self._refused(got.status_code, await _bounded(got))
            if not got.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise _nonsense()
            async for data in got.aiter_bytes():
                for event in reader.feed(data):
                    yield event
                if time.monotonic() > end:
                    raise LettaError("The turn took longer than the valve turn_timeout allows.", "timeout")

    async def _ask(self, method: str, path: str, body: Body | None) -> bytes:
        status, answer = await self._request(method, path, body)
        if not httpx.codes.is_success(status):
            raise self._refused(status, answer)
        return answer

    async def _get(self, path: str) -> tuple[int, bytes]:
        return await self._request("GET", path, None)

    async def _request(self, method: str, path: str, body: Body | None) -> tuple[int, bytes]:
        connection = self.connection
        timeout = httpx.Timeout(ASK_WITHIN, connect=max(0.1, connection.connect_timeout))
        headers, content = connection.headers(), None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = _json(body)
        url = connection.root() + path
        async with self.get_client().stream(method, url, content=content, headers=headers, timeout=timeout) as got:
            return got.status_code, await _bounded(got)

    async def _afterwards(self, method: str, path: str, body: Body | None) -> None:
        """Ask for what no answer waits for."""
        try:
            async with asyncio.timeout(CANCEL_WITHIN):
                status, _ = await self._request(method, path, body)
        except (TimeoutError, httpx.HTTPError, LettaError) as error:
            _log.warning("%s at the end of a turn failed by %s", method, type(error).__name__)
            return
        if not httpx.codes.is_success(status):
            _log.warning("%s at the end of a turn was answered %s", method, status)

    def _refused(self, status: int, body: bytes) -> LettaError:
        """Return why a request was refused: a gateway says it in words that may be shown."""
        root = self.connection.root()
        if self._kinds.get(root) == "gateway" and _is(_Refusal, body):
            error = _read(_Refusal, body).error
            if error:
                return told(error, self.connection)
        self._kinds.pop(root, None)  # another server may stand there by now: it is asked again
        return of_status(status)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


async def _bounded(response: httpx.Response) -> bytes:
    body = b""
    async for data in response.aiter_bytes():
        body += data
        if len(body) > MAX_ANSWER:
            raise _nonsense()
    return body


def _is(kind: type[BaseModel], body: bytes) -> bool:
    try:
        _read(kind, body)
    except LettaError:
        return False
    return True


def _refused(call_id: str) -> Body:
    told_why = "Nobody can approve this call here, so it did not run. Go on without it."
    return {"type": "tool", "tool_call_id": call_id, "tool_return": told_why, "status": "error"}


# What goes out to Open WebUI ------------------------------------------------------------------------------------------


def _choice(model: str, kind: str, inner: Body) -> Body:
    choice = {"index": 0, "logprobs": None, **inner}
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return {**made, "choices": [choice]}


def chunk_of(event: StreamEvent | None, model: str) -> Body:
    """Return an event as a line of a stream of Open WebUI's; None is a sign of life."""
    match event:
        case StreamEvent(type="message", data=data):
            return _choice(model, "chat.completion.chunk", {"delta": data, "finish_reason": None})
        case StreamEvent(type="reasoning", data={"content": text}):
            return _choice(
                model, "chat.completion.chunk", {"delta": {"reasoning_content": text}, "finish_reason": None}
            )
        case StreamEvent(type="usage", data=data):
            return {**_choice(model, "chat.completion.chunk", {}), "choices": [], "usage": data}
        case StreamEvent(type="chat:error", data=data):
            return {"event": event.model_dump(), "error": data}
        case StreamEvent():
            return {"event": event.model_dump()}
        case None:
            return _choice(model, "chat.completion.chunk", {"delta": {}, "finish_reason": None})


class Answer:
    """The events of a turn -> one answer that is not streamed."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts: dict[str, list[str]] = {"message": [], "reasoning": []}
        self._usage: Body | None = None
        self._error: Body | None = None

    def add(self, event: StreamEvent) -> None:
        """Take an event."""
        if event.type in self._texts:
            self._texts[event.type].append(event.data["content"])
        elif event.type == "usage":
            self._usage = event.data
        elif event.type == "chat:error":
            self._error = event.data

    def whole(self) -> Body:
        """Return it: a chat completion, or the error."""
        if self._error is not None:
            return {"error": self._error}
        message = {"role": "assistant", "content": "".join(self._texts["message"])}
        if self._texts["reasoning"]:
            message["reasoning_content"] = "".join(self._texts["reasoning"])
        answer = _choice(self._model, "chat.completion", {"message": message, "finish_reason": "stop"})
        return answer if self._usage is None else {**answer, "usage": self._usage}


_PICKABLE: Final = re.compile(r"[\w .-]{1,200}", re.ASCII)


def pickable(name: str) -> str:
    """Return an agent's name as a model's id: Open WebUI puts those into paths."""
    if _PICKABLE.fullmatch(name):
        return name
    return f"agent-{hashlib.sha256(_storable(name).encode()).hexdigest()[:16]}"


class Picker:
    """The agents as models to be picked, and back."""

    def __init__(self) -> None:
        self.agents: list[Agent] | None = None

    def models(self, only: str) -> list[dict[str, str]]:
        """Return what Open WebUI lists."""
        known = self.agents or []
        if only:
            known = [agent for agent in known if only in {agent.id, agent.name}] or [Agent(only, only)]
        return [{"id": pickable(agent.id), "name": agent.name} for agent in known]

    def agent(self, model: str, only: str) -> str:
        """Return what the server calls the agent of a model by."""
        if only:
            return only
        return next((agent.id for agent in self.agents or [] if pickable(agent.id) == model), model)


def no_models(error: LettaError) -> list[dict[str, str]]:
    """Return what Open WebUI lists where there is nothing to list: why."""
    return [{"id": "unavailable", "name": f"({error.message})"}]


# --- the end of what is shared ---


HEARTBEAT: Final = 5.0
"""Seconds of silence after which a stream shows a sign of life: who stopped reading is only noticed by writing."""
ABANDONED: Final = 3.0
"""Seconds after which a turn is ended whose next event nobody asks for: the Pipelines server drops a stream that was
left without closing it, until Python happens to collect it."""
FIRST_LISTING: Final = 6.0
"""Seconds that the first listing of the agents may take, where somebody can wait for it."""


class Pipeline:
    """Letta's agents as models of the Pipelines server: a manifold, whose models are the agents."""

    class Valves(Connection):
        """What is set on the Pipelines server, in Open WebUI's admin settings."""

    def __init__(self) -> None:
        self.type = "manifold"
        self.id = "letta"
        self.name = "Letta: "
        self.valves = self.Valves()
        self._letta = LettaClient(self.valves)
        self._worker = Worker()
        self._picker = Picker()
        self._unlisted: LettaError | None = None
        self._asked_at = float("-inf")
        self._listing: concurrent.futures.Future[None] | None = None

    async def on_startup(self) -> None:
        """Look which agents there are."""
        self._take_valves()
        await self._list()

    async def on_shutdown(self) -> None:
        """End what is under way, and close what was opened."""
        await self._letta.close()
        await asyncio.to_thread(self._worker.stop, self._letta)

    async def on_valves_updated(self) -> None:
        """Take the new valves: turns that are under way go on."""
        self._take_valves()
        self._picker.agents = None
        await self._list()

    async def inlet(self, body: Body, user: Body | None = None) -> Body:  # noqa: ARG002 - what the server hands over
        """Keep which chat a request belongs to: Open WebUI takes the metadata away before ``pipe`` is called."""
        metadata = body.get("metadata")
        if isinstance(metadata, dict):
            kept = {name: metadata[name] for name in _NAMES if isinstance(metadata.get(name), str)}
            return {**body, **kept}
        return body

    async def outlet(self, body: Body, user: Body | None = None) -> Body:  # noqa: ARG002 - what the server hands over
        """Leave the answer as it is."""
        return body

    def pipelines(self) -> list[dict[str, str]]:
        """Return the agents as models: the Pipelines server asks with every request, so they are looked up aside."""
        self._take_valves()
        is_first = self._picker.agents is None and self._unlisted is None
        if time.monotonic() - self._asked_at > REFRESH and (self._listing is None or self._listing.done()):
            self._asked_at = time.monotonic()
            self._listing = self._worker.submit(self._list())
        if is_first and self._listing is not None and not _in_event_loop():
            concurrent.futures.wait([self._listing], FIRST_LISTING)
        if self._picker.agents is None and self._unlisted is not None and not self.valves.agent_id:
            return no_models(self._unlisted)
        return self._picker.models(self.valves.agent_id)

    def pipe(
        self, user_message: str, model_id: str, messages: list[Body], body: Body
    ) -> Generator[Body, None, None] | Body:
        """Answer a request of the Pipelines server's: a stream of lines, or the whole answer."""
        if body.get("stream", True):
            return self._lines(user_message, model_id, messages, body)
        answer = Answer(model_id)
        for event in self._driven(self.stream(user_message, model_id, messages, body)):
            if event is not None:
                answer.add(event)
        return answer.whole()

    async def stream(
        self, user_message: str, model_id: str, messages: list[Body], body: Body
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run one turn of an agent's, by its id or name; leaving it before its end cancels the turn."""
        self._take_valves()
        asked = asked_for(user_message, self._picker.agent(model_id, self.valves.agent_id), messages, body)
        async with contextlib.aclosing(self._letta.stream(asked)) as events:
            async for event in events:
                yield event

    def get_client(self) -> httpx.AsyncClient:
        """Return the running event loop's HTTP client."""
        self._take_valves()
        return self._letta.get_client()

    def _take_valves(self) -> None:
        """Heed the valves that the Pipelines server put in place of ours."""
        self._letta.connection = self.valves

    async def _list(self) -> None:
        self._asked_at = time.monotonic()
        try:
            self._picker.agents, self._unlisted = await self._letta.agents(), None
        except LettaError as error:
            self._unlisted = error  # shown where the agents would be; those that were known stay

    def _lines(self, user_message: str, model_id: str, messages: list[Body], body: Body) -> Generator[Body, None, None]:
        events = self._driven(self.stream(user_message, model_id, messages, body))
        model = str(body.get("model") or model_id)
        with contextlib.closing(events):
            for event in events:
                yield chunk_of(event, model)

    def _driven(self, source: AsyncGenerator[StreamEvent, None]) -> Generator[StreamEvent | None, None, None]:
        """Run a turn on the worker, one event at a time, with a None for each silence."""
        steps = _Steps(source, self._worker)
        step: concurrent.futures.Future[StreamEvent | None] | None = None
        try:
            while True:
                step = self._worker.submit(steps.next())
                while not concurrent.futures.wait([step], HEARTBEAT).done:
                    yield None
                if step.cancelled():
                    yield LettaError("The pipeline was stopped. Try again in a while.", "stopped").event()
                    return
                event = step.result()
                if event is None:
                    return
                yield event
        finally:
            if step is not None:
                step.cancel()
                self._worker.let_go(steps.leave())


def _in_event_loop() -> bool:
    """Tell whether to wait here would stop an event loop, such as the Pipelines server's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Steps:
    """The events of a turn, one at a time: who leaves waits for the step that was given up."""

    def __init__(self, source: AsyncGenerator[StreamEvent, None], worker: "Worker") -> None:
        self._source = source
        self._worker = worker
        self._lock = asyncio.Lock()
        self._watch: asyncio.TimerHandle | None = None
        self._was_abandoned = False

    async def next(self) -> StreamEvent | None:
        self._look_away()
        async with self._lock:
            event = await anext(self._source, None)
        if self._was_abandoned:
            self._was_abandoned = False
            return LettaError("The answer was not read on, so it was stopped. Try again.", "stopped").event()
        if event is not None:
            self._watch = asyncio.get_running_loop().call_later(ABANDONED, self._abandon)
        return event

    async def leave(self) -> None:
        self._look_away()
        async with self._lock:
            await self._source.aclose()

    def _look_away(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _abandon(self) -> None:
        self._was_abandoned = True
        self._worker.let_go(self.leave())


class Worker:
    """A thread with an event loop, where the turns of callers without one run; started when it is needed."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._leaving: set[concurrent.futures.Future[None]] = set()

    def submit(self, work: Coroutine[Any, Any, _Result]) -> concurrent.futures.Future[_Result]:
        """Run something there."""
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="letta-pipeline", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def let_go(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something there that nobody waits for; a worker that was stopped has ended everything by itself."""
        with self._guard:
            if self._loop is None:
                work.close()
                return
            leaving = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def stop(self, letta: LettaClient) -> None:
        """End what runs there, then the thread."""
        with self._guard:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_wind_up(letta), loop).result(CANCEL_WITHIN * 4)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _wind_up(letta: LettaClient) -> None:
    """End every turn of this event loop, then close its client."""
    running = asyncio.all_tasks() - {asyncio.current_task()} - letta.aside().of()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await letta.close()
