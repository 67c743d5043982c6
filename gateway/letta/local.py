"""The local Letta, ready to answer: the child, a provider of models behind it, and an agent.

A provider found in the settings answers; with none, the scripted model does, and says so. Letta Code reads its
providers' keys from the environment (letta 0.34.12), so none of them is written to its state.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from gateway.errors import GatewayError
from gateway.letta import demo_model
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_wire import AgentBody, AgentRow
from gateway.letta.demo_model import running_demo_model
from gateway.letta.embedded import EmbeddedFailed, EmbeddedLetta, running_letta
from gateway.metrics import Metrics
from gateway.tasks import TaskSet

AGENT: Final = "Milo"
OURS: Final = "The agent of Letta Gateway's local Letta."
"""The description by which the agent that was made here is known again: no other is ever changed."""
ASIDE: Final = (
    "(This is Letta Gateway's scripted model: it only repeats and counts. Set OPENAI_API_KEY, ANTHROPIC_API_KEY, "
    "OPENROUTER_API_KEY, OLLAMA_BASE_URL or LMSTUDIO_BASE_URL for a real one.)"
)


class Provider(msgspec.Struct, frozen=True):
    """Who answers: the child's variables, how its models' handles begin, and which of them are taken first."""

    name: str
    environment: dict[str, str]
    handles: str
    preferred: tuple[str, ...] = ()


class LocalConfig(msgspec.Struct, frozen=True):
    """What the settings say of a local Letta: its home, who answers (none: the scripted model), with which model."""

    home: Path
    provider: Provider | None = None
    model: str | None = None


class LocalLetta(msgspec.Struct, frozen=True):
    """A local Letta that can answer."""

    child: EmbeddedLetta
    agent: str
    model: str
    is_scripted: bool

    @property
    def url(self) -> str:
        """What a client of it connects to."""
        return self.child.url

    @property
    def note(self) -> str:
        """Say who answers."""
        return "a scripted model answers: no provider is configured" if self.is_scripted else f"{self.model} answers"


@contextlib.asynccontextmanager
async def running_local_letta(config: LocalConfig, metrics: Metrics, tasks: TaskSet) -> AsyncIterator[LocalLetta]:
    """Run a local Letta that can answer; raises ``EmbeddedFailed`` where it cannot be made ready."""
    async with contextlib.AsyncExitStack() as stack:
        provider = config.provider
        if provider is None:
            model = await stack.enter_async_context(running_demo_model(aside=ASIDE))
            provider = scripted(model.base_url)
        child = await stack.enter_async_context(running_letta(config.home, provider.environment, metrics, tasks))
        backend = AppServerBackend(AppServerConfig(child.url, child.token), metrics, tasks)
        try:
            handle = _choose(await backend.models(), provider, config.model)
            agent = await _ensure_agent(backend, handle)
        except GatewayError as error:
            raise EmbeddedFailed(f"the local Letta does not answer ({error.code}); {child.log} says why.") from error
        finally:
            await backend.close()
        yield LocalLetta(child, agent.name, agent.model or handle, is_scripted=config.provider is None)


def scripted(base_url: str) -> Provider:
    """Return the scripted model as a provider: to Letta it is an LM Studio."""
    return Provider(
        "the scripted model", {"LMSTUDIO_BASE_URL": base_url}, "lmstudio/", (f"lmstudio/{demo_model.MODEL}",)
    )


def _choose(handles: list[str], provider: Provider, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in handles:
            raise EmbeddedFailed(f"LETTA_GATEWAY_MODEL is {wanted!r}, which is none of: {', '.join(handles[:20])}.")
        return wanted
    offered = [handle for handle in handles if handle.startswith(provider.handles)]
    for handle in (*provider.preferred, *offered):
        if handle in offered:
            return handle
    raise EmbeddedFailed(f"{provider.name} offers no model: is it running, and does it have one?")


async def _ensure_agent(backend: AppServerBackend, handle: str) -> AgentRow:
    """Return the agent that was made here, made now where there is none, on the model that answers today."""
    ours = [row for row in await backend.rows() if row.description == OURS]
    if not ours:
        return await backend.make_agent(AgentBody(name=AGENT, model=handle, description=OURS))
    if ours[0].model == handle:
        return ours[0]
    return await backend.update_agent(ours[0].id, AgentBody(model=handle))
