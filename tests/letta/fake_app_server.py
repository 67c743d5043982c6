"""An App Server that writes down its commands and answers them as it is told, by default as a quick, healthy one does.

::

    async with FakeAppServer() as server:
        server.on("input", turn(says("Hi"), finished()), recorded("2-text-turn", "m2"))   # in order; the last one stays
        ...
        assert server.asked("input")[0]["payload"]["client_tool_allowlist"] == []

An ``Answer`` is a coroutine function of the ``Exchange``; each command is answered by a task of its own, so that a turn
can be aborted while it says something. Frames look as letta 0.34.12 writes them; ``tests/data/app_server`` holds some.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from aiohttp import ClientError, WSMsgType, web

from gateway.letta.app_server_wire import THREAD

FOLDER: Final = Path(__file__).parent.parent / "data" / "app_server"
AGENT: Final = "agent-local-00000000-0000-4000-8000-000000000001"
OTHER: Final = "agent-local-00000000-0000-4000-8000-000000000002"
NAMES: Final = {AGENT: "friend", OTHER: "scholar"}
THREADS: Final = {AGENT: "local-conv-1", OTHER: "local-conv-2"}
"""Each agent has its thread already, and every conversation of its own."""
HOME: Final = "/home/letta/.letta/lc-local-backend"
MODELS: Final = ("lmstudio/scripted-model", "lmstudio/other-model")
SOON: Final = 5.0

Fields: TypeAlias = dict[str, Any]


class Exchange:
    """One command, and the connection on which it came; events that are sent belong to its runtime."""

    def __init__(self, server: "FakeAppServer", ws: web.WebSocketResponse, command: Fields) -> None:
        self.server = server
        self.command = command
        self.runtime: Fields = command.get("runtime") or {
            name: command.get(name) for name in ("agent_id", "conversation_id")
        }
        self._ws = ws

    @property
    def conversation(self) -> tuple[str, str]:
        """Name the runtime."""
        return self.runtime["agent_id"], self.runtime["conversation_id"]

    async def raw(self, data: str | bytes) -> None:
        """Send something, whatever it is."""
        if isinstance(data, str):
            await self._ws.send_str(data)
        else:
            await self._ws.send_bytes(data)

    async def frame(self, kind: str, **fields: Any) -> None:
        """Send a frame."""
        await self.raw(json.dumps({"type": kind, **fields}))

    async def reply(self, **fields: Any) -> None:
        """Reply to the command."""
        request = self.command["request_id"]
        await self.frame(f"{self.command['type']}_response", **{"request_id": request, "success": True, **fields})

    async def event(self, kind: str, **fields: Any) -> None:
        """Send an event of the runtime."""
        await self.frame(kind, **{"runtime": self.runtime, "event_seq": next(self.server.numbers), **fields})

    async def close(self) -> None:
        """Close the connection as the protocol has it."""
        await self._ws.close()

    def cut(self) -> None:
        """Break the connection."""
        cut(self._ws)

    def garbage(self) -> None:
        """Send bytes that are no WebSocket frame."""
        transport = _transport(self._ws)
        assert transport is not None
        transport.write(b"\xff" * 8)


Answer: TypeAlias = Callable[[Exchange], Awaitable[None]]
Step: TypeAlias = Answer
"""A piece of an answer."""


# Steps ---------------------------------------------------------------------------------------------------------------


def accepted(disposition: str | None = "started", *, accepted: bool = True, error: str | None = None) -> Step:
    """Accept the input, or refuse it."""

    async def step(exchange: Exchange) -> None:
        fields = {"accepted": accepted, "disposition": disposition, "error": error}
        told = {name: value for name, value in fields.items() if value is not None}
        await exchange.frame(
            "input_accepted", request_id=exchange.command["request_id"], runtime=exchange.runtime, **told
        )

    return step


def delta(message_type: str, **fields: Any) -> Step:
    """Send one message of the turn."""

    async def step(exchange: Exchange) -> None:
        message = {"type": "message", "message_type": message_type, "run_id": "local-run-1", **fields}
        await exchange.event("stream_delta", delta=message)

    return step


def event(kind: str, **fields: Any) -> Step:
    """Send an event of the runtime, or of another one where the fields name it."""

    async def step(exchange: Exchange) -> None:
        await exchange.event(kind, **fields)

    return step


def says(text: str, message: str = "ui-msg-1") -> Step:
    """Send a piece of the agent's text."""
    return delta("assistant_message", id=message, content=[{"type": "text", "text": text}])


