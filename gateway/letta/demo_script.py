"""What the demo model says: a pure function from a chat request to the steps of an answer.

The newest user message decides:

| the message                       | what the model does                                                  |
|-----------------------------------|----------------------------------------------------------------------|
| anything else                     | streams `You said: <message>`, word by word                          |
| `count to N [every M ms]`         | `word0 word1 ...`, one delta each, M (20) milliseconds apart         |
| `think ...`, `think and <script>` | reasoning first, then the answer, or what the script says            |
| `call A [and B] now`              | calls these tools, if offered; words before `call` are said first    |
| `call A with {json}`              | calls the tool with these arguments                                  |
| `refuse`                          | says a few words, then `finish_reason: content_filter`               |
| `be cut off`                      | says a few words, then `finish_reason: length`                       |
| `say nothing`                     | ends without a word                                                  |
| `fail with STATUS`                | answers that HTTP status, with an error in OpenAI's shape            |
| `hang`, `hang after N words`      | falls silent for an hour                                             |
| `break off after N words`         | closes the connection without an end                                 |
| `describe image`                  | says how many images it received, and of which media types           |

A script stands at the beginning of a line (`call` anywhere). Tool results that nobody has answered come before all
scripts: `Tool said: <result>`. If a tool `send_message` is offered (Letta's legacy agents speak by calling it), words
become a call of it.
"""

import re
from collections.abc import Callable, Sequence

import msgspec

_HOUR = 3600.0
_ECHO = "You said: "

# What a client sends, as far as the scripts look at it.


class Image(msgspec.Struct):
    """What an `image_url` part points to."""

    url: str


class Part(msgspec.Struct):
    """One part of a message's content."""

    type: str = "text"
    text: str | None = None
    image_url: Image | None = None


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Part] | None = None


class Schema(msgspec.Struct, rename="camel"):
    """As much of JSON Schema as it takes to make up true arguments."""

    type: str | list[str] = "string"
    properties: dict[str, "Schema"] = {}
    required: list[str] = []
    enum: list[msgspec.Raw] = []
    any_of: list["Schema"] = []


class Function(msgspec.Struct):
    """The function that a tool stands for."""

    name: str
    parameters: Schema | None = None


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    function: Function


class StreamOptions(msgspec.Struct):
    """The options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message]
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None


# What the model does, step by step.


class Say(msgspec.Struct, frozen=True):
    """A piece of the answer's text."""

    text: str


class Think(msgspec.Struct, frozen=True):
    """A piece of reasoning."""

    text: str


class Call(msgspec.Struct, frozen=True):
    """The beginning of a tool call."""

    index: int
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """A piece of a tool call's arguments."""

    index: int
    text: str


class Pause(msgspec.Struct, frozen=True):
    """Silence."""

    seconds: float


class Finish(msgspec.Struct, frozen=True):
    """The end, with OpenAI's finish reason."""

    reason: str


class Fail(msgspec.Struct, frozen=True):
    """An error status instead of an answer."""

    status: int


class BreakOff(msgspec.Struct, frozen=True):
    """The connection is closed without an end."""


Step = Say | Think | Call | Arguments | Pause | Finish | Fail | BreakOff
Steps = list[Step]


def play(request: ChatRequest, aside: str = "") -> Steps:
    """Decide what the model does with a request; ``aside`` is added where it only says what it was told."""
    offered = {tool.function.name: tool.function for tool in request.tools or ()}
    results = _unanswered_results(request.messages)
    if results:
        steps = _say(f"Tool said: {'; '.join(results)}")
    else:
        steps = _with_aside(_perform(*_newest_user_message(request.messages), offered), aside)
    speaks_by_tool = "send_message" in offered and not any(isinstance(step, Call) for step in steps)
    return _as_send_message(steps, offered["send_message"]) if speaks_by_tool else steps


