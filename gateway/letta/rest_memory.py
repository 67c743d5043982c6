"""An agent's memory over Letta's REST API: its blocks."""

from typing import Final

import letta_client
import msgspec

from gateway.errors import AgentGone, InvalidRequest, MemoryNotFound
from gateway.letta.backend import MemoryBlock
from gateway.letta.rest_ask import Ask, Raw
from gateway.letta.rest_prompts import Prompts

MOST_BLOCKS: Final = 1_000


class MemoryRow(msgspec.Struct):
    """A memory block."""

    label: str | None = None
    value: str = ""
    description: str | None = None
    limit: int | None = None
    read_only: bool = False

    def block(self) -> MemoryBlock:
        """Return the block."""
        return MemoryBlock(self.label or "", self.value, self.description, self.limit, self.read_only)


_decode_row: Final = msgspec.json.Decoder(MemoryRow).decode
_decode_rows: Final = msgspec.json.Decoder(list[MemoryRow]).decode


class LettaMemory:
    """The memory of agents; raises what ``Ask`` raises."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask, prompts: Prompts) -> None:
        self._control = control
        self._ask = ask
        self._prompts = prompts

    async def blocks(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's blocks, in the order of labels; raises ``AgentGone``."""
        rows = await self._ask(self._list(agent_id), _decode_rows)
        own = (row.block() for row in rows if row.label)
        return tuple(sorted(own, key=lambda block: block.label))

    async def write(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace what a block says; raises ``AgentGone``, ``MemoryNotFound`` and ``InvalidRequest``."""
        known = next((block for block in await self.blocks(agent_id) if block.label == label), None)
        if known is None:
            raise MemoryNotFound
        # Letta itself lets a text through that is longer (0.16.8).
        if known.limit is not None and len(value) > known.limit:
            raise InvalidRequest(f"This memory block takes at most {known.limit} characters.", param="value")
        try:
            written = (await self._ask(self._update(agent_id, label, value), _decode_row)).block()
        except AgentGone as error:  # the block was deleted just now, or the agent with it
            raise MemoryNotFound from error
        await self._prompts.outdate(agent_id)
        return written

    async def _list(self, agent_id: str) -> Raw:
        return await self._control.agents.blocks.with_raw_response.list(agent_id, limit=MOST_BLOCKS)

    async def _update(self, agent_id: str, label: str, value: str) -> Raw:
        return await self._control.agents.blocks.with_raw_response.update(label, agent_id=agent_id, value=value)