def usage(prompt: int, completion: int, cached: int = 0) -> Step:
    """Send the token counts of a step."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return delta("usage_statistics", **counts, cached_input_tokens=cached, reasoning_tokens=0)


def stop(reason: str) -> Step:
    """Send the stop reason of a step."""
    return delta("stop_reason", stop_reason=reason)


def finished(reason: str = "end_turn", error: str | None = None) -> Step:
    """End the turn."""
    return event("turn_finished", turn_id="turn-1", stop_reason=reason, **({} if error is None else {"error": error}))


def queued(item: str = "q-1") -> Step:
    """Let the input wait for another turn."""

    async def step(exchange: Exchange) -> None:
        exchange.server.queue[item] = exchange.command["request_id"]
        await accepted("queued")(exchange)
        await exchange.event("update_queue", queue=_queue(exchange.server), removed=[])

    return step


def unqueued(item: str = "q-1", disposition: str = "dequeued") -> Step:
    """Let the input wait no longer."""

    async def step(exchange: Exchange) -> None:
        request = exchange.server.queue.pop(item, None)
        removed = [{"client_message_id": request, "disposition": disposition}] if request else []
        await exchange.event("update_queue", queue=_queue(exchange.server), removed=removed)

    return step


def call(call_id: str, name: str, arguments: str = "{}") -> Step:
    """Let the agent call a tool."""
    return delta("approval_request_message", tool_call={"tool_call_id": call_id, "name": name, "arguments": arguments})


def checked(allowed: tuple[str, ...], refused: tuple[str, ...] = ()) -> Step:
    """Tell which of a step's calls run."""
    sorts = {"auto_allowed_tool_call_ids": allowed, "auto_denied_tool_call_ids": refused}
    return script(stop("requires_approval"), delta("approval_classification_end", **sorts))


def returned(call_id: str, text: str, status: str = "success") -> Step:
    """Tell what a call gave back."""
    return delta("tool_return_message", tool_call_id=call_id, tool_return=text, status=status)


def asks(call_id: str, name: str, arguments: Fields | None = None) -> Step:
    """Ask for the result of a call, and wait until it is there."""

    async def step(exchange: Exchange) -> None:
        request = f"external-tool-{next(exchange.server.numbers)}"
        result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        exchange.server.pending[request] = call_id, result
        await exchange.event(
            "external_tool_call_request",
            request_id=request,
            scope_id="client",
            tool_call_id=call_id,
            tool_name=name,
            input=arguments or {},
        )
        await result

    return step


def tool_step(**calls: str) -> Step:
    """Let the agent call tools, by the ids of their calls, and wait for all results, one after the other."""
    return script(
        *(call(call_id, name) for call_id, name in calls.items()),
        usage(50, 5),
        checked(tuple(calls)),
        *(asks(call_id, name) for call_id, name in calls.items()),
        *(returned(call_id, "told again") for call_id in calls),
    )


def raw(data: str | bytes) -> Step:
    """Send something, whatever it is."""

    async def step(exchange: Exchange) -> None:
        await exchange.raw(data)

    return step


def wait(event: asyncio.Event) -> Step:
    """Wait for the test's word."""

    async def step(_: Exchange) -> None:
        await event.wait()

    return step


async def hang(_: Exchange) -> None:
    """Say nothing more, until the turn is aborted."""
    await asyncio.get_running_loop().create_future()


async def close(exchange: Exchange) -> None:
    """Close the connection as the protocol has it."""
    await exchange.close()


async def garbage(exchange: Exchange) -> None:
    """Send bytes that are no WebSocket frame."""
    exchange.garbage()