def _perform(text: str, images: Sequence[str], offered: dict[str, Function]) -> Steps:
    for pattern, script in _SCRIPTS:
        if match := pattern.search(text):
            return script(match, text, images, offered)
    return _say(f"{_ECHO}{text}")


def _with_aside(steps: Steps, aside: str) -> Steps:
    said = "".join(step.text for step in steps if isinstance(step, Say))
    if not aside or not said.startswith(_ECHO):
        return steps
    return [*steps[:-1], *(Say(word) for word in _words(f"\n\n{aside}")), steps[-1]]


def _say(text: str, reason: str = "stop") -> Steps:
    return [*(Say(word) for word in _words(text)), Finish(reason)]


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def _count(match: re.Match[str], *_: object) -> Steps:
    pause = Pause(int(match["ms"] or 20) / 1000)
    steps: Steps = []
    for word in _numbered_words(int(match["n"])):
        steps += (word, pause)
    return [*steps[:-1], Finish("stop")]


def _numbered_words(count: int) -> list[Say]:
    return [Say(f"{' ' if n else ''}word{n}") for n in range(count)]


def _think(match: re.Match[str], text: str, images: Sequence[str], offered: dict[str, Function]) -> Steps:
    thoughts = [Think(word) for word in _words(f"I have to {match[0].strip()}")]
    rest = match["rest"]
    return [*thoughts, *(_perform(rest, images, offered) if rest else _say(f"{_ECHO}{text}"))]


def _call(match: re.Match[str], text: str, _: Sequence[str], offered: dict[str, Function]) -> Steps:
    steps: Steps = [Say(word) for word in _words(text[: match.start()])]
    for index, name in enumerate(re.split(r"\s+and\s+", match["names"])):
        if name not in offered:
            return _say(f"There is no tool {name}.")
        arguments = match["arguments"] or example(offered[name].parameters or Schema(type="object"))
        steps += [Call(index, name), *(Arguments(index, piece) for piece in re.findall(r"(?s).{1,6}", arguments))]
    return [*steps, Finish("tool_calls")]


def _describe(_match: re.Match[str], _text: str, images: Sequence[str], _offered: dict[str, Function]) -> Steps:
    kinds = [url[5:].partition(";")[0] if url.startswith("data:") else "a link" for url in images]
    return _say(f"I see {len(images)} images: {', '.join(kinds) or 'none'}")


def _first_words(end: Step) -> Callable[..., Steps]:
    return lambda match, *_: [*_numbered_words(int(match["n"] or 0)), end, Finish("stop")]


_SCRIPT_TABLE: tuple[tuple[str, Callable[..., Steps]], ...] = (
    (r"^think\b(?: and (?P<rest>.*)|.*)", _think),
    (r"\bcall (?P<names>[\w-]+(?:\s+and\s+[\w-]+)*) (?:now\b|with (?P<arguments>\{.*\}))", _call),
    (r"^count to (?P<n>\d{1,6})(?: every (?P<ms>\d{1,6}) ?ms)?", _count),
    (r"^refuse\b", lambda *_: _say("I had better not", "content_filter")),
    (r"^be cut off\b", lambda *_: _say("This sentence has no", "length")),
    (r"^say nothing\b", lambda *_: [Finish("stop")]),
    (r"^fail with (?P<status>[45]\d\d)\b", lambda match, *_: [Fail(int(match["status"]))]),
    (r"^hang\b(?: after (?P<n>\d{1,6}) words?)?", _first_words(Pause(_HOUR))),
    (r"^break off after (?P<n>\d{1,6}) words?", _first_words(BreakOff())),
    (r"^describe (?:the |this )?images?\b", _describe),
)
_SCRIPTS = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), script) for pattern, script in _SCRIPT_TABLE]


