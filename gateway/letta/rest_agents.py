"""Agents made and deleted over Letta's REST API, with a model provider of their own where they are to have one.

Letta takes an OpenAI-compatible server's models for one and the same, whoever registered it: their handles are all
``openai-proxy/...``, and an agent made by handle is answered for with the key of whoever came first. So an agent with a
provider of its own is made by an ``llm_config`` that names it, and is looked at before anybody speaks to it.

For the same reason a server's models stand under the name of one provider, mostly the first: the others' lists are
empty, and with it they would be gone for all, for good. And a list of all models has those of the fifty youngest
providers alone (all of this: letta 0.16.8).
"""

import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

import httpx
import letta_client
import msgspec
from letta_client import Omit, omit
from letta_client.types import CreateBlockParam
from letta_client.types.llm_config_param import LlmConfigParam

from gateway.errors import AgentGone, ConversationBusy, UpstreamInvalid, UpstreamRejected
from gateway.letta.backend import Agent, AgentSpec, MemoryBlock, ModelProvider
from gateway.letta.rest_ask import Ask, Raw, anything
from gateway.letta.rest_bridge import ToolRow, decode_tools
from gateway.letta.wire import AgentRow

PROXIED: Final = "openai-proxy/"
"""How handles of models begin whose server speaks OpenAI's API and is not OpenAI's."""
REMEMBERED: Final = 600.0
"""Seconds for which a provider's server is taken to have the models that it had."""
MOST_ASKED: Final = 5
"""Providers at one address whose models are asked for, oldest first: nearly always the first one has them all."""
BYOK: Final = "byok"
"""What Letta calls providers that are not the server's own."""
NO_KEY: Final = "deleted"
"""What is put in the place of a key: without any, Letta would use the server's own."""
CONTEXT_WINDOW: Final = 32_000
"""Tokens, for a model that Letta tells nothing of."""
SPEAKING_TOOL: Final = "send_message"
"""The tool by which agents of older types speak; one of the present type speaks by itself, and would do it twice."""
_NO_MODEL: Final = (
    "The Letta server does not offer this agent's model. The operator should connect its provider there, or set "
    "LETTA_GATEWAY_USER_MODEL to a model that the server lists."
)
_NOT_ITS_PROVIDER: Final = (
    "The Letta server would have had somebody else's model provider answer for this agent, which is deleted again. Is "
    "the server newer than this gateway?"
)
_STILL_ANOTHER_PROVIDER: Final = (
    "The Letta server has another model provider answer for this agent than it was told to. Is the server newer than "
    "this gateway?"
)


class ModelRow(msgspec.Struct):
    """A model that Letta offers; ``name`` is what its provider calls it."""

    handle: str
    name: str | None = None
    model_endpoint: str | None = None
    provider_name: str | None = None
    provider_category: str | None = None
    max_context_window: int | None = None


class ProviderRow(msgspec.Struct):
    """A model provider."""

    id: str
    name: str
    base_url: str | None = None


class ModelConfig(msgspec.Struct, frozen=True):
    """Who answers for an agent."""

    provider_name: str | None = None
    provider_category: str | None = None

    @property
    def own_provider(self) -> str | None:
        """Name the provider that is not the server's own."""
        return self.provider_name if self.provider_category == BYOK else None


class CreatedAgent(AgentRow, kw_only=True):
    """An agent that was made."""

    llm_config: ModelConfig = ModelConfig()


_decode_models: Final = msgspec.json.Decoder(list[ModelRow]).decode
_decode_providers: Final = msgspec.json.Decoder(list[ProviderRow]).decode
_decode_created: Final = msgspec.json.Decoder(CreatedAgent).decode


class _Found(msgspec.Struct, frozen=True):
    """The models of a server by their names, and until when they are taken to be these, by the clock."""

    until: float
    models: dict[str, ModelRow]


class _Whole:
    """An answer of letta-client's lower half, which reads it whole by itself."""

    def __init__(self, response: httpx.Response) -> None:
        self._body = response.content

    async def read(self) -> bytes:
        return self._body


