"""Billing by a table of prices: the ledger is the truth, and its own holds keep users within their budgets."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

import msgspec

from gateway.accounts.billing.protocol import Spent
from gateway.accounts.profiles import Budget, Profile
from gateway.letta.backend import ModelProvider
from gateway.translation.agent_events import Usage

ANY_MODEL: Final = "*"
"""The model whose price is that of all models without one of their own."""


class Price(msgspec.Struct, frozen=True):
    """What a model's tokens cost, in US dollars per million; ``cached`` of the prompt, None: as the rest of it."""

    prompt: float
    completion: float
    cached: float | None = None


class LocalBilling:
    """A ``Billing`` that needs nobody."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self._prices = {model: _ExactPrice(price) for model, price in prices.items()}

    def is_open(self, profile: Profile) -> bool:
        """Tell whether the user has no key of a biller's, by which their agent may still ask its model."""
        return profile.litellm_key is None

    async def open_account(self, profile: Profile) -> Profile:
        """Return the profile: there is nothing to be made."""
        return profile

    async def close_account(self, profile: Profile) -> None:
        """Do nothing: there is nothing to be deleted."""

    async def set_blocked(self, profile: Profile, *, is_blocked: bool) -> None:
        """Do nothing: the gateway's own door is all there is."""

    def provider_of(self, profile: Profile) -> ModelProvider | None:  # noqa: ARG002 - as the protocol has it
        """Return None: agents use the server's own providers."""
        return None

    def provider_name(self, user_id: str) -> str | None:  # noqa: ARG002 - the same
        """Return None: the same."""
        return None

    async def admit(self, owner: str) -> None:
        """Admit everybody: the ledger's hold is what may be refused."""

    async def cost(self, model: str, usage: Usage) -> int:
        """Return what the tokens cost, in millionths of a US dollar, rounded up; a model without a price is free."""
        price = self._prices.get(model) or self._prices.get(ANY_MODEL)
        return 0 if price is None else price.of(usage)

    async def spent(self, profile: Profile, first_day: str, last_day: str) -> Spent | None:  # noqa: ARG002 - the same
        """Return None: the ledger is the truth."""
        return None

    async def set_budget(self, profile: Profile, budget: Budget | None) -> None:
        """Do nothing: the ledger reads budgets from the profile."""

    async def close(self) -> None:
        """Do nothing: there are no connections."""


class _ExactPrice:
    """A price without rounding errors: dollars per million tokens are millionths of a dollar per token."""

    def __init__(self, price: Price) -> None:
        self._prompt = _exact(price.prompt)
        self._completion = _exact(price.completion)
        self._cached = self._prompt if price.cached is None else _exact(price.cached)

    def of(self, usage: Usage) -> int:
        """Return what the tokens cost in millionths of a dollar, rounded up."""
        cached = min(usage.cached_tokens or 0, usage.prompt_tokens)
        cost = self._prompt * (usage.prompt_tokens - cached) + self._cached * cached
        return math.ceil(cost + self._completion * usage.completion_tokens)


def _exact(dollars: float) -> Fraction:
    """Return what was written, not the binary number next to it: 0.1 is a tenth."""
    return Fraction(repr(dollars))