async def cut_off(exchange: Exchange) -> None:
    """Break the connection."""
    exchange.cut()


async def _take_result(exchange: Exchange) -> None:
    pending = exchange.server.pending.pop(exchange.command["request_id"], None)
    if pending is None:
        return
    call_id, waiting = pending
    result = exchange.command["result"]
    exchange.server.results[call_id] = (result["content"][0]["text"], result.get("is_error", False))
    if not waiting.done():
        waiting.set_result(None)


# Answers -------------------------------------------------------------------------------------------------------------


def script(*steps: Step) -> Answer:
    """Do one after the other."""

    async def answer(exchange: Exchange) -> None:
        for step in steps:
            await step(exchange)

    return answer


def turn(*steps: Step) -> Answer:
    """Accept the input and go on so."""
    return script(accepted(), *steps)


def replies(**fields: Any) -> Answer:
    """Reply so."""

    async def answer(exchange: Exchange) -> None:
        await exchange.reply(**fields)

    return answer


def recorded(name: str, request_id: str) -> Answer:
    """Answer with the frames that were recorded after a command, as if they were meant for this one."""
    command, frames = _recording(name, request_id)
    was: Fields = command.get("runtime") or {}

    async def answer(exchange: Exchange) -> None:
        names = {request_id: exchange.command["request_id"]}
        names |= {old: exchange.runtime[name] for name, old in was.items()}
        for frame in frames:
            await exchange.raw(json.dumps(_renamed(frame, names)))

    return answer


def recorded_after_result(name: str, request_id: str, asked: str) -> Answer:
    """Answer a result with the frames recorded after it; ``asked`` is the input of the turn that they belong to."""
    was = _recording(name, asked)[0]["runtime"]
    _, frames = _recording(name, request_id)

    async def answer(exchange: Exchange) -> None:
        names = dict(zip(was.values(), exchange.server.asked("input")[-1]["runtime"].values(), strict=True))
        for frame in frames:
            await exchange.raw(json.dumps(_renamed(frame, names)))

    return answer


def frames_of(name: str) -> list[Fields]:
    """Return every frame of a recording; the listing of models was cut short when it was recorded."""
    return [json.loads(line[2:]) for line in _lines(name) if line.startswith("< ") and line.endswith("}")]


def _lines(name: str) -> list[str]:
    return (FOLDER / f"{name}.jsonl").read_text("utf-8").split("\n")


def _recording(name: str, request_id: str) -> tuple[Fields, list[Fields]]:
    command: Fields = {}
    frames: list[Fields] = []
    for line in _lines(name):
        if line.startswith("> {") and '"type"' in line:
            if command:
                break
            asked = json.loads(line[2:])
            command = asked if asked["request_id"] == request_id else {}
        elif line.startswith("< ") and command:
            frames.append(json.loads(line[2:]))
    assert frames, (name, request_id)
    return command, frames


def _renamed(value: Any, names: Fields) -> Any:
    match value:
        case dict():
            return {key: _renamed(inner, names) for key, inner in value.items()}
        case list():
            return [_renamed(inner, names) for inner in value]
        case str():
            return names.get(value, value)
        case _:
            return value


def _queue(server: "FakeAppServer") -> list[Fields]:
    return [{"id": item, "client_message_id": request, "kind": "message"} for item, request in server.queue.items()]


WELL: Final = turn(says("Hel"), says("lo"), usage(100, 20), stop("end_turn"), finished())
"""A whole turn."""


# What a healthy server does -------------------------------------------------------------------------------------------


async def _list_agents(exchange: Exchange) -> None:
    query = exchange.command["query"]
    wanted, tags = query.get("query_text", "").lower(), {*query.get("tags", ())}
    agents = [row for row in exchange.server.agents.values() if tags <= {*row["tags"]}]
    rows = [row for row in agents if wanted in f"{row['id']} {row['name']}".lower()]
    ids = [row["id"] for row in rows]
    first = ids.index(query["after"]) + 1 if "after" in query else 0
    await exchange.reply(agents=rows[first : first + query["limit"]])


