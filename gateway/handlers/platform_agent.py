"""``/api/v1/agent``: the user's own agent, what it remembers, and a fresh start."""

from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.accounts.answers import AgentAnswer, AgentStatus, MemoryAnswer, MemoryBlockAnswer, UserAnswer, user_answer
from gateway.accounts.errors import AgentMissing, InvalidToken
from gateway.accounts.profiles import Profile
from gateway.errors import AgentGone, InvalidRequest
from gateway.handlers.json_answers import json_answer
from gateway.letta.backend import MemoryBlock
from gateway.translation.content import storable
from gateway.translation.field_errors import decoded

MAX_VALUE: Final = 100_000
"""Characters of a memory block's text, whatever its own limit is on Letta."""


class MemoryChange(msgspec.Struct, frozen=True):
    """What a memory block is to hold."""

    value: str


_CHANGES: Final = msgspec.json.Decoder(MemoryChange)


async def status(request: web.Request) -> web.Response:
    """Answer whether the user has an agent, and what it is."""
    return json_answer(await _status(request, await profile_of(request)))


async def memory(request: web.Request) -> web.Response:
    """Answer what the user's agent has in its memory."""
    agent_id = await _agent_of(request)
    try:
        blocks = await request.app[keys.BACKEND].memory(agent_id)
    except AgentGone as error:
        raise AgentMissing from error
    return json_answer(MemoryAnswer(tuple(_block(block) for block in blocks)))


async def write_memory(request: web.Request) -> web.Response:
    """Replace the text of one of the agent's memory blocks."""
    change = decoded(_CHANGES, await request[keys.BODY].read())
    if len(change.value) > MAX_VALUE:
        raise InvalidRequest(f"'value' is longer than {MAX_VALUE} characters: shorten it.", param="value")
    agent_id, label = await _agent_of(request), request.match_info["label"]
    try:
        block = await request.app[keys.BACKEND].write_memory(agent_id, label, storable(change.value, "value"))
    except AgentGone as error:
        raise AgentMissing from error
    return json_answer(_block(block))


async def reset(request: web.Request) -> web.Response:
    """Give the user a fresh agent, which remembers nothing, and delete the one before; the history stays."""
    profile = await request.app[keys.PERSONAL_AGENTS].reset(await profile_of(request))
    return json_answer(await _status(request, profile))


async def profile_of(request: web.Request) -> Profile:
    """Return who asks; raises ``InvalidToken`` where they are gone since."""
    user_id = request[keys.CALLER].user_id
    profile = await request.app[keys.PROFILES].find(user_id) if user_id is not None else None
    if profile is None:
        raise InvalidToken
    return profile


async def user_of(request: web.Request, profile: Profile) -> UserAnswer:
    """Return a user as they see themselves."""
    return user_answer(profile, await request.app[keys.OWN_AGENTS].name_of(profile))


async def _agent_of(request: web.Request) -> str:
    """Return the id of the user's agent, made now where a registration could not."""
    profile = await request.app[keys.PERSONAL_AGENTS].ensure(await profile_of(request))
    if profile.letta_agent_id is None:
        raise AgentMissing
    return profile.letta_agent_id


async def _status(request: web.Request, profile: Profile) -> AgentStatus:
    agent_id, backend = profile.letta_agent_id, request.app[keys.BACKEND]
    if agent_id is None:
        return AgentStatus("missing")
    found = next((agent for agent in await backend.find_agents(agent_id) if agent.id == agent_id), None)
    if found is None:
        return AgentStatus("missing")
    try:
        details = await backend.details(agent_id)
    except AgentGone:
        return AgentStatus("missing")
    return AgentStatus("ready", AgentAnswer(agent_id, found.name, details.model, found.created or None, details.tools))


def _block(block: MemoryBlock) -> MemoryBlockAnswer:
    return MemoryBlockAnswer(block.label, block.value, block.description, block.limit, block.is_read_only)
