"""The prompts that agents are given, over Letta's REST API: with a client's instructions, and with memory as it is.

A client's instructions go beside the agent's prompt, in one request: Letta writes neither down, so that no other turn
sees them, however this one ends.

A change of a block reaches an agent's own thread by itself; a conversation keeps the prompt that it began with until
that is compiled again, which takes a fifth of a second (letta 0.16.8). That is done behind the answer to whoever
changed the block, and before a turn that comes first.
"""

import asyncio
import contextlib
from typing import Final

import letta_client
import msgspec
import structlog

from gateway.errors import AgentGone, GatewayError, UpstreamRejected
from gateway.letta.rest_ask import Ask, Raw, anything
from gateway.letta.wire import ConversationRow
from gateway.tasks import TaskSet

OVERLAID: Final = """{prompt}

<client_instructions>
Instructions of the client through which you are spoken to. They hold for this turn.

{text}
</client_instructions>
"""
PAGE: Final = 100
MOST_PAGES: Final = 100

_log: Final = structlog.get_logger("gateway.letta")
_decode: Final = msgspec.json.Decoder(list[ConversationRow]).decode
_decode_prompt: Final = msgspec.json.Decoder(str).decode


class Prompts:
    """The prompts of agents and of their conversations; raises what ``Ask`` raises."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask, tasks: TaskSet) -> None:
        self._control = control
        self._ask = ask
        self._tasks = tasks
        self._outdated: dict[str, None] = {}
        self._at_work: str | None = None
        self._lock = asyncio.Lock()
        self._is_running = False

    async def overlaid(self, agent_id: str, text: str) -> str:
        """Return an agent's prompt as it is, with a client's instructions behind it."""
        return OVERLAID.format(prompt=await self._ask(self._compiled(agent_id), _decode_prompt), text=text)

    async def outdate(self, agent_id: str) -> None:
        """Have all of an agent's conversations see its memory as it is, those with the newest messages first."""
        after: str | letta_client.Omit = letta_client.omit
        for _ in range(MOST_PAGES):
            page = await self._ask(self._list(agent_id, after), _decode)
            self._outdated.update((row.id, None) for row in page)
            if len(page) < PAGE:
                break
            after = page[-1].id
        if self._outdated and not self._is_running:
            self._is_running = True
            self._tasks.spawn(self._run(), "compile prompts")

    async def see_current(self, conversation_id: str) -> None:
        """Have a conversation see its agent's memory as it is, before a turn."""
        if conversation_id in self._outdated or conversation_id == self._at_work:
            await self._compile(conversation_id)

    async def _run(self) -> None:
        try:
            while self._outdated:
                await self._compile(next(iter(self._outdated)))
        except GatewayError as error:  # those that are left are compiled before their next turns
            _log.warning("conversations keep an older memory for now", number=len(self._outdated), code=error.code)
        finally:
            self._is_running = False

    async def _compile(self, conversation_id: str) -> None:
        async with self._lock:
            if conversation_id not in self._outdated:
                return  # it was seen to while this waited
            del self._outdated[conversation_id]  # and not afterwards: the memory may change meanwhile
            self._at_work = conversation_id
            try:
                with contextlib.suppress(AgentGone, UpstreamRejected):  # it is gone, or the server does it by itself
                    await self._ask(self._recompile(conversation_id), anything)
            except BaseException:
                self._outdated[conversation_id] = None
                raise
            finally:
                self._at_work = None

    async def _list(self, agent_id: str, after: str | letta_client.Omit) -> Raw:
        return await self._control.conversations.with_raw_response.list(
            agent_id=agent_id, after=after, limit=PAGE, order="desc", order_by="last_message_at"
        )

    async def _compiled(self, agent_id: str) -> Raw:
        return await self._control.agents.with_raw_response.recompile(agent_id, dry_run=True)

    async def _recompile(self, conversation_id: str) -> Raw:
        return await self._control.conversations.with_raw_response.recompile(conversation_id)
