"""Agents made and deleted on the App Server, and found by their tags.

It makes an agent with whatever model it is told, offered or not (letta 0.34.12): that is seen to here.
"""

from typing import TYPE_CHECKING, Final

from gateway.errors import AgentGone, InternalError, UpstreamRejected
from gateway.letta import app_server_wire as wire
from gateway.letta import failures
from gateway.letta.app_server_socket import new_request_id
from gateway.letta.backend import Agent, AgentSpec

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

MOST: Final = 10_000
"""Agents of one tag."""
_NO_MODEL: Final = (
    "The Letta server does not offer this agent's model. The operator should connect its provider there, or set "
    "LETTA_GATEWAY_USER_MODEL to a model that the server lists."
)


class AppServerAgents:
    """The agents of an App Server."""

    def __init__(self, backend: "AppServerBackend") -> None:
        self._backend = backend

    async def tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag."""
        query = wire.ListQuery(limit=MOST, tags=(tag,))
        rows = (await self._backend.ask(_list(query), wire.AgentsReply)).agents
        return [row.agent() for row in rows if tag in row.tags]

    async def create(self, spec: AgentSpec) -> Agent:
        """Make an agent; raises ``UpstreamRejected`` where the server does not offer its model, or none at all."""
        if spec.provider is not None:
            raise InternalError("a provider of its own for an agent on a server without those")
        offered = await self._backend.models()
        model = spec.model or next(iter(offered), None)
        if model not in offered:
            raise UpstreamRejected(_NO_MODEL, should_retry=False)
        body = wire.AgentBody(
            name=spec.name,
            model=model,
            tags=spec.tags,
            memory_blocks=tuple(
                wire.NewBlock(block.label, block.value, block.description or block.label) for block in spec.blocks
            ),
        )
        return (await self._backend.make_agent(body)).agent()

    async def delete(self, agent_id: str) -> None:
        """Delete an agent that may be there."""
        command = wire.DeleteAgent(request_id=new_request_id(), agent_id=agent_id)
        reply = await self._backend.reply(await self._backend.control_socket(), command)
        if not reply.success:
            refusal = failures.of_refusal(reply.error)
            if not isinstance(refusal, AgentGone):
                raise refusal


def _list(query: wire.ListQuery) -> wire.ListAgents:
    return wire.ListAgents(request_id=new_request_id(), query=query)
