import asyncio
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.billing.litellm_prices import KEEP, PAUSE, ExactPrice, LitellmPrices, micros_of
from gateway.accounts.billing.litellm_service import ModelPrice, ModelRow
from gateway.errors import UpstreamUnavailable
from gateway.translation.agent_events import Usage


def row(name: str, *prices: Any) -> ModelRow:
    return ModelRow(name, ModelPrice(*prices))


class Proxy:
    """LiteLLM's prices, as they are asked for."""

    def __init__(self, *rows: ModelRow) -> None:
        self.rows = list(rows)
        self.fetched = 0
        self.is_down = False
        self.now = 1_000.0

    def clock(self) -> float:
        return self.now

    async def fetch(self) -> list[ModelRow]:
        self.fetched += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise UpstreamUnavailable
        return self.rows

    def prices(self) -> LitellmPrices:
        return LitellmPrices(self.fetch, self.clock)


async def test_cost_is_litellms_own() -> None:
    """100 and 20 tokens: LiteLLM's binary arithmetic says 0.004200000000000001 dollars."""
    prices = Proxy(row("gpt-4", 3e-05, 6e-05)).prices()
    assert await prices.cost("litellm-user/gpt-4", Usage(100, 20)) == 4_200


@pytest.mark.parametrize(
    ("handle", "cost"),
    [
        ("litellm-user/gpt-4", 1),
        ("litellm-user/openai/gpt-4o", 2),
        ("gpt-4", 1),
        ("openai/gpt-4o", 2),
        ("litellm-user/unknown", 0),
        ("unknown", 0),
        ("", 0),
        ("litellm-user/free", 0),
    ],
)
async def test_model_by_its_handle(handle: str, cost: int) -> None:
    proxy = Proxy(row("gpt-4", 1e-06, 0.0), row("openai/gpt-4o", 2e-06, 0.0), row("free", None, None))
    assert await proxy.prices().cost(handle, Usage(1, 1)) == cost


@pytest.mark.parametrize(("cached_price", "cost"), [(None, 10_000), (2.5e-06, 6_250), (0.0, 5_000)])
async def test_cached_tokens(cached_price: float | None, cost: int) -> None:
    prices = Proxy(row("m", 1e-05, 0.0, cached_price)).prices()
    assert await prices.cost("p/m", Usage(1_000, 0, cached_tokens=500)) == cost


async def test_more_cached_tokens_than_there_are() -> None:
    prices = Proxy(row("m", 1e-05, 0.0, 1e-06)).prices()
    assert await prices.cost("p/m", Usage(10, 0, cached_tokens=500)) == 10


async def test_dearest_deployment_counts() -> None:
    proxy = Proxy(row("m", 1e-06, 1e-06), row("m", 3e-06, 3e-06), row("m", 2e-06, 2e-06))
    assert await proxy.prices().cost("p/m", Usage(1, 1)) == 6


async def test_part_of_a_millionth_is_rounded_up() -> None:
    prices = Proxy(row("m", 1.5e-07, 6e-07)).prices()
    assert await prices.cost("p/m", Usage(1, 0)) == 1
    assert await prices.cost("p/m", Usage(1_000_000, 0)) == 150_000
    assert await prices.cost("p/m", Usage(0, 0)) == 0


async def test_prices_are_asked_for_now_and_then() -> None:
    proxy = Proxy(row("m", 1e-06, 0.0))
    prices = proxy.prices()
    assert set(await asyncio.gather(*(prices.cost("p/m", Usage(1, 0)) for _ in range(20)))) == {1}
    assert proxy.fetched == 1
    proxy.rows = [row("m", 2e-06, 0.0)]
    proxy.now += KEEP
    assert await prices.cost("p/m", Usage(1, 0)) == 2
    assert proxy.fetched == 2


async def test_prices_that_were_never_known() -> None:
    proxy = Proxy(row("m", 1e-06, 0.0))
    proxy.is_down = True
    prices = proxy.prices()
    with pytest.raises(UpstreamUnavailable):
        await prices.cost("p/m", Usage(1, 0))
    proxy.is_down = False
    assert await prices.cost("p/m", Usage(1, 0)) == 1


async def test_known_prices_outlive_a_proxy_that_is_down() -> None:
    proxy = Proxy(row("m", 1e-06, 0.0))
    prices = proxy.prices()
    await prices.cost("p/m", Usage(1, 0))
    proxy.is_down = True
    proxy.now += KEEP
    for _ in range(5):
        assert await prices.cost("p/m", Usage(1, 0)) == 1
    assert proxy.fetched == 2
    proxy.now += PAUSE
    assert await prices.cost("p/m", Usage(1, 0)) == 1
    assert proxy.fetched == 3


@given(
    st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 99_999), st.integers(1, 99_999)
)
def test_no_token_is_lost_to_rounding(prompt: int, completion: int, cached: int, first: int, second: int) -> None:
    price = ExactPrice.of(ModelPrice(first / 1e9, second / 1e9, 0.0))
    exact = Fraction(first, 1_000) * (prompt - min(prompt, cached)) + Fraction(second, 1_000) * completion
    assert 0 <= price.cost(Usage(prompt, completion, cached)) - exact < 1


def test_dollars_are_what_was_written() -> None:
    assert micros_of(0.1) == 100_000
    assert micros_of(3e-05) == 30
    assert micros_of(0.004200000000000001) == Fraction("4200.000000000001")
