"""What the platform asks of whoever bills its users."""

from typing import Protocol

import msgspec

from gateway.accounts.profiles import Budget, Profile
from gateway.letta.backend import ModelProvider
from gateway.translation.agent_events import Usage


class SpentDay(msgspec.Struct, frozen=True):
    """What a user spent on a day (``2026-11-21``, UTC), in millionths of a US dollar."""

    day: str
    micros: int


class Spent(msgspec.Struct, frozen=True):
    """What a biller of its own says that a user spent: a row for each day with anything, oldest first."""

    days: tuple[SpentDay, ...]

    @property
    def micros(self) -> int:
        """Return the sum."""
        return sum(day.micros for day in self.days)


class Billing(Protocol):
    """Whoever bills users. Every method raises only the tree of ``gateway/errors.py``."""

    def is_open(self, profile: Profile) -> bool:
        """Tell whether the user has what they need to be billed, and nothing of another biller's."""
        ...

    async def open_account(self, profile: Profile) -> Profile:
        """Make what the user needs to be billed, and return the profile with it; a second time changes nothing."""
        ...

    async def close_account(self, profile: Profile) -> None:
        """Delete what was made; what is not there is no error."""
        ...

    async def set_blocked(self, profile: Profile, *, is_blocked: bool) -> None:
        """Refuse what the user's agent asks of its model, or take it again; a second time changes nothing."""
        ...

    def provider_of(self, profile: Profile) -> ModelProvider | None:
        """Return the provider by which the user's agent reaches its model; None for the server's own."""
        ...

    def provider_name(self, user_id: str) -> str | None:
        """Return what a user's provider is called, whether it is there or not; None where users have none."""
        ...

    async def admit(self, owner: str) -> None:
        """Raise ``BudgetExceeded`` where the biller would refuse a turn; asked before each one."""
        ...

    async def cost(self, model: str, usage: Usage) -> int:
        """Return what a turn's tokens cost, in millionths of a US dollar, rounded up."""
        ...

    async def spent(self, profile: Profile, first_day: str, last_day: str) -> Spent | None:
        """Return what the biller itself says of these days, both included; None where the ledger is the truth."""
        ...

    async def set_budget(self, profile: Profile, budget: Budget | None) -> None:
        """Tell the biller a user's budget; None is the default one's."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...
