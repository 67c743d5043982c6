"""The way round for agents and servers that take no tools of the client's: tools of Letta's own that wait for approval.

Such a tool never runs on Letta. It is named after its content, so that turns share it, attached for the turns that
offer it, and deleted after the last of them. What a crash left is cleaned when the gateway starts.
"""

import asyncio
import contextlib
import hashlib
import re
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Final

import letta_client
import msgspec
import structlog

from gateway.errors import AgentGone, GatewayError, UpstreamRejected
from gateway.letta.rest_ask import Ask, Raw, anything
from gateway.translation.agent_turn import ClientTool

TAG: Final = "letta-gateway-bridge"
LONGEST_NAME: Final = 64
PAGE: Final = 100
MOST_PAGES: Final = 100
STALE: Final = 3_600.0
"""Seconds after which a tool of another gateway's is taken for left behind: longer than any turn."""
SOURCE: Final = '''def {name}(**arguments):
    """Wait for the client to run this."""
    raise RuntimeError("Only the client can run this.")
'''

_not_in_names: Final = re.compile(r"\W", re.ASCII)
_log: Final = structlog.get_logger("gateway.letta")


class ToolRow(msgspec.Struct):
    """A tool on Letta."""

    id: str
    name: str = ""
    tags: list[str] | None = None


decode_tool: Final = msgspec.json.Decoder(ToolRow).decode
decode_tools: Final = msgspec.json.Decoder(list[ToolRow]).decode
_decode_schema: Final = msgspec.json.Decoder(dict[str, object]).decode


def bridge_name(tool: ClientTool) -> str:
    """Return the name of a tool on Letta: its own, as Python takes it, and the hash of what it is."""
    content = b"\0".join(
        (tool.name.encode(), tool.description.encode("utf-8", "surrogatepass"), bytes(tool.parameters))
    )
    mark = hashlib.blake2s(content, digest_size=5).hexdigest()
    plain = _not_in_names.sub("_", tool.name)[: LONGEST_NAME - len(mark) - 2]
    return f"{'_' if plain[:1].isdigit() else ''}{plain}_{mark}"


class _Made:
    """A tool that exists; ``turns`` counts those that offer it, by agent."""

    def __init__(self, tool_id: str) -> None:
        self.id = tool_id
        self.turns: Counter[str] = Counter()


class Loan:
    """The tools of one turn, attached until they are given back."""

    def __init__(self, bridge: "Bridge", agent_id: str) -> None:
        self._bridge = bridge
        self._agent_id = agent_id
        self.names: list[str] = []

    async def give_back(self) -> None:
        """Detach what no other turn offers; what fails is logged, and cleaned before the next loan."""
        names, self.names = self.names, []
        await self._bridge.take_back(self._agent_id, names)


class Bridge:
    """The tools that stand for the client's, of all agents."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask) -> None:
        self._control = control
        self._ask = ask
        self._made: dict[str, _Made] = {}
        self._host = hashlib.blake2s(socket.gethostname().encode(), digest_size=6).hexdigest()
        # One for all: Letta keeps which tools wait for approval in one field of the agent, and overlapping changes of
        # it are lost (0.16.8), which would have a tool run there.
        self._lock = asyncio.Lock()
        self._is_clean = False

    async def lend(self, loan: Loan, agent_id: str, tools: Sequence[ClientTool]) -> None:
        """Attach tools to an agent; what was attached before a failure is the loan's to give back."""
        async with self._lock:
            if not self._is_clean:
                await self._clean()
            for tool in tools:
                name = bridge_name(tool)
                await self._attach(agent_id, name, tool)
                loan.names.append(name)

    async def take_back(self, agent_id: str, names: Sequence[str]) -> None:
        """Detach the tools that no other turn of the agent offers, and delete those that no turn offers at all."""
        async with self._lock:
            for name in names:
                made = self._made[name]
                made.turns[agent_id] -= 1
                if not made.turns[agent_id]:
                    del made.turns[agent_id]
                    await self._detach(agent_id, name, made.id)
                if not made.turns:
                    del self._made[name]
                    await self._quietly(self._delete(made.id))

    async def clean_up(self) -> None:
        """Delete the tools that a crash of this gateway, or one of another long ago, has left."""
        async with self._lock:
            await self._clean()

    async def _clean(self) -> None:
        in_use = {made.id for made in self._made.values()}
        left = [row for row in await self._all_tools() if self._is_left(row) and row.id not in in_use]
        self._is_clean = True
        for row in left:
            await self._quietly(self._delete(row.id))

    def _is_left(self, row: ToolRow) -> bool:
        for tag in row.tags or ():
            kind, _, rest = tag.partition(":")
            host, _, since = rest.partition(":")
            if kind == TAG and since.isdecimal():
                return host == self._host or time.time() - int(since) > STALE
        return False

    async def _all_tools(self) -> list[ToolRow]:
        rows: dict[str, ToolRow] = {}
        after: str | letta_client.Omit = letta_client.omit
        for _ in range(MOST_PAGES):
            page = await self._ask(self._list(after), decode_tools)
            known = len(rows)
            rows.update((row.id, row) for row in page)
            if len(page) < PAGE or len(rows) == known:
                break
            after = page[-1].id
        return list(rows.values())

    async def _attach(self, agent_id: str, name: str, tool: ClientTool) -> None:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = _Made((await self._ask(self._upsert(name, tool), decode_tool)).id)
        if not made.turns[agent_id]:
            try:
                await self._ask(self._attach_tool(agent_id, made.id), anything)
            except AgentGone:  # the tool may be: somebody deleted it
                made.id = (await self._ask(self._upsert(name, tool), decode_tool)).id
                await self._ask(self._attach_tool(agent_id, made.id), anything)
        made.turns[agent_id] += 1

    async def _detach(self, agent_id: str, name: str, tool_id: str) -> None:
        # The agent's rule that the tool waits for approval would stay.
        await self._quietly(self._forget_approval(agent_id, name))
        await self._quietly(self._detach_tool(agent_id, tool_id))

    async def _quietly(self, question: Coroutine[object, object, Raw]) -> None:
        try:
            with contextlib.suppress(AgentGone, UpstreamRejected):  # it is done already
                await self._ask(question, anything)
        except GatewayError as error:
            self._is_clean = False
            _log.warning("tool of the bridge left behind", code=error.code)

    async def _upsert(self, name: str, tool: ClientTool) -> Raw:
        schema: dict[str, object] = {
            "name": name,
            "description": tool.description,
            "parameters": _decode_schema(tool.parameters),
        }
        return await self._control.tools.with_raw_response.upsert(
            source_code=SOURCE.format(name=name),
            json_schema=schema,
            description=tool.description,
            default_requires_approval=True,
            tags=[TAG, f"{TAG}:{self._host}:{int(time.time())}"],
        )

    async def _list(self, after: str | letta_client.Omit) -> Raw:
        return await self._control.tools.with_raw_response.list(after=after, limit=PAGE, tool_types=["custom"])

    async def _delete(self, tool_id: str) -> Raw:
        return await self._control.tools.with_raw_response.delete(tool_id)

    async def _attach_tool(self, agent_id: str, tool_id: str) -> Raw:
        return await self._control.agents.tools.with_raw_response.attach(tool_id, agent_id=agent_id)

    async def _detach_tool(self, agent_id: str, tool_id: str) -> Raw:
        return await self._control.agents.tools.with_raw_response.detach(tool_id, agent_id=agent_id)

    async def _forget_approval(self, agent_id: str, name: str) -> Raw:
        return await self._control.agents.tools.with_raw_response.update_approval(
            name, agent_id=agent_id, body_requires_approval=False
        )
