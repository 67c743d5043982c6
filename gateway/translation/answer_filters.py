"""AgentEvent -> AgentEvent: what a request's options make of an answer, before it is written in anybody's format."""

import io
from collections.abc import Sequence
from string import ascii_letters
from typing import Final, Protocol

import msgspec

from gateway.errors import InvalidStructuredOutput
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    StopReason,
    TextDelta,
    ToolCallDelta,
)
from gateway.translation.agent_turn import ClientTool
from gateway.translation.ask import Ask, OutputSchema
from gateway.translation.fitting import Fitting

MOST_OUTPUT: Final = 2_097_152
"""Characters of a structured answer: it is read whole before it is known to fit."""
MOST_SHOWN: Final = 200
"""Characters of a server tool's arguments that are shown."""
CUT_OFF: Final[frozenset[StopReason]] = frozenset({"max_steps", "max_tokens_exceeded", "refusal"})
ANY_OBJECT: Final = msgspec.Raw(b'{"type":"object","additionalProperties":true}')


class AnswerFilter(Protocol):
    """Changes the events of one answer, fed in order."""

    def receive(self, batch: Batch) -> Batch:
        """Return what becomes of the events of one network read."""
        ...


class OneCall:
    """Lets the first call through: for clients that take one at a time. The others are answered as not run."""

    def __init__(self) -> None:
        self._first: str | None = None

    def receive(self, batch: Batch) -> Batch:
        """Return the batch without all calls but the first."""
        return [event for event in batch if self._passes(event)]

    def _passes(self, event: AgentEvent) -> bool:
        if type(event) is not ToolCallDelta:
            return True
        if self._first is None:
            self._first = event.call_id
        return event.call_id == self._first


class ShownActivity:
    """Shows the agent's own tools in its reasoning: a line for each call, and one for each result."""

    def __init__(self) -> None:
        self._calls: dict[str, ToolLine] = {}
        self._unshown: list[ToolLine] = []

    def receive(self, batch: Batch) -> Batch:
        """Return the batch with lines in the place of what server tools did."""
        out: Batch = []
        for event in batch:
            match event:
                case ServerToolCall(call_id=call_id, name=name, arguments=arguments):
                    line = self._line(call_id)
                    line.name = line.name or name or ""
                    line.arguments += arguments[: MOST_SHOWN + 1 - len(line.arguments)]
                case ServerToolReturn(call_id=call_id, name=name, succeeded=succeeded):
                    self._show(out)
                    line = self._calls.get(call_id) or ToolLine()
                    out.append(
                        ReasoningDelta(f"[{line.name or name or 'tool'}: {'done' if succeeded else 'failed'}]\n")
                    )
                case _:
                    self._show(out)
                    out.append(event)
        return out

    def _show(self, out: Batch) -> None:
        """Show the calls that are told of whole by now: something else has come."""
        for line in self._unshown:
            out.append(ReasoningDelta(f"\n[{line.name or 'tool'} {_short(line.arguments)}]\n"))
        self._unshown.clear()

    def _line(self, call_id: str) -> "ToolLine":
        line = self._calls.get(call_id)
        if line is None:
            line = self._calls[call_id] = ToolLine()
            self._unshown.append(line)
        return line


class ToolLine(msgspec.Struct):
    """A call of the agent's own tool, as far as it is shown."""

    name: str = ""
    arguments: str = ""


class StructuredOutput:
    """Makes an answer of the call of a tool that takes it: its arguments are the content, if they fit the schema.

    What an agent says in words instead is the answer where that fits, and a failure where it does not. The answer is
    held back until it is whole.
    """

    def __init__(self, tool: str, output: OutputSchema) -> None:
        self._tool = tool
        self._schema = None if output.schema is None else Fitting(output.schema)
        self._answers: dict[str, io.StringIO] = {}
        self._words = io.StringIO()
        self._room = MOST_OUTPUT
        self._has_calls = False

    def receive(self, batch: Batch) -> Batch:
        """Return the batch without words and the answer's call; with the answer once it is whole."""
        out: Batch = []
        for event in batch:
            match event:
                case TextDelta(text=text):
                    self._write(text, self._words)
                case ToolCallDelta() if self._is_answer(event):
                    self._write(event.arguments, self._answers[event.call_id])
                case ToolCallDelta():
                    self._has_calls = True
                    out.append(event)
                case Stop():
                    out += self._end(event)
                case _:
                    out.append(event)
        return out

    def _write(self, text: str, to: io.StringIO) -> None:
        self._room -= len(text)
        if self._room < 0:
            raise InvalidStructuredOutput(should_retry=False)
        to.write(text)

    def _is_answer(self, event: ToolCallDelta) -> bool:
        if event.name == self._tool:
            self._answers.setdefault(event.call_id, io.StringIO())
        return event.call_id in self._answers

    def _end(self, stop: Stop) -> Batch:
        words = self._words.getvalue()
        if self._has_calls:
            return [*self._said(words), stop]
        answers = [answer.getvalue() for answer in self._answers.values()] or [words]
        fitting = next((text for text in (fit(answer, self._schema) for answer in answers) if text is not None), None)
        if stop.reason in CUT_OFF and (fitting is None or not self._answers):
            return [*self._said(answers[0]), stop]  # the client learns why
        if fitting is None:
            return [Failure(InvalidStructuredOutput(should_retry=False))]
        return [TextDelta(fitting), Stop("end_turn")]

    @staticmethod
    def _said(text: str) -> Batch:
        return [TextDelta(text)] if text else []


def fit(answer: str, schema: Fitting | None) -> str | None:
    """Return the JSON of an answer that fits the schema, without the fence that models put around it; else None."""
    text = answer.strip()
    if text.startswith("```"):
        text = text.strip("`").lstrip(ascii_letters).strip()
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    return text if schema is None or schema.takes(document) else None


def answer_tool(output: OutputSchema, taken: Sequence[ClientTool]) -> ClientTool:
    """Return the tool by which an agent gives its answer, with a name that no other tool has."""
    names = {tool.name for tool in taken}
    name = next(name for name in (f"answer_{n}" if n else "answer" for n in range(len(names) + 1)) if name not in names)
    purpose = f" The answer: {output.description}" if output.description else ""
    return ClientTool(
        name,
        f"Give your final answer ({output.name}) by calling this tool, not in words.{purpose}",
        output.schema or ANY_OBJECT,
    )


def filters_of(ask: Ask, answering: ClientTool | None, *, shows_activity: bool) -> list[AnswerFilter]:
    """Return the filters that a request asks for, in order."""
    filters: list[AnswerFilter] = []
    if shows_activity:
        filters.append(ShownActivity())
    if answering is not None and ask.output is not None:
        filters.append(StructuredOutput(answering.name, ask.output))
    if not ask.parallel_calls:
        filters.append(OneCall())
    return filters


def _short(text: str) -> str:
    shown = " ".join(text[:MOST_SHOWN].split())
    return shown if len(text) <= MOST_SHOWN else shown + "..."
