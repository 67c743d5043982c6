import msgspec
import pytest

from gateway.accounts.brute_force import GuardConfig, LoginGuard
from gateway.accounts.errors import TooManyAttempts
from gateway.shared_state.tally import MemoryTally, Pace
from tests.accounts.identities import Clock

STEADY = Pace(free=3, first_delay=1.0, longest_delay=60.0, forget=3_600.0)
ENDLESS = Pace(free=10**9, first_delay=1.0, longest_delay=1.0, forget=3_600.0)


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000.0)


def guard_of(clock: Clock, **paces: Pace) -> LoginGuard:
    """Return a guard that limits by these alone."""
    every = GuardConfig(account=ENDLESS, known=ENDLESS, address=ENDLESS, everybody=ENDLESS, registration=ENDLESS)
    return LoginGuard(msgspec.structs.replace(every, **paces), clock)


async def fail(guard: LoginGuard, account: str = "ada", address: str | None = "203.0.113.7") -> None:
    async with guard.attempt(account, address) as attempt:
        attempt.failed()


async def succeed(guard: LoginGuard, account: str = "ada", address: str | None = "203.0.113.7") -> None:
    async with guard.attempt(account, address) as attempt:
        attempt.succeeded()


async def wait(guard: LoginGuard, account: str = "ada", address: str = "203.0.113.7") -> float:
    """Return how long an attempt would have to wait, without making one that counts."""
    try:
        async with guard.attempt(account, address):
            return 0.0
    except TooManyAttempts as error:
        return error.retry_after or 0.0


# One account ---------------------------------------------------------------------------------------------------------


