"""What the registry asks of whoever keeps the ledger: each turn is written down before it is sent, and settled once."""

from typing import Literal, Protocol, TypeAlias

import msgspec

from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

TurnOutcome: TypeAlias = Literal["complete", "failed", "interrupted", "unsent"]
"""How a turn went: ``interrupted`` where its client or the gateway went away, ``unsent`` where Letta never had it."""


class Payer(msgspec.Struct, frozen=True):
    """Who a turn is for, and the API by which it came: ``chat_completions``, ``responses`` or ``platform``."""

    owner: str
    source: str
    key_id: str | None = None
    """The personal key that it came by."""
    is_user: bool = False
    """Whether that is one of the gateway's users, who may have a budget."""


class Meter(Protocol):
    """Whoever keeps the ledger."""

    async def open(self, payer: Payer, turn: AgentTurn) -> str:
        """Write down a turn that is about to be sent, and return its name in the ledger.

        Raises ``BudgetExceeded``, ``BudgetHeld`` and ``StorageUnavailable``: then it must not be sent.
        """
        ...

    async def close(self, turn_id: str, taken: Usage | None, outcome: TurnOutcome, characters: int = 0) -> None:
        """Settle a turn; None where Letta keeps no count of it. Returns once that is written down, or will be.

        ``characters`` is how much of a user's answer came: what of it was cut, Letta does not count.
        """
        ...

    def leave_open(self, turn_id: str) -> None:
        """Leave a turn for later: Letta could not be asked what it took."""
        ...
