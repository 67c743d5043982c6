import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import pytest
from argon2.exceptions import InvalidHashError
from sqlalchemy import func, select, update

from gateway.accounts.brute_force import GuardConfig, LoginGuard
from gateway.accounts.errors import (
    AccountBlocked,
    AccountExists,
    InvalidCredentials,
    InvalidRefreshToken,
    InvalidToken,
    PasswordsBusy,
    SamePassword,
    TooManyAttempts,
    WeakPassword,
)
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.protocol import IdentityProvider, Tokens
from gateway.accounts.passwords import PasswordPolicy
from gateway.accounts.profiles import Profile, Profiles
from gateway.errors import StorageUnavailable
from gateway.shared_state.tally import Pace
from gateway.storage.address import Address
from gateway.storage.engine import Database
from gateway.storage.tables import passwords, user_profiles
from tests.accounts.dumps import dump
from tests.accounts.identities import CHEAP, EMAIL, HOME, PASSWORD, SECRET_KEY, local_identity
from tests.storage.databases import opened
from tests.storage.late import LateDatabase

NEW_PASSWORD = "another fine password"
ELSEWHERE = "198.51.100.1"
NO_LIMIT = Pace(free=10**9, first_delay=1.0, longest_delay=1.0, forget=60.0)


@pytest.fixture
def identity(database: Database) -> LocalIdentity:
    return local_identity(database)


@pytest.fixture
async def ada(identity: LocalIdentity) -> Tokens:
    return await identity.register(EMAIL, PASSWORD, HOME)


async def test_it_is_an_identity_provider(identity: LocalIdentity) -> None:
    provider: IdentityProvider = identity
    await provider.close()


# Registration --------------------------------------------------------------------------------------------------------


async def test_registration_makes_a_user_and_a_session(
    identity: LocalIdentity, ada: Tokens, database: Database
) -> None:
    profile = await Profiles(database).find(ada.user_id)
    assert profile is not None
    assert (profile.email, profile.name, profile.metadata, profile.is_blocked) == (EMAIL, "", b"{}", False)
    assert (ada.email, ada.expires_in) == (EMAIL, 900)
    verified = await identity.verify(ada.access_token)
    assert (verified.user_id, verified.email) == (ada.user_id, None)
    assert verified.session_id


async def test_same_registration_again_is_a_login(identity: LocalIdentity, ada: Tokens) -> None:
    again = await identity.register(EMAIL, PASSWORD, HOME)
    assert again.user_id == ada.user_id
    assert again.refresh_token != ada.refresh_token
    for tokens in (ada, again):
        assert (await identity.verify(tokens.access_token)).user_id == ada.user_id


async def test_same_registration_many_times_at_once_makes_one_user(identity: LocalIdentity, database: Database) -> None:
    made = await asyncio.gather(*(identity.register(EMAIL, PASSWORD, HOME) for _ in range(5)))
    assert len({tokens.user_id for tokens in made}) == 1
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(user_profiles))).scalar_one() == 1
        assert (await connection.execute(select(func.count()).select_from(passwords))).scalar_one() == 1


async def test_address_that_somebody_else_has(identity: LocalIdentity, ada: Tokens) -> None:
    with pytest.raises(AccountExists):
        await identity.register(EMAIL, NEW_PASSWORD, ELSEWHERE)
    assert (await identity.login(EMAIL, PASSWORD, HOME)).user_id == ada.user_id
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, NEW_PASSWORD, HOME)


async def test_user_without_a_password_is_not_taken_over(identity: LocalIdentity, database: Database) -> None:
    """One of another identity service's, say."""
    await Profiles(database).add(Profile(id="user-1", email=EMAIL, created_at=1.0, updated_at=1.0))
    with pytest.raises(AccountExists):
        await identity.register(EMAIL, PASSWORD, HOME)
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, PASSWORD, HOME)


@pytest.mark.parametrize("password", ["", "1234567", "x" * 1_025, EMAIL, EMAIL.upper()])
async def test_weak_password_makes_no_user(identity: LocalIdentity, database: Database, password: str) -> None:
    with pytest.raises(WeakPassword):
        await identity.register(EMAIL, password, HOME)
    assert await Profiles(database).find_by_email(EMAIL) is None