async def _create_agent(exchange: Exchange) -> None:
    agents = exchange.server.agents
    row = agent_row(f"agent-local-{len(agents)}", **exchange.command["body"])
    agents[row["id"]] = row
    await exchange.reply(agent=row)


async def _delete_agent(exchange: Exchange) -> None:
    wanted = exchange.command["agent_id"]
    if exchange.server.agents.pop(wanted, None) is None:
        await exchange.reply(success=False, agent_id=wanted, error=f"Agent {wanted} not found")
    else:
        await exchange.reply(agent_id=wanted)


async def _list_memory(exchange: Exchange) -> None:
    """List an agent's files, five at a time, and none of an agent that is not there."""
    files = exchange.server.memory.get(exchange.command["agent_id"], {})
    entries = [_memory_entry(path, content) for path, content in files.items()]
    pages = [entries[first : first + 5] for first in range(0, len(entries), 5)] or [[]]
    for page in pages:
        await exchange.reply(entries=page, done=page is pages[-1], total=len(entries))


def _memory_entry(path: str, content: str) -> Fields:
    _, fence, body = content.removeprefix("---\n").partition("\n---\n")
    described = re.search(r"^description: (.*)$", content, re.MULTILINE)
    description = described[1] if described and fence else None
    return {"relative_path": path, "content": body if fence else content, "description": description}


async def _read_memory_file(exchange: Exchange) -> None:
    files = exchange.server.memory.get(exchange.command["agent_id"], {})
    content = files.get(exchange.command["path"])
    await exchange.reply(success=content is not None, content=content, error=content and "ENOENT")


async def _write_memory_file(exchange: Exchange) -> None:
    path, content = exchange.command["path"], exchange.command["content"]
    exchange.server.memory.setdefault(exchange.command["agent_id"], {})[path] = content
    is_valid = content.startswith("---\n")
    await exchange.reply(success=is_valid, error=None if is_valid else "missing frontmatter (must start with ---)")


async def _enable_memory(exchange: Exchange) -> None:
    await exchange.reply(memory_directory=f"{HOME}/memfs/{exchange.command['agent_id']}/memory")


async def _read_file(exchange: Exchange) -> None:
    content = exchange.server.files.get(exchange.command["path"])
    await exchange.reply(success=content is not None, content=content)


async def _retrieve_conversation(exchange: Exchange) -> None:
    wanted = exchange.command["conversation_id"]
    found = next((row for row in exchange.server.conversations if row["id"] == wanted), None)
    await exchange.reply(success=found is not None, conversation=found)


async def _update_agent(exchange: Exchange) -> None:
    agent = exchange.server.agents[exchange.command["agent_id"]]
    agent |= exchange.command["body"]
    await exchange.reply(agent=agent)


async def _list_conversations(exchange: Exchange) -> None:
    query = exchange.command["query"]
    wanted = query.get("summary_search", "").lower()
    rows = [row for row in exchange.server.conversations if wanted in (row["summary"] or "").lower()]
    await exchange.reply(conversations=rows[: query["limit"]])


async def create_conversation(exchange: Exchange) -> None:
    """Make a conversation."""
    body, rows = exchange.command["body"], exchange.server.conversations
    if body["agent_id"] not in exchange.server.agents:
        await exchange.reply(success=False, conversation=None, error=f"Agent {body['agent_id']} not found")
        return
    rows.append(conversation_row(f"local-conv-new-{len(rows)}", **body))
    await exchange.reply(conversation=rows[-1])


async def _fork_conversation(exchange: Exchange) -> None:
    wanted, rows = exchange.command["conversation_id"], exchange.server.conversations
    for row in rows:
        if row["id"] == wanted:
            rows.append({**row, "id": f"local-conv-fork-{len(rows)}", "created_at": f"{row['created_at']}-later"})
            await exchange.reply(conversation={"id": rows[-1]["id"]})
            return
    await exchange.reply(success=False, conversation=None, error=f"Conversation {wanted} not found")


