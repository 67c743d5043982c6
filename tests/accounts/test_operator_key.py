import asyncio

import pytest

from gateway.accounts.errors import TooManyAttempts
from gateway.accounts.operator_key import ACQUAINTANCE, OperatorKey

KEY = "sk-operator"
HERE = "203.0.113.7"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def guess(held: OperatorKey, times: int) -> None:
    for _ in range(times):
        assert not await held.is_held("guess", HERE)


@pytest.mark.parametrize(
    ("known", "given", "is_held"),
    [
        (KEY, KEY, True),
        (KEY, KEY[:-1], False),
        (KEY, "", False),
        (KEY, "sk-operat\udcff", False),
        ("", "", False),
    ],
)
async def test_who_holds_it(known: str, given: str, *, is_held: bool) -> None:
    held = OperatorKey(known)
    assert await held.is_held(given, HERE) is is_held
    assert held.is_set is bool(known)


async def test_after_some_guesses_the_right_key_has_to_wait_too() -> None:
    """Or else each guess would tell at once whether it was right."""
    held = OperatorKey(KEY)
    await guess(held, 5)
    with pytest.raises(TooManyAttempts) as raised:
        await guess(held, 1)
    assert raised.value.retry_after
    with pytest.raises(TooManyAttempts):
        await held.is_held(KEY, HERE)
    assert await held.is_held(KEY, "198.51.100.9")


async def test_many_requests_at_once_are_no_guesses() -> None:
    held = OperatorKey(KEY)
    assert all(await asyncio.gather(*(held.is_held(KEY, HERE) for _ in range(100))))


async def test_who_has_sent_the_key_is_not_held_up_by_guesses_for_a_while() -> None:
    clock = Clock()
    held = OperatorKey(KEY, now=clock)
    assert await held.is_held(KEY, HERE)
    with pytest.raises(TooManyAttempts):
        await guess(held, 20)
    assert await held.is_held(KEY, HERE)
    clock.now += ACQUAINTANCE
    with pytest.raises(TooManyAttempts):
        await held.is_held(KEY, HERE)