async def test_registrations_of_one_address_are_limited(database: Database) -> None:
    guard = LoginGuard(GuardConfig(registration=Pace(free=2, first_delay=5.0, longest_delay=5.0, forget=60.0)))
    identity = local_identity(database, guard=guard)
    for number in range(2):
        await identity.register(f"user{number}@example.com", PASSWORD, HOME)
    with pytest.raises(TooManyAttempts):
        await identity.register("user3@example.com", PASSWORD, HOME)
    await identity.register("user3@example.com", PASSWORD, ELSEWHERE)
    await identity.register("user4@example.com", PASSWORD, None)


async def test_registration_is_no_way_round_the_limit_of_guesses(identity: LocalIdentity, ada: Tokens) -> None:
    for number in range(5):
        with pytest.raises(AccountExists):
            await identity.register(EMAIL, f"a wrong guess {number}", f"10.0.0.{number}")
    with pytest.raises(TooManyAttempts):
        await identity.register(EMAIL, PASSWORD, ELSEWHERE)
    with pytest.raises(TooManyAttempts):
        await identity.login(EMAIL, PASSWORD, ELSEWHERE)
    assert (await identity.login(EMAIL, PASSWORD, HOME)).user_id == ada.user_id


# Login ---------------------------------------------------------------------------------------------------------------


async def test_login_begins_another_session(identity: LocalIdentity, ada: Tokens) -> None:
    tokens = await identity.login(EMAIL, PASSWORD, HOME)
    sessions = {(await identity.verify(one.access_token)).session_id for one in (ada, tokens)}
    assert len(sessions) == 2


@pytest.mark.parametrize("password", ["", "wrong", PASSWORD + " ", PASSWORD.upper(), "x" * 5_000, "\0", "' OR 1=1 --"])
async def test_wrong_password(identity: LocalIdentity, ada: Tokens, password: str) -> None:
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, password, HOME)


async def test_unknown_user_gets_the_same_answer_in_the_same_time(database: Database) -> None:
    unlimited = LoginGuard(GuardConfig(account=NO_LIMIT, known=NO_LIMIT, address=NO_LIMIT, everybody=NO_LIMIT))
    identity = local_identity(database, guard=unlimited, policy=PasswordPolicy(memory_kib=4_096))
    await identity.register(EMAIL, PASSWORD, None)
    told, taken = set(), dict[str, list[float]]()
    for _ in range(10):
        for email in (EMAIL, "nobody@example.com", "' OR '1'='1", "\0"):
            begun = time.perf_counter()
            with pytest.raises(InvalidCredentials) as caught:
                await identity.login(email, "a wrong password", HOME)
            taken.setdefault(email, []).append(time.perf_counter() - begun)
            told.add((caught.value.body(), str(caught.value.headers())))
    assert len(told) == 1
    known, *others = (min(times) for times in taken.values())
    for other in others:
        assert known * 0.4 < other < known * 2.5


async def test_guesses_are_slowed_down_and_the_user_at_home_is_not(identity: LocalIdentity, ada: Tokens) -> None:
    for number in range(5):
        with pytest.raises(InvalidCredentials):
            await identity.login(EMAIL, "a wrong password", f"10.0.0.{number}")
    with pytest.raises(TooManyAttempts) as caught:
        await identity.login(EMAIL, PASSWORD, ELSEWHERE)
    assert caught.value.retry_after is not None
    assert (await identity.login(EMAIL, PASSWORD, HOME)).user_id == ada.user_id


async def test_refresh_makes_an_address_known(identity: LocalIdentity, ada: Tokens) -> None:
    """So a restart of the gateway costs the users nothing: they come back by refreshing."""
    await identity.refresh(ada.refresh_token, ELSEWHERE)
    for number in range(5):
        with pytest.raises(InvalidCredentials):
            await identity.login(EMAIL, "a wrong password", f"10.0.0.{number}")
    await identity.login(EMAIL, PASSWORD, ELSEWHERE)