async def _start_runtime(exchange: Exchange) -> None:
    agent_id, wanted = exchange.command["agent_id"], exchange.command["conversation_id"]
    if agent_id not in exchange.server.agents:
        await exchange.reply(success=False, runtime=None, error=f"Agent {agent_id} not found")
    elif all(row["id"] != wanted for row in exchange.server.conversations):
        await exchange.reply(success=False, runtime=None, error=f"Conversation {wanted} not found")
    else:
        await exchange.reply(runtime={"agent_id": agent_id, "conversation_id": wanted})


async def _update_conversation(exchange: Exchange) -> None:
    wanted = exchange.command["conversation_id"]
    for row in exchange.server.conversations:
        if row["id"] == wanted:
            row.update(exchange.command["body"])
            await exchange.reply(conversation=row)
            return
    await exchange.reply(success=False, conversation=None, error=f"Conversation {wanted} not found")


async def _retrieve_agent(exchange: Exchange) -> None:
    wanted = exchange.command["agent_id"]
    agent = exchange.server.agents.get(wanted)
    if agent is None:
        await exchange.reply(success=False, agent=None, error=f"Agent {wanted} not found")
    else:
        await exchange.reply(agent=agent)


async def _abort(exchange: Exchange) -> None:
    if exchange.server.pending:  # the real one waits ten seconds for the result
        await exchange.reply(runtime=exchange.runtime, aborted=True)
        return
    running = exchange.server.running.pop(exchange.conversation, None)
    if running is not None:
        running.cancel()
    await exchange.reply(runtime=exchange.runtime, aborted=running is not None)
    if running is not None:
        await finished("cancelled")(exchange)


async def _remove(exchange: Exchange) -> None:
    item = exchange.command["item_id"]
    await exchange.reply(success=item in exchange.server.queue, item_id=item)
    await unqueued(item, "cancelled")(exchange)


def agent_row(agent_id: str, name: str, **fields: Any) -> Fields:
    """Return an agent as it is listed."""
    row = {"id": agent_id, "name": name, "description": None, "model": MODELS[0], "system": "Be kind."}
    return {**row, "tools": [], "tags": [], **fields}


def conversation_row(conversation_id: str, agent_id: str, summary: str | None, created_at: str = "2026") -> Fields:
    """Return a conversation as it is listed."""
    return {"id": conversation_id, "agent_id": agent_id, "summary": summary, "created_at": created_at}


_DEFAULTS: Final[dict[str, Answer]] = {
    "app_server_info": replies(backend="local", letta_code_version="0.34.12", protocol_version=1),
    "list_models": replies(entries=[{"id": handle, "handle": handle} for handle in MODELS]),
    "agent_list": _list_agents,
    "agent_create": _create_agent,
    "agent_delete": _delete_agent,
    "agent_retrieve": _retrieve_agent,
    "agent_update": _update_agent,
    "conversation_create": create_conversation,
    "conversation_fork": _fork_conversation,
    "conversation_list": _list_conversations,
    "conversation_update": _update_conversation,
    "conversation_retrieve": _retrieve_conversation,
    "list_memory": _list_memory,
    "read_memory_file": _read_memory_file,
    "write_memory_file": _write_memory_file,
    "enable_memfs": _enable_memory,
    "read_file": _read_file,
    "external_tool_call_response": _take_result,
    "runtime_external_tools_update": replies(),
    "runtime_start": _start_runtime,
    "input": WELL,
    "abort_message": _abort,
    "remove_queue_item": _remove,
}


# The server ----------------------------------------------------------------------------------------------------------


def cut(ws: web.WebSocketResponse) -> None:
    """Break a connection."""
    transport = _transport(ws)
    if transport is not None:
        transport.abort()


def _transport(ws: web.WebSocketResponse) -> asyncio.Transport | None:
    writer = ws._writer
    return None if writer is None else writer.transport


