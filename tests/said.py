"""What tests say to agents."""

from gateway.translation.agent_turn import AgentTurn, Part, UserSaid


def said_to(agent_id: str, *content: Part) -> AgentTurn:
    """Return a turn in which the user says one message on the agent's own thread."""
    return AgentTurn(agent_id=agent_id, news=(UserSaid(content),))


def parts_of(turn: AgentTurn) -> tuple[Part, ...]:
    """Return what the user says in a turn, of all its messages."""
    return tuple(part for said in turn.news if isinstance(said, UserSaid) for part in said.content)