async def test_full_house_is_no_wrong_guess(database: Database) -> None:
    identity = local_identity(
        database,
        guard=LoginGuard(GuardConfig(account=NO_LIMIT, known=NO_LIMIT)),
        policy=PasswordPolicy(memory_kib=1_024, passes=1, threads=1, waiting=2),
    )
    await identity.register(EMAIL, PASSWORD, HOME)
    found = await asyncio.gather(*(identity.login(EMAIL, PASSWORD, HOME) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(one, PasswordsBusy) for one in found) >= 10
    assert sum(isinstance(one, Tokens) for one in found) >= 3
    assert not [one for one in found if not isinstance(one, Tokens | PasswordsBusy)]


async def test_hash_is_renewed_when_its_cost_has_changed(database: Database) -> None:
    before, after = local_identity(database), local_identity(database, policy=PasswordPolicy(memory_kib=32, passes=2))
    await before.register(EMAIL, PASSWORD, HOME)
    assert (await stored_hash(database)).startswith("$argon2id$v=19$m=8,t=1")
    with pytest.raises(InvalidCredentials):
        await after.login(EMAIL, "a wrong password", HOME)
    assert (await stored_hash(database)).startswith("$argon2id$v=19$m=8,t=1")
    await asyncio.gather(*(after.login(EMAIL, PASSWORD, HOME) for _ in range(3)))
    assert (await stored_hash(database)).startswith("$argon2id$v=19$m=32,t=2")
    await after.login(EMAIL, PASSWORD, HOME)


async def stored_hash(database: Database) -> str:
    async with database.read() as connection:
        return str((await connection.execute(select(passwords.c.hash))).scalar_one())


async def test_dead_database_is_never_a_wrong_password() -> None:
    database = LateDatabase()
    identity = local_identity(database)
    tokens = await identity.register(EMAIL, PASSWORD, HOME)
    other = local_identity(database)
    await database.close()
    attempts: list[Callable[[], Awaitable[object]]] = [
        lambda: identity.login(EMAIL, PASSWORD, HOME),
        lambda: identity.register(EMAIL, PASSWORD, HOME),
        lambda: identity.refresh(tokens.refresh_token, HOME),
        lambda: other.verify(tokens.access_token),
    ]
    for attempt in attempts:
        with pytest.raises(StorageUnavailable):
            await attempt()


async def test_no_password_is_in_the_database(address: Address, request: pytest.FixtureRequest) -> None:
    async with opened(address) as database:
        await local_identity(database).register(EMAIL, PASSWORD, HOME)
    stolen = dump(address, request)
    assert EMAIL.encode() in stolen
    for secret in (PASSWORD, PASSWORD.encode().hex(), SECRET_KEY):
        assert secret.encode() not in stolen


async def test_new_password_is_another_one(identity: LocalIdentity) -> None:
    tokens = await identity.register(EMAIL, PASSWORD, HOME)
    verified = await identity.verify(tokens.access_token)
    with pytest.raises(SamePassword) as raised:
        await identity.change_password(tokens.access_token, verified, PASSWORD, PASSWORD)
    assert (raised.value.status, raised.value.code) == (400, "same_password")
    assert (await identity.verify(tokens.access_token)).user_id == tokens.user_id, "no session ends"


# What ends sessions --------------------------------------------------------------------------------------------------


async def ended(identity: LocalIdentity, tokens: Tokens) -> None:
    with pytest.raises(InvalidToken):
        await identity.verify(tokens.access_token)
    with pytest.raises(InvalidRefreshToken):
        await identity.refresh(tokens.refresh_token, HOME)


async def stands(identity: LocalIdentity, tokens: Tokens) -> None:
    assert (await identity.verify(tokens.access_token)).user_id == tokens.user_id


async def test_logout_ends_this_session(identity: LocalIdentity, ada: Tokens) -> None:
    other = await identity.login(EMAIL, PASSWORD, HOME)
    await identity.logout(ada.access_token, await identity.verify(ada.access_token), everywhere=False)
    await ended(identity, ada)
    await stands(identity, other)


async def test_logout_everywhere_ends_all_of_the_users(identity: LocalIdentity, ada: Tokens) -> None:
    other = await identity.login(EMAIL, PASSWORD, HOME)
    bob = await identity.register("bob@example.com", PASSWORD, HOME)
    await identity.logout(ada.access_token, await identity.verify(ada.access_token), everywhere=True)
    await ended(identity, ada)
    await ended(identity, other)
    await stands(identity, bob)


async def test_reused_refresh_token_ends_the_access_tokens_too(database: Database) -> None:
    late = [0.0]
    identity = local_identity(database)
    identity._sessions._now = lambda: time.time() + late[0]
    ada = await identity.register(EMAIL, PASSWORD, HOME)
    after = await identity.refresh(ada.refresh_token, HOME)
    await stands(identity, after)
    late[0] = 60.0
    with pytest.raises(InvalidRefreshToken):
        await identity.refresh(ada.refresh_token, ELSEWHERE)
    await ended(identity, after)


async def test_refresh_token_is_no_access_token_nor_the_other_way_round(identity: LocalIdentity, ada: Tokens) -> None:
    with pytest.raises(InvalidToken):
        await identity.verify(ada.refresh_token)
    with pytest.raises(InvalidRefreshToken):
        await identity.refresh(ada.access_token, HOME)
    await stands(identity, ada)


async def test_changed_password_ends_all_sessions_and_begins_one(identity: LocalIdentity, ada: Tokens) -> None:
    other = await identity.login(EMAIL, PASSWORD, HOME)
    verified = await identity.verify(ada.access_token)
    fresh = await identity.change_password(ada.access_token, verified, PASSWORD, NEW_PASSWORD)
    await ended(identity, ada)
    await ended(identity, other)
    await stands(identity, fresh)
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, PASSWORD, HOME)
    assert (await identity.login(EMAIL, NEW_PASSWORD, HOME)).user_id == ada.user_id


