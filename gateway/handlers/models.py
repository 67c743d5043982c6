"""``GET /v1/models``: every agent is a model."""

from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.letta.backend import Agent
from gateway.translation.openai_types import Model, ModelList

_encode: Final = msgspec.json.Encoder().encode


async def list_models(request: web.Request) -> web.Response:
    """Answer all agents as models."""
    models = await request.app[keys.CATALOG].models()
    data = [_model(model, agent) for model, agent in models.by_model.items()]
    return web.Response(body=_encode(ModelList("list", data)), content_type="application/json")


async def retrieve(request: web.Request) -> web.Response:
    """Answer one agent, by its model id or its agent id."""
    model = request.match_info["model"]
    agent = await request.app[keys.CATALOG].resolve(model)
    return web.Response(body=_encode(_model(model, agent)), content_type="application/json")


def _model(model: str, agent: Agent) -> Model:
    return Model(model, "model", agent.created, "letta")
