"""Which agents a caller sees: users their own alone, everybody else those of the catalog."""

from aiohttp import web

from gateway import keys
from gateway.errors import AgentGone, ModelNotFound
from gateway.letta.backend import Agent


async def agent_of(app: web.Application, caller: keys.Caller, model: str) -> Agent:
    """Return the agent that a model names; raises ``ModelNotFound`` for another user's as for one that is not."""
    if caller.user_id is None:
        return await app[keys.CATALOG].resolve(model)
    try:
        own = await app[keys.OWN_AGENTS].of(caller.user_id)
    except AgentGone as error:
        raise ModelNotFound(model) from error
    if model not in (own.id, own.name):
        raise ModelNotFound(model)
    return own


async def agents_of(app: web.Application, caller: keys.Caller) -> dict[str, Agent]:
    """Return the agents that a caller sees, by their models' names."""
    if caller.user_id is None:
        return (await app[keys.CATALOG].models()).by_model
    try:
        own = await app[keys.OWN_AGENTS].of(caller.user_id)
    except AgentGone:
        return {}
    return {own.name: own}


def forget(app: web.Application, caller: keys.Caller) -> None:
    """Ask Letta again: it said that an agent is gone."""
    if caller.user_id is None:
        app[keys.CATALOG].forget()