async def test_wrong_current_password_changes_nothing(identity: LocalIdentity, ada: Tokens) -> None:
    verified = await identity.verify(ada.access_token)
    with pytest.raises(InvalidCredentials):
        await identity.change_password(ada.access_token, verified, "a wrong password", NEW_PASSWORD)
    with pytest.raises(WeakPassword) as caught:
        await identity.change_password(ada.access_token, verified, PASSWORD, "short")
    assert caught.value.param == "new_password"
    await stands(identity, ada)
    await identity.login(EMAIL, PASSWORD, HOME)


async def test_stolen_access_token_does_not_help_to_guess_the_password(identity: LocalIdentity, ada: Tokens) -> None:
    verified = await identity.verify(ada.access_token)
    refused = 0
    for _ in range(30):
        try:
            await identity.change_password(ada.access_token, verified, "a wrong password", NEW_PASSWORD)
        except TooManyAttempts:
            refused += 1
        except InvalidCredentials:
            continue
    assert refused == 25
    assert (await identity.login(EMAIL, PASSWORD, HOME)).user_id == ada.user_id


async def test_login_with_the_old_password_does_not_outlive_its_change(database: Database) -> None:
    """A login whose hash is looked at while the password is changed begins no session."""
    unlimited = LoginGuard(GuardConfig(known=NO_LIMIT))
    identity = local_identity(database, guard=unlimited)
    ada = await identity.register(EMAIL, PASSWORD, HOME)
    verified = await identity.verify(ada.access_token)
    logins = [identity.login(EMAIL, PASSWORD, HOME) for _ in range(8)]
    found = await asyncio.gather(
        *logins[:4],
        identity.change_password(ada.access_token, verified, PASSWORD, NEW_PASSWORD),
        *logins[4:],
        return_exceptions=True,
    )
    fresh = found.pop(4)
    assert isinstance(fresh, Tokens)
    for one in found:
        if isinstance(one, Tokens):
            with pytest.raises(InvalidToken):
                await identity.verify(one.access_token)
        else:
            assert isinstance(one, InvalidCredentials)
    await stands(identity, fresh)


