"""``GET /v1/models``: every agent is a model."""

import msgspec
from aiohttp import web

from gateway import keys
from gateway.errors import AgentGone, ModelNotFound
from gateway.handlers.agents import agent_of, agents_of, forget
from gateway.handlers.json_answers import json_answer
from gateway.letta.backend import Agent
from gateway.translation.openai_types import LettaAgent, Model, ModelList


async def list_models(request: web.Request) -> web.Response:
    """Answer the agents that the caller sees, as models."""
    agents = await agents_of(request.app, request[keys.CALLER])
    data = [_model(model, agent) for model, agent in agents.items()]
    return json_answer(ModelList("list", data))


async def retrieve(request: web.Request) -> web.Response:
    """Answer one agent, by its model id or its agent id, with what it is on Letta."""
    model, caller = request.match_info["model"], request[keys.CALLER]
    agent = await agent_of(request.app, caller, model)
    try:
        details = await request.app[keys.BACKEND].details(agent.id)
    except AgentGone as error:
        forget(request.app, caller)
        raise ModelNotFound(model) from error
    letta = LettaAgent(agent.id, details.description, details.model, details.tools)
    answer = msgspec.structs.replace(_model(model, agent), letta=letta)
    return json_answer(answer)


def _model(model: str, agent: Agent) -> Model:
    return Model(model, "model", agent.created, "letta")