class LettaAgents:
    """What Letta does with agents; raises what ``Ask`` raises."""

    def __init__(self, control: letta_client.AsyncLetta, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self._control = control
        self._ask = ask
        self._clock = clock
        self._found: dict[str, _Found] = {}

    async def create(self, spec: AgentSpec) -> Agent:
        """Make an agent; raises ``UpstreamRejected`` without its model, ``UpstreamInvalid`` with another's provider."""
        model, config = await self._answering(spec)
        tools = await self._tools(spec.tools)
        try:
            created = await self._ask(self._create(spec, model, config, tools), _decode_created)
        except AgentGone as error:  # Letta's 404 for a handle that it does not know
            raise UpstreamRejected(_NO_MODEL, should_retry=False) from error
        if spec.provider is not None and created.llm_config.provider_name != spec.provider.name:
            await self.delete(created.id)
            raise UpstreamInvalid(_NOT_ITS_PROVIDER, should_retry=False)
        return msgspec.structs.replace(created.agent(), tags=spec.tags)

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Have an agent be answered for by the spec's provider, or by the server's own; one that is stays so."""
        wanted = spec.provider.name if spec.provider is not None else None
        if (await self._ask(self._retrieve(agent_id), _decode_created)).llm_config.own_provider == wanted:
            return
        model, config = await self._answering(spec)
        changed = await self._ask(self._update(agent_id, model, config), _decode_created)
        if changed.llm_config.own_provider != wanted:
            raise UpstreamInvalid(_STILL_ANOTHER_PROVIDER, should_retry=False)

    async def _answering(self, spec: AgentSpec) -> tuple[str | Omit, LlmConfigParam | Omit]:
        """Return by what model, or by what of a provider, an agent is answered for."""
        if spec.provider is None:
            return spec.model or self._usual_model(await self._models(categories=["base"])), omit
        await self._provide(spec.provider)
        return omit, self._config(spec.provider, spec.model, await self._models_of(spec.provider))

    async def delete(self, agent_id: str) -> None:
        """Delete an agent that may be there."""
        try:
            await self._ask(self._delete(agent_id), anything)
        except AgentGone:
            return

    async def _provide(self, provider: ModelProvider) -> None:
        """Have Letta know a provider, with the key that it has today."""
        known = await self._providers(provider.name)
        if not known:
            try:
                await self._ask(self._make_provider(provider), anything)
            except ConversationBusy:  # Letta's 409: somebody else made it meanwhile
                known = await self._providers(provider.name)
        for row in known:
            await self._ask(self._change_provider(row.id, _access(provider)), anything)

    async def _providers(self, name: str) -> list[ProviderRow]:
        return [row for row in await self._ask(self._list_providers(name=name), _decode_providers) if row.name == name]

    async def delete_provider(self, name: str) -> None:
        """Delete a provider that may be there; one under whose name models stand stays, without its key."""
        for row in await self._providers(name):
            try:
                if await self._models(name):
                    await self._ask(self._change_provider(row.id, {"api_key": NO_KEY}), anything)
                else:
                    await self._ask(self._delete_provider(row.id), anything)
            except AgentGone:  # Letta's 404: somebody else did it meanwhile
                continue

    async def _models_of(self, provider: ModelProvider) -> dict[str, ModelRow]:
        """Return the models of a provider's server by their names there, as they were lately."""
        address, now = _address(provider.base_url), self._clock()
        known = self._found.get(address)
        if known is not None and now < known.until:
            return known.models
        models = await self._look_for_models(provider.name, address)
        if models:
            self._found[address] = _Found(now + REMEMBERED, models)
        return models

    async def _look_for_models(self, name: str, address: str) -> dict[str, ModelRow]:
        """Return the models that stand under the name of the first at this address who has any, and of this one."""
        models: dict[str, ModelRow] = {}
        oldest = [row.name for row in await self._oldest_providers() if _address(row.base_url) == address]
        for one in (*oldest[:MOST_ASKED], name):
            if not models or one == name:
                rows = await self._models(one)
                models |= {row.name: row for row in rows if row.name and _address(row.model_endpoint) == address}
        return models

    async def _oldest_providers(self) -> list[ProviderRow]:
        return await self._ask(self._list_providers(order="asc"), _decode_providers)

    async def _models(
        self, provider: str | Omit = omit, categories: list[Literal["base", "byok"]] | Omit = omit
    ) -> list[ModelRow]:
        return await self._ask(self._list_models(provider, categories), _decode_models)

    @staticmethod
    def _usual_model(offered: list[ModelRow]) -> str:
        """Return the first model of the server's own providers; Letta's free one only where there is no other."""
        own = [row.handle for row in offered if row.provider_category in (None, "base")]
        for handle in sorted(own, key=lambda handle: handle.startswith("letta/")):
            return handle
        raise UpstreamRejected(_NO_MODEL, should_retry=False)

    @staticmethod
    def _config(provider: ModelProvider, model: str | None, there: Mapping[str, ModelRow]) -> LlmConfigParam:
        """Return what has the provider answer with a model: the first that its server has, unless one is named."""
        name = next(iter(there), None) if model is None else model.removeprefix(PROXIED)
        if name is None:
            raise UpstreamRejected(_NO_MODEL, should_retry=False)
        known = there.get(name)
        return LlmConfigParam(
            model=name,
            model_endpoint_type="openai",
            model_endpoint=provider.base_url,
            context_window=(known.max_context_window if known is not None else None) or CONTEXT_WINDOW,
            provider_name=provider.name,
            provider_category=BYOK,
            handle=f"{provider.name}/{name}",
        )

    async def _tools(self, wanted: tuple[str, ...]) -> list[str]:
        """Return those of the tools that Letta has: it makes no agent with a tool that it lacks."""
        names = [name for name in wanted if name != SPEAKING_TOOL]
        if not names:
            return []
        there: list[ToolRow] = await self._ask(self._list_tools(names), decode_tools)
        known = {row.name for row in there}
        return [name for name in names if name in known]

    async def _create(self, spec: AgentSpec, model: str | Omit, config: LlmConfigParam | Omit, tools: list[str]) -> Raw:
        return await self._control.agents.with_raw_response.create(
            name=spec.name,
            agent_type="letta_v1_agent",
            model=model,
            llm_config=config,
            embedding=spec.embedding or omit,
            tools=tools,
            memory_blocks=[_block(block) for block in spec.blocks],
            tags=list(spec.tags),
            include_base_tools=False,
            include_base_tool_rules=False,
        )

    async def _retrieve(self, agent_id: str) -> Raw:
        return await self._control.agents.with_raw_response.retrieve(agent_id)

    async def _update(self, agent_id: str, model: str | Omit, config: LlmConfigParam | Omit) -> Raw:
        return await self._control.agents.with_raw_response.update(agent_id, model=model, llm_config=config)

    async def _delete(self, agent_id: str) -> Raw:
        return await self._control.agents.with_raw_response.delete(agent_id)

    async def _list_models(self, provider: str | Omit, categories: list[Literal["base", "byok"]] | Omit) -> Raw:
        return await self._control.models.with_raw_response.list(provider_name=provider, provider_category=categories)

    async def _list_tools(self, names: list[str]) -> Raw:
        return await self._control.tools.with_raw_response.list(names=names, limit=len(names))

    # letta-client knows no providers (1.12.1)

    async def _list_providers(self, **query: str) -> Raw:
        options = letta_client.RequestOptions(params=query)
        return _Whole(await self._control.get("/v1/providers/", cast_to=httpx.Response, options=options))

    async def _make_provider(self, provider: ModelProvider) -> Raw:
        body = {"name": provider.name, "provider_type": "openai", **_access(provider)}
        return _Whole(await self._control.post("/v1/providers/", cast_to=httpx.Response, body=body))

    async def _change_provider(self, provider_id: str, change: dict[str, str]) -> Raw:
        path = f"/v1/providers/{provider_id}"
        return _Whole(await self._control.patch(path, cast_to=httpx.Response, body=change))

    async def _delete_provider(self, provider_id: str) -> Raw:
        return _Whole(await self._control.delete(f"/v1/providers/{provider_id}", cast_to=httpx.Response))


def _address(base_url: str | None) -> str:
    return (base_url or "").rstrip("/")


def _access(provider: ModelProvider) -> dict[str, str]:
    return {"api_key": provider.api_key, "base_url": provider.base_url}


def _block(block: MemoryBlock) -> CreateBlockParam:
    made = CreateBlockParam(label=block.label, value=block.value, read_only=block.is_read_only)
    if block.description is not None:
        made["description"] = block.description
    if block.limit is not None:
        made["limit"] = block.limit
    return made
