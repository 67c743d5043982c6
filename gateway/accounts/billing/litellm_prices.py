"""What turns cost by a LiteLLM proxy's own prices, exactly; they are asked for now and then."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from fractions import Fraction
from typing import Final, TypeAlias

import msgspec
import structlog

from gateway.accounts.billing.litellm_service import ModelPrice, ModelRow
from gateway.errors import GatewayError
from gateway.translation.agent_events import Usage

KEEP: Final = 300.0
"""Seconds for which prices are good."""
PAUSE: Final = 15.0
"""Seconds between two tries to have them."""
MICROS: Final = 1_000_000

Fetch: TypeAlias = Callable[[], Awaitable[list[ModelRow]]]

_log: Final = structlog.get_logger("gateway.accounts")


class ExactPrice(msgspec.Struct, frozen=True, order=True):
    """What tokens cost, in millionths of a US dollar each, as it was written and not the binary number next to it."""

    completion: Fraction
    prompt: Fraction
    cached: Fraction

    @classmethod
    def of(cls, price: ModelPrice) -> "ExactPrice":
        """Return the price of LiteLLM's."""
        prompt = micros_of(price.input_cost_per_token or 0.0)
        cached = price.cache_read_input_token_cost
        completion = micros_of(price.output_cost_per_token or 0.0)
        return cls(completion, prompt, prompt if cached is None else micros_of(cached))

    def cost(self, usage: Usage) -> int:
        """Return what the tokens cost, rounded up."""
        cached = min(usage.cached_tokens or 0, usage.prompt_tokens)
        prompt = self.prompt * (usage.prompt_tokens - cached) + self.cached * cached
        return math.ceil(prompt + self.completion * usage.completion_tokens)


class LitellmPrices:
    """Prices by LiteLLM's names of models; of several deployments the dearest counts."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._prices: dict[str, ExactPrice] | None = None
        self._fetched_at = self._tried_at = 0.0
        self._fetching = asyncio.Lock()

    async def cost(self, model: str, usage: Usage) -> int:
        """Return what a turn cost by its model's handle on Letta, in millionths of a US dollar, rounded up.

        A handle is LiteLLM's name behind the provider's. Raises what ``fetch`` raises, until prices are known once.
        """
        prices = await self._known()
        price = prices.get(model.partition("/")[2]) or prices.get(model)
        return 0 if price is None else price.cost(usage)

    async def _known(self) -> dict[str, ExactPrice]:
        async with self._fetching:
            now = self._clock()
            if self._prices is not None and (now - self._fetched_at < KEEP or now - self._tried_at < PAUSE):
                return self._prices
            self._tried_at = now
            try:
                self._prices = _by_model(await self._fetch())
                self._fetched_at = now
            except GatewayError as error:
                if self._prices is None:
                    raise
                _log.warning("prices not renewed", code=error.code)
            return self._prices


def micros_of(dollars: float) -> Fraction:
    """Return dollars in millionths, exactly as they are written."""
    return Fraction(repr(dollars)) * MICROS


def _by_model(rows: list[ModelRow]) -> dict[str, ExactPrice]:
    found: dict[str, ExactPrice] = {}
    for row in rows:
        price = ExactPrice.of(row.model_info)
        found[row.model_name] = max(price, found.get(row.model_name, price))
    return found