class FakeAppServer:
    """Listens for as long as the context; ``commands`` came in this order, ``connections`` were made so far.

    ``refuses`` is the status of handshakes while it is set, ``door`` holds them up while it is clear. Commands of kinds
    that it does not know are ignored without a word, as by the real one.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.refuses: int | None = None
        self.door = asyncio.Event()
        self.door.set()
        self.agents = {agent_id: agent_row(agent_id, name) for agent_id, name in NAMES.items()}
        self.conversations = [conversation_row(thread, agent_id, THREAD) for agent_id, thread in THREADS.items()]
        self.queue: dict[str, str] = {}
        self.running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.pending: dict[str, tuple[str, asyncio.Future[None]]] = {}
        """The requests for results that are not answered yet."""
        self.results: dict[str, tuple[str, bool]] = {}
        """What the calls gave back, and whether that is an error."""
        self.memory: dict[str, dict[str, str]] = {}
        """The files of agents' memories, by their paths."""
        self.files: dict[str, str] = {}
        """The files of the server's machine."""
        self.commands: list[Fields] = []
        self.connections = 0
        self.port = 0
        self.numbers = itertools.count(1)
        self._answers = {kind: deque([answer]) for kind, answer in _DEFAULTS.items()}
        self._sockets: set[web.WebSocketResponse] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        """Listen."""
        app = web.Application()
        app.router.add_get("/ws", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=1_000)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Listen no more, and drop what is open."""
        await self.stop()

    @property
    def url(self) -> str:
        """Return where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        """Count the connections that are alive."""
        return len(self._sockets)

    def on(self, kind: str, *answers: Answer) -> None:
        """Answer commands of a kind with these, in order; the last one stays."""
        self._answers[kind] = deque(answers)

    def asked(self, kind: str) -> list[Fields]:
        """Return the commands of a kind."""
        return [command for command in self.commands if command["type"] == kind]

    def cut(self) -> None:
        """Break every connection."""
        for ws in self._sockets:
            cut(ws)

    def freeze(self) -> None:
        """Read nothing more from the connections that are open, as a server that hangs."""
        for ws in self._sockets:
            transport = _transport(ws)
            if transport is not None:
                transport.pause_reading()

    async def stop(self) -> None:
        """Listen no more, and drop what is open."""
        for task in self._tasks:
            task.cancel()
        self.pending.clear()
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        await self.door.wait()
        if self.refuses is not None:
            raise _Refused(self.refuses)
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPUnauthorized
        ws = web.WebSocketResponse(compress=False, max_msg_size=0)
        await ws.prepare(request)
        self.connections += 1
        self._sockets.add(ws)
        try:
            async for message in ws:
                if message.type is WSMsgType.TEXT:
                    self._take(ws, json.loads(message.data))
        finally:
            self._sockets.discard(ws)
        return ws

    def _take(self, ws: web.WebSocketResponse, command: Fields) -> None:
        self.commands.append(command)
        answers = self._answers.get(command["type"])
        if answers is None:
            return
        answer = answers.popleft() if len(answers) > 1 else answers[0]
        exchange = Exchange(self, ws, command)
        task = asyncio.get_running_loop().create_task(self._answer(answer, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if command["type"] == "input":
            before = self.running.get(exchange.conversation)
            if before is None or before.done():
                self.running[exchange.conversation] = task

    @staticmethod
    async def _answer(answer: Answer, exchange: Exchange) -> None:
        with contextlib.suppress(ClientError, OSError):  # the client is gone
            await answer(exchange)


class _Refused(web.HTTPException):
    def __init__(self, status: int) -> None:
        self.status_code = status
        super().__init__()


# What tests of it need -----------------------------------------------------------------------------------------------


async def until(so: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SOON):
        while not so():  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.002)


def sockets() -> set[str]:
    """Return the sockets that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is gone by now
            found.add(str(descriptor.readlink()))
    return {link for link in found if link.startswith("socket:")}


@asynccontextmanager
async def nothing_leaks() -> AsyncIterator[None]:
    """See that no socket, no task and no complaint is left at the end."""
    complaints: list[Fields] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    before = sockets()
    yield
    gc.collect(1)
    await until(lambda: sockets() <= before)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert complaints == []
