from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.billing.local import LocalBilling, Price
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.profiles import Budget, Profile
from gateway.translation.agent_events import Usage

PROFILE = Profile(id="anna", email="anna@example.com", created_at=0.0, updated_at=0.0)


async def cost(price: Price, usage: Usage) -> int:
    return await LocalBilling({"model": price}).cost("model", usage)


@pytest.mark.parametrize(
    ("price", "usage", "micros"),
    [
        (Price(3.0, 15.0), Usage(100, 20), 600),
        (Price(30.0, 60.0), Usage(100, 20), 4_200),
        (Price(0.1, 0.0), Usage(10, 5), 1),  # as a binary number a tenth is a little more: ten of them would cost 2
        (Price(0.1, 0.0), Usage(11, 5), 2),
        (Price(0.1, 0.2), Usage(1, 1), 1),
        (Price(0.000_001, 0.0), Usage(1, 0), 1),
        (Price(0.0, 0.0), Usage(10**9, 10**9), 0),
        (Price(1_000_000.0, 1_000_000.0), Usage(10**9, 10**9), 2 * 10**15),
        (Price(2.0, 1.0, 0.5), Usage(100, 10, 40), 150),
        (Price(2.0, 1.0), Usage(100, 10, 40), 210),
        (Price(2.0, 1.0, 0.0), Usage(100, 0, 100), 0),
        (Price(2.0, 1.0, 0.5), Usage(100, 0, 900), 50),  # more from the cache than there was
        (Price(2.0, 1.0, 0.5), Usage(0, 0, None, None), 0),
    ],
)
async def test_cost_of_a_turn(price: Price, usage: Usage, micros: int) -> None:
    assert await cost(price, usage) == micros


@given(
    prices=st.tuples(*[st.floats(min_value=0, max_value=1e6)] * 3),
    tokens=st.tuples(*[st.integers(min_value=0, max_value=10**9)] * 2),
    share=st.floats(min_value=0, max_value=1),
)
async def test_cost_is_exact_and_rounded_up(prices: tuple[float, ...], tokens: tuple[int, int], share: float) -> None:
    prompt, completion, cached = prices
    from_cache = int(tokens[0] * share)
    exact = (
        Fraction(repr(prompt)) * (tokens[0] - from_cache)
        + Fraction(repr(cached)) * from_cache
        + Fraction(repr(completion)) * tokens[1]
    )
    micros = await cost(Price(prompt, completion, cached), Usage(*tokens, from_cache))
    assert 0 <= micros - exact < 1


async def test_model_has_its_own_price_or_that_of_all_others() -> None:
    billing = LocalBilling({"a": Price(1.0, 1.0), "free": Price(0.0, 0.0), "*": Price(5.0, 5.0)})
    usage = Usage(1, 1)
    assert [await billing.cost(model, usage) for model in ("a", "free", "b", "")] == [2, 0, 10, 10]


async def test_model_without_a_price_is_free() -> None:
    assert await LocalBilling({"a": Price(1.0, 1.0)}).cost("b", Usage(10, 10)) == 0


async def test_accounts_need_nothing() -> None:
    billing: Billing = LocalBilling({})
    assert await billing.open_account(PROFILE) is PROFILE
    assert billing.provider_of(PROFILE) is None
    await billing.set_blocked(PROFILE, is_blocked=True)
    assert billing.provider_name(PROFILE.id) is None
    assert await billing.spent(PROFILE, "2026-11-20", "2026-11-21") is None
    await billing.admit("anna")
    await billing.set_budget(PROFILE, Budget(0, "day"))
    await billing.close_account(PROFILE)
    await billing.close()