async def test_delays_grow_up_to_the_longest(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    waits = []
    for _ in range(12):
        waits.append(await wait(guard))
        clock.now += waits[-1]
        await fail(guard)
    assert waits == [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_refusal_says_when_to_come_again(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    for _ in range(3):
        await fail(guard)
    with pytest.raises(TooManyAttempts) as caught:
        await fail(guard)
    assert caught.value.headers()["Retry-After"] == "1"
    assert (caught.value.status, caught.value.code) == (429, "too_many_attempts")


async def test_refused_attempt_is_no_failure(clock: Clock) -> None:
    """Otherwise whoever hammers would keep the user out for longer and longer."""
    guard = guard_of(clock, account=STEADY)
    for _ in range(3):
        await fail(guard)
    for _ in range(1_000):
        assert await wait(guard) == 1.0
    clock.now += 1.0
    assert await wait(guard) == 0.0


async def test_address_does_not_matter_to_the_account(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    for number in range(3):
        await fail(guard, address=f"203.0.113.{number}")
    assert await wait(guard, address="198.51.100.1") == 1.0
    assert await wait(guard, account="bob") == 0.0


async def test_failures_are_forgotten_after_a_time_without_one(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    for _ in range(3):
        await fail(guard)
    clock.now += 3_600.0
    assert await wait(guard) == 0.0
    for _ in range(3):
        await fail(guard)
    assert await wait(guard) == 1.0


async def test_thousand_at_once_are_no_more_than_one_by_one(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    open_ones = [guard.attempt("ada", f"10.0.{number}.1") for number in range(3)]
    for one in open_ones:
        (await one.__aenter__()).failed()
    assert await wait(guard, address="198.51.100.1") == 1.0
    for one in open_ones:
        await one.__aexit__(None, None, None)
    assert await wait(guard, address="198.51.100.1") == 1.0


async def test_attempt_whose_password_was_not_looked_at_is_no_failure(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY, address=STEADY, everybody=STEADY)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="the database is down"):
            async with guard.attempt("ada", "203.0.113.7"):
                raise RuntimeError("the database is down")
    assert await wait(guard) == 0.0


async def test_attempt_that_was_none_costs_no_new_wait(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    for _ in range(3):
        await fail(guard)
    clock.now += 1.0
    for _ in range(3):
        async with guard.attempt("ada", "203.0.113.7"):
            pass
    await succeed(guard)
    assert await wait(guard) == 0.0


# The right user ------------------------------------------------------------------------------------------------------


async def test_success_forgives_the_users_own_failures(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY, address=STEADY, everybody=STEADY)
    for _ in range(10):
        await fail(guard)
        await fail(guard)
        await succeed(guard)


async def test_success_does_not_forgive_failures_from_elsewhere(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    for number in range(2):
        await fail(guard, address=f"198.51.100.{number}")
    await succeed(guard)
    await fail(guard, address="198.51.100.9")
    assert await wait(guard, address="198.51.100.10") == 1.0


async def test_success_with_an_account_of_ones_own_forgives_no_failures_with_others(clock: Clock) -> None:
    guard = guard_of(clock, address=STEADY)
    await fail(guard, "ada")
    await succeed(guard, "mallory")
    await fail(guard, "bob")
    await succeed(guard, "mallory")
    await fail(guard, "carol")
    assert await wait(guard, "dave") == 1.0


@pytest.mark.parametrize("attacked", ["account", "address", "everybody"])
async def test_user_from_a_known_address_is_not_held_up_by_others(clock: Clock, attacked: str) -> None:
    guard = guard_of(clock, **{attacked: STEADY})
    await succeed(guard)
    address = "203.0.113.7" if attacked == "address" else "198.51.100.1"
    account = "ada" if attacked == "account" else "bob"
    for _ in range(20):
        clock.now += await wait(guard, account, address)
        await fail(guard, account, address)
    assert await wait(guard, account, address) > 0
    assert await wait(guard, "ada", "203.0.113.7") == 0.0
    await succeed(guard)


async def test_known_address_has_a_count_of_its_own(clock: Clock) -> None:
    """Whoever sits beside the user does not get to guess for ever."""
    guard = guard_of(clock, known=STEADY, account=STEADY)
    await succeed(guard)
    for _ in range(3):
        await fail(guard)
    assert await wait(guard) == 1.0
    assert await wait(guard, address="198.51.100.1") == 0.0


async def test_known_address_is_known_for_a_time(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    await guard.knows("ada", "203.0.113.7")
    clock.now += GuardConfig().acquaintance
    for number in range(3):
        await fail(guard, address=f"198.51.100.{number}")
    assert await wait(guard) == 1.0


async def test_client_that_cannot_be_told_from_others_is_never_known(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY)
    await succeed(guard, address="")
    for _ in range(3):
        await fail(guard, address="")
    assert await wait(guard, address="") == 1.0


# One address, and all ------------------------------------------------------------------------------------------------


async def test_address_is_held_up_whatever_the_account(clock: Clock) -> None:
    guard = guard_of(clock, address=STEADY)
    for number in range(3):
        await fail(guard, f"user {number}")
    assert await wait(guard, "ada") == 1.0
    assert await wait(guard, "ada", "198.51.100.1") == 0.0


async def test_network_of_ipv6_is_one_client(clock: Clock) -> None:
    guard = guard_of(clock, address=STEADY)
    for number in range(3):
        await fail(guard, f"user {number}", f"2001:db8::{number:x}:1")
    assert await wait(guard, "ada", "2001:db8::ffff:9") == 1.0
    assert await wait(guard, "ada", "2001:db8:0:1::1") == 0.0


async def test_thousand_machines_are_held_up_together(clock: Clock) -> None:
    guard = LoginGuard(clock=clock)
    passed = 0
    for number in range(10_000):
        clock.now += 0.01
        account, address = f"user {number}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        if await wait(guard, account, address) == 0:
            await fail(guard, account, address)
            passed += 1
    assert 300 <= passed <= 300 + 100 / 0.25 + 10, "a hundred seconds of four each"


async def test_guesses_at_one_account_in_a_day() -> None:
    """By the default paces, from as many addresses as there are."""
    clock = Clock(0.0)
    guard, passed = LoginGuard(clock=clock), 0
    while clock.now < 86_400:
        held = await wait(guard, address=f"10.0.0.{passed % 250}")
        if held == 0:
            await fail(guard, address=f"10.0.0.{passed % 250}")
            passed += 1
        clock.now += max(held, 0.05)
    assert passed < 120


async def test_operator_is_held_up_by_nothing(clock: Clock) -> None:
    guard = guard_of(clock, account=STEADY, everybody=STEADY)
    for _ in range(20):
        await fail(guard, address=None)
    assert await wait(guard) == 0.0


# Registrations -------------------------------------------------------------------------------------------------------


async def test_registrations_of_one_address_are_slowed_down(clock: Clock) -> None:
    guard = guard_of(clock, registration=STEADY)
    for _ in range(3):
        await guard.registration("203.0.113.7")
    with pytest.raises(TooManyAttempts):
        await guard.registration("203.0.113.7")
    await guard.registration("198.51.100.1")
    assert await wait(guard) == 0.0, "to log in is another matter"
    clock.now += 1.0
    await guard.registration("203.0.113.7")


async def test_registrations_need_not_be_slowed_down(clock: Clock) -> None:
    guard = guard_of(clock, registration=Pace(free=0, first_delay=1.0, longest_delay=1.0, forget=1.0))
    for _ in range(1_000):
        await guard.registration("203.0.113.7")


# Bounds --------------------------------------------------------------------------------------------------------------


async def test_memory_is_bounded_under_a_flood_of_names(clock: Clock) -> None:
    tally = MemoryTally(100, clock)
    guard = LoginGuard(GuardConfig(account=STEADY, everybody=ENDLESS, address=ENDLESS), tally=tally)
    for number in range(1_000):
        await fail(guard, f"user {number}", f"10.0.{number >> 8}.{number & 255}")
        await guard.knows(f"user {number}", "203.0.113.7")
    assert [len(tally.kinds[f"user {kind}"]) for kind in ("account", "address", "pair")] == [100] * 3
    assert len(tally.known) == 100


async def test_guards_of_other_people_count_apart(clock: Clock) -> None:
    tally, config = MemoryTally(100, clock), GuardConfig(address=STEADY)
    users, operators = (LoginGuard(config, tally=tally, whose=whose) for whose in ("user", "operator"))
    for _ in range(3):
        await fail(users)
    assert await wait(LoginGuard(config, tally=tally)) > 0
    assert await wait(operators) == 0
