"""Overlays over Letta's REST API: a client's instructions in a read-only memory block, attached for a turn.

An agent sees what is attached once its system prompt is compiled again, which attaching and detaching leave to the
caller; a change of an attached block compiles it by itself (letta 0.16.8).
"""

import asyncio
import contextlib
import hashlib
from typing import Final

import letta_client
import msgspec

from gateway.errors import AgentGone, UpstreamInvalid, UpstreamTimeout, UpstreamUnavailable
from gateway.letta.rest_ask import Ask, Raw, anything
from gateway.translation.agent_turn import Overlay

LABEL: Final = "client_instructions"
TAG: Final = "letta-gateway-overlay"
DESCRIPTION: Final = "Instructions of the client through which you are spoken to. They hold for this turn."
TAKE_OFF_PAUSES: Final = (0.2, 1.0)
"""Seconds before each further try to take an overlay off: left on, it would speak to everybody."""
MOST_KNOWN: Final = 10_000
MOST_BLOCKS: Final = 1_000


class Mark(msgspec.Struct, frozen=True):
    """What is written on a block, so that it is found again: whose it is, and what it says."""

    key: str
    hash: str


class Metadata(msgspec.Struct):
    """The metadata of a block, as far as it is the gateway's."""

    letta_gateway: Mark | None = None


class BlockRow(msgspec.Struct):
    """A memory block."""

    id: str
    label: str | None = None
    metadata: Metadata | None = None

    @property
    def mark(self) -> Mark | None:
        """Return what the gateway has written on it."""
        return self.metadata.letta_gateway if self.metadata is not None else None


decode_block: Final = msgspec.json.Decoder(BlockRow).decode
decode_blocks: Final = msgspec.json.Decoder(list[BlockRow]).decode


class LettaBlocks:
    """What Letta does with blocks; raises ``AgentGone`` for whatever is not there."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask) -> None:
        self._control = control
        self._ask = ask

    async def attached(self, agent_id: str) -> list[BlockRow]:
        """Return the gateway's blocks that an agent has."""

        async def question() -> Raw:
            return await self._control.agents.blocks.with_raw_response.list(agent_id, limit=MOST_BLOCKS)

        return [row for row in await self._ask(question(), decode_blocks) if row.label == LABEL and row.mark]

    async def tagged(self, tag: str) -> list[BlockRow]:
        """Return the blocks of a tag."""

        async def question() -> Raw:
            return await self._control.blocks.with_raw_response.list(label=LABEL, tags=[tag])

        return await self._ask(question(), decode_blocks)

    async def create(self, tag: str, mark: Mark, text: str) -> BlockRow:
        """Make a block."""

        async def question() -> Raw:
            return await self._control.blocks.with_raw_response.create(
                label=LABEL,
                value=text,
                limit=_limit(text),
                description=DESCRIPTION,
                read_only=True,
                tags=[TAG, tag],
                metadata=_metadata(mark),
            )

        return await self._ask(question(), decode_block)

    async def change(self, block_id: str, mark: Mark, text: str) -> BlockRow:
        """Change what a block says."""

        async def question() -> Raw:
            return await self._control.blocks.with_raw_response.update(
                block_id, value=text, limit=_limit(text), metadata=_metadata(mark)
            )

        return await self._ask(question(), decode_block)

    async def attach(self, agent_id: str, block_id: str) -> None:
        """Let an agent have a block."""

        async def question() -> Raw:
            return await self._control.agents.blocks.with_raw_response.attach(block_id, agent_id=agent_id)

        await self._ask(question(), anything)

    async def detach(self, agent_id: str, block_id: str) -> None:
        """Take a block from an agent that may have it."""

        async def question() -> Raw:
            return await self._control.agents.blocks.with_raw_response.detach(block_id, agent_id=agent_id)

        with contextlib.suppress(AgentGone):
            await self._ask(question(), anything)

    async def recompile(self, agent_id: str) -> None:
        """Let an agent see what it has; servers that lack this do it by themselves."""

        async def question() -> Raw:
            return await self._control.agents.with_raw_response.recompile(agent_id)

        with contextlib.suppress(AgentGone):
            await self._ask(question(), anything)


class Overlays:
    """The overlays of all agents: one block for each agent and client, kept from turn to turn."""

    def __init__(self, blocks: LettaBlocks) -> None:
        self._blocks = blocks
        self._known: dict[str, BlockRow] = {}

    async def put_on(self, agent_id: str, overlay: Overlay) -> None:
        """Show an agent this overlay and no other one."""
        mark = Mark(_short_hash(f"{agent_id}\n{overlay.key}"), _short_hash(overlay.text))
        attached = await self._blocks.attached(agent_id)
        mine = next((row for row in attached if row.mark is not None and row.mark.key == mark.key), None)
        for row in attached:
            if row is not mine:
                await self._blocks.detach(agent_id, row.id)
        block = await self._block(mark, overlay.text, mine)
        if mine is None:
            await self._attach(agent_id, mark, overlay.text, block)
        if mine is None or len(attached) > 1:
            await self._blocks.recompile(agent_id)

    async def take_off(self, agent_id: str) -> None:
        """Show an agent no overlay, whoever left it; an agent that is gone has none."""
        with contextlib.suppress(AgentGone):
            for pause in TAKE_OFF_PAUSES:
                try:
                    await self._take_off(agent_id)
                except (UpstreamUnavailable, UpstreamTimeout, UpstreamInvalid):
                    await asyncio.sleep(pause)
                else:
                    return
            await self._take_off(agent_id)

    async def _take_off(self, agent_id: str) -> None:
        for row in await self._blocks.attached(agent_id):
            await self._blocks.detach(agent_id, row.id)
        await self._blocks.recompile(agent_id)  # also where nothing is attached: a try before may have got that far

    async def _attach(self, agent_id: str, mark: Mark, text: str, block: BlockRow) -> None:
        try:
            await self._blocks.attach(agent_id, block.id)
        except AgentGone:  # the block may be: somebody deleted it
            self._known.pop(mark.key, None)
            await self._blocks.attach(agent_id, (await self._block(mark, text, None)).id)

    async def _block(self, mark: Mark, text: str, mine: BlockRow | None) -> BlockRow:
        """Return the block that says this text: the one there is, changed where it says another."""
        tag = f"{TAG}-{mark.key}"
        known = mine or self._known.get(mark.key) or next(iter(await self._blocks.tagged(tag)), None)
        if known is None:
            return self._remember(mark, await self._blocks.create(tag, mark, text))
        if known.mark == mark:
            return self._remember(mark, known)
        try:
            return self._remember(mark, await self._blocks.change(known.id, mark, text))
        except AgentGone:  # somebody deleted it
            return self._remember(mark, await self._blocks.create(tag, mark, text))

    def _remember(self, mark: Mark, row: BlockRow) -> BlockRow:
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        known = self._known[mark.key] = BlockRow(row.id, LABEL, Metadata(mark))
        return known


def _limit(text: str) -> int:
    return max(len(text), 1)


def _metadata(mark: Mark) -> dict[str, object]:
    return {"letta_gateway": {"key": mark.key, "hash": mark.hash}}


def _short_hash(text: str) -> str:
    return hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