async def test_password_set_by_the_operator_ends_all_sessions(identity: LocalIdentity, ada: Tokens) -> None:
    assert await identity.set_password(ada.user_id, NEW_PASSWORD)
    await ended(identity, ada)
    await identity.login(EMAIL, NEW_PASSWORD, HOME)
    assert not await identity.set_password("nobody", NEW_PASSWORD)
    assert not await identity.set_password("\0", NEW_PASSWORD)
    with pytest.raises(WeakPassword):
        await identity.set_password(ada.user_id, "short")


async def test_user_without_a_password_gets_one_from_the_operator(identity: LocalIdentity, database: Database) -> None:
    await Profiles(database).add(Profile(id="user-1", email=EMAIL, created_at=1.0, updated_at=1.0))
    assert await identity.set_password("user-1", PASSWORD)
    assert (await identity.login(EMAIL, PASSWORD, HOME)).user_id == "user-1"


async def test_blocked_user(identity: LocalIdentity, ada: Tokens) -> None:
    await stands(identity, ada)
    await identity.set_blocked(ada.user_id, is_blocked=True)
    for attempt in (identity.login(EMAIL, PASSWORD, HOME), identity.register(EMAIL, PASSWORD, HOME)):
        with pytest.raises(AccountBlocked):
            await attempt
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, "a wrong password", HOME)
    with pytest.raises(AccountBlocked):
        await identity.verify(ada.access_token)
    await identity.set_blocked(ada.user_id, is_blocked=False)
    await ended(identity, ada)
    await stands(identity, await identity.login(EMAIL, PASSWORD, HOME))


async def test_deleted_user(identity: LocalIdentity, ada: Tokens, database: Database) -> None:
    await stands(identity, ada)
    await identity.delete(ada.user_id)
    await ended(identity, ada)
    with pytest.raises(InvalidCredentials):
        await identity.login(EMAIL, PASSWORD, HOME)
    await identity.delete(ada.user_id)
    await Profiles(database).delete(ada.user_id)
    assert (await identity.register(EMAIL, NEW_PASSWORD, HOME)).user_id != ada.user_id


async def test_replicas_accept_each_others_tokens_and_notice_a_logout(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = local_identity(database), local_identity(database)
    tokens = await one.register(EMAIL, PASSWORD, HOME)
    verified = await other.verify(tokens.access_token)
    refreshed = await other.refresh(tokens.refresh_token, HOME)
    await one.logout(refreshed.access_token, verified, everywhere=False)
    await ended(one, refreshed)
    now = time.monotonic()
    monkeypatch.setattr(other._sessions._states, "_clock", lambda: now + 5.0)
    await ended(other, refreshed)


async def test_tokens_of_another_secret_are_strangers(database: Database) -> None:
    one, other = local_identity(database), local_identity(database, secret_key=SECRET_KEY + "!")
    tokens = await one.register(EMAIL, PASSWORD, HOME)
    await ended(other, tokens)
    await stands(one, tokens)
    assert one.jwks() != other.jwks()


async def test_verified_token_costs_little(database: Database) -> None:
    """Each request of the platform pays this."""
    identity = local_identity(database)
    tokens = await identity.register(EMAIL, PASSWORD, HOME)
    await identity.verify(tokens.access_token)
    taken = []
    for _ in range(200):
        begun = time.perf_counter()
        await identity.verify(tokens.access_token)
        taken.append(time.perf_counter() - begun)
    assert statistics.median(taken) < 0.0002


async def test_damaged_hash_is_our_failure_and_no_wrong_password(identity: LocalIdentity, ada: Tokens) -> None:
    async with identity._database.write() as connection:
        await connection.execute(update(passwords).values(hash="damaged"))
    with pytest.raises(InvalidHashError):
        await identity.login(EMAIL, PASSWORD, HOME)


def test_tests_hash_cheaply() -> None:
    assert CHEAP.memory_kib < PasswordPolicy().memory_kib