def example(schema: Schema) -> str:
    """Make up JSON that the schema accepts: only what is required, one plain value per type."""
    if schema.enum:
        return bytes(schema.enum[0]).decode()
    if schema.any_of:
        return example(schema.any_of[0])
    kind = schema.type if isinstance(schema.type, str) else schema.type[0]
    if kind == "object":
        names = [name for name in schema.required if name in schema.properties]
        return "{" + ", ".join(f"{_quoted(name)}: {example(schema.properties[name])}" for name in names) + "}"
    return {"integer": "1", "number": "1.5", "boolean": "true", "array": "[]", "null": "null"}.get(kind, '"Paris"')


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _as_send_message(steps: Steps, tool: Function) -> Steps:
    """Say by calling the tool what would have been said in words; thoughts become the argument that asks for them."""
    if not any(isinstance(step, Say) for step in steps):
        return steps
    schema = tool.parameters or Schema(type="object")
    inner = next((name for name in ("thinking", "inner_thoughts") if name in schema.properties), None)
    thoughts = "".join(step.text for step in steps if isinstance(step, Think)) or "I answer."
    opening = f"{_quoted(inner)}: {_quoted(thoughts)}, " if inner else ""
    called: Steps = [Call(0, "send_message"), Arguments(0, "{" + opening + '"message": "')]
    for step in steps:
        match step:
            case Say(text):
                called.append(Arguments(0, _quoted(text)[1:-1]))
            case Finish(reason):
                called += [Arguments(0, '"}'), Finish("tool_calls" if reason == "stop" else reason)]
            case Think():
                pass
            case _:
                called.append(step)
    return called


# Finding out what the user said: Letta wraps messages in JSON, or puts reminders of its own beside them.


class _Envelope(msgspec.Struct):
    """Letta's wrapping of a user message, or of a tool's result."""

    message: msgspec.Raw
    type: str = "user_message"


_NOT_THE_USER = {"heartbeat", "login", "system_alert"}
_open_envelope = msgspec.json.Decoder(_Envelope).decode
_REMINDER = re.compile(r"(?s)<system-reminder>.*?</system-reminder>\s*")


def _text(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content if part.text)


def _unwrapped(text: str) -> tuple[str, str]:
    """Give what an envelope holds, and its type."""
    try:
        envelope = _open_envelope(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return text, "user_message"
    inner = bytes(envelope.message).decode()
    return (msgspec.json.decode(inner, type=str) if inner.startswith('"') else inner), envelope.type


def _newest_user_message(messages: Sequence[Message]) -> tuple[str, list[str]]:
    for message in reversed(messages):
        text, kind = _unwrapped(_REMINDER.sub("", _text(message)).strip())
        if message.role == "user" and kind not in _NOT_THE_USER:
            parts = message.content if isinstance(message.content, list) else []
            return text.strip(), [part.image_url.url for part in parts if part.image_url]
    return "", []


def _unanswered_results(messages: Sequence[Message]) -> list[str]:
    results: list[str] = []
    for message in reversed(messages):
        text, kind = _unwrapped(_text(message))
        if message.role == "tool":
            results.insert(0, text)
        elif message.role != "user" or kind not in _NOT_THE_USER:
            break
    return results


# What the answer costs, with a word for a token.


class CachedTokens(msgspec.Struct, frozen=True):
    """What of the prompt came from a cache."""

    cached_tokens: int


class ReasoningTokens(msgspec.Struct, frozen=True):
    """What of the answer was reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """The usage of one answer, as OpenAI reports it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


def usage(request: ChatRequest, steps: Steps) -> Usage:
    """Count words and pieces; whatever came before the newest assistant message counts as cached."""
    costs = [len(_words(_text(message))) for message in request.messages]
    answered = [n for n, message in enumerate(request.messages) if message.role == "assistant"]
    thoughts = sum(isinstance(step, Think) for step in steps)
    produced = sum(isinstance(step, Say | Think | Call | Arguments) for step in steps)
    return Usage(
        prompt_tokens=sum(costs),
        completion_tokens=produced,
        total_tokens=sum(costs) + produced,
        prompt_tokens_details=CachedTokens(sum(costs[: answered[-1]]) if answered else 0),
        completion_tokens_details=ReasoningTokens(thoughts),
    )
