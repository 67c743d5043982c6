import asyncio
import os
import statistics
import threading
import time

import argon2
import psutil  # type: ignore[import-untyped]
import pytest

from gateway.accounts.errors import PasswordsBusy, WeakPassword
from gateway.accounts.passwords import LONGEST, PasswordPolicy, Passwords, Verdict, check_strength
from tests.accounts.identities import CHEAP, PASSWORD

RIGHT = Verdict(is_right=True)
WRONG = Verdict(is_right=False)


@pytest.fixture
def passwords() -> Passwords:
    return Passwords(CHEAP)


async def test_password_is_right_and_another_is_not(passwords: Passwords) -> None:
    stored = await passwords.hash(PASSWORD)
    assert stored.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert PASSWORD not in stored
    assert await passwords.verify(stored, PASSWORD) == RIGHT
    for other in ("", PASSWORD.upper(), PASSWORD + " ", PASSWORD[:-1], "x" * LONGEST):
        assert await passwords.verify(stored, other) == WRONG


async def test_same_password_has_another_hash_each_time(passwords: Passwords) -> None:
    assert await passwords.hash(PASSWORD) != await passwords.hash(PASSWORD)


async def test_default_costs_what_owasp_asks_for() -> None:
    passwords = Passwords()
    stored = await passwords.hash(PASSWORD)
    found = argon2.extract_parameters(stored)
    assert (found.type, found.memory_cost >= 19_456, found.time_cost >= 2) == (argon2.Type.ID, True, True)
    assert (found.salt_len, found.hash_len) == (16, 32)


async def test_password_is_the_same_however_it_is_typed(passwords: Passwords) -> None:
    stored = await passwords.hash("Zoe\u0308 and \ufb01sh")
    assert await passwords.verify(stored, "Zo\u00eb and fish") == RIGHT


async def test_user_who_is_not_known_has_no_right_password(passwords: Passwords) -> None:
    assert await passwords.verify(None, PASSWORD) == WRONG
    assert await passwords.verify(None, "") == WRONG


async def test_user_who_is_not_known_costs_the_same() -> None:
    passwords = Passwords(PasswordPolicy(memory_kib=4_096))
    stored = await passwords.hash(PASSWORD)
    times: dict[str | None, list[float]] = {stored: [], None: []}
    for _ in range(15):
        for known, taken in times.items():
            begun = time.perf_counter()
            await passwords.verify(known, "wrong password")
            taken.append(time.perf_counter() - begun)
    fastest, fastest_of_nobody = (min(taken) for taken in times.values())
    assert fastest * 0.5 < fastest_of_nobody < fastest * 2


async def test_hash_of_another_cost_is_replaced(passwords: Passwords) -> None:
    old = await Passwords(PasswordPolicy(memory_kib=16, passes=2)).hash(PASSWORD)
    verdict = await passwords.verify(old, PASSWORD)
    assert verdict.is_right
    assert verdict.replacement is not None
    assert verdict.replacement.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert await passwords.verify(verdict.replacement, PASSWORD) == RIGHT
    assert await passwords.verify(old, "wrong password") == WRONG


async def test_longest_password_and_a_longer_one(passwords: Passwords) -> None:
    stored = await passwords.hash("x" * LONGEST)
    assert await passwords.verify(stored, "x" * LONGEST) == RIGHT
    longer = "x" * 20_000_000
    begun = time.process_time()
    assert await passwords.verify(stored, longer) == WRONG
    assert time.process_time() - begun < 0.01, "it is not even looked at"


@pytest.mark.parametrize(
    "password", ["", "1234567", "xy" * LONGEST, "ADA@example.com", "12345678", "Password123", "aaaaaaaa", "AAAAaaaa"]
)
def test_weak_password(password: str) -> None:
    with pytest.raises(WeakPassword) as caught:
        check_strength(password, "ada@example.com", param="new_password")
    assert caught.value.param == "new_password"


@pytest.mark.parametrize(
    "password", ["12345679", "xy" * (LONGEST // 2), "Öl & Ärger", " " * 7 + "x", "'; DROP TABLE passwords; --"]
)
def test_password_that_will_do(password: str) -> None:
    check_strength(password, "ada@example.com")


async def login(passwords: Passwords, stored: str) -> Verdict:
    async with passwords.place():
        return await passwords.verify(stored, PASSWORD)


async def test_crowd_is_refused_and_the_rest_served() -> None:
    passwords = Passwords(PasswordPolicy(memory_kib=19_456, passes=2, threads=2, waiting=8))
    stored = await passwords.hash(PASSWORD)
    found = await asyncio.gather(*(login(passwords, stored) for _ in range(100)), return_exceptions=True)
    busy = [error for error in found if isinstance(error, PasswordsBusy)]
    assert 10 <= found.count(RIGHT) <= 50, "those who have a place, and who comes when one is free again"
    assert found.count(RIGHT) + len(busy) == 100
    assert int(busy[0].headers()["Retry-After"]) >= 1
    assert await login(passwords, stored) == RIGHT, "afterwards there is room again"


async def test_client_that_goes_away_leaves_its_place() -> None:
    passwords = Passwords(PasswordPolicy(memory_kib=1_024, passes=1, threads=1, waiting=1))
    stored = await passwords.hash(PASSWORD)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await login(passwords, stored)
    assert await login(passwords, stored) == RIGHT


async def test_threads_give_way_to_the_loop() -> None:
    passwords = Passwords(CHEAP)
    await passwords.hash(PASSWORD)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    names = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("passwords")}
    assert max(os.getpriority(os.PRIO_PROCESS, number) for number in names if number is not None) > own


async def test_five_hundred_logins_at_once_leave_the_loop_alone() -> None:
    passwords = Passwords()
    stored = await passwords.hash(PASSWORD)
    process = psutil.Process()
    quiet = await _lags(200)
    before = process.memory_info().rss
    logins = asyncio.gather(*(login(passwords, stored) for _ in range(500)), return_exceptions=True)
    crowded = await _lags(200)
    grown = process.memory_info().rss - before
    found = await logins
    busy = sum(isinstance(error, PasswordsBusy) for error in found)
    assert found.count(RIGHT) >= 66
    assert found.count(RIGHT) + busy == 500
    assert busy > 250
    assert grown < 512 * 1_048_576
    assert statistics.median(crowded) < 2 * statistics.median(quiet) + 0.002


async def _lags(number: int) -> list[float]:
    """Return how late the loop was with each of some naps, as a stream's chunks would be."""
    late = []
    for _ in range(number):
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        late.append(time.perf_counter() - due)
    return late
