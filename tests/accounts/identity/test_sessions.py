import asyncio

import pytest
import structlog
from sqlalchemy import func, select

from gateway.accounts.errors import AccountBlocked, InvalidRefreshToken
from gateway.accounts.identity.sessions import LIFETIME, PREFIX, REMEMBERED, REPEAT, Begun, Sessions
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.secrets import Secrets
from gateway.storage.address import Address
from gateway.storage.engine import Database
from gateway.storage.tables import refresh_tokens
from tests.accounts.dumps import dump
from tests.accounts.identities import SECRET_KEY, Clock
from tests.storage.databases import opened
from tests.storage.late import LateDatabase


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)


@pytest.fixture
async def sessions(database: Database, clock: Clock) -> Sessions:
    await add_user(database, "ada")
    return Sessions(database, Secrets.from_key(SECRET_KEY), clock)


async def add_user(database: Database, name: str) -> None:
    profile = Profile(id=name, email=f"{name}@example.com", created_at=1.0, updated_at=1.0)
    assert await Profiles(database).add(profile)


async def begin(sessions: Sessions, user_id: str = "ada") -> Begun:
    async with sessions._database.write() as connection:
        return await sessions.begin(connection, user_id, f"{user_id}@example.com")


async def refused(sessions: Sessions, token: str) -> None:
    with pytest.raises(InvalidRefreshToken):
        await sessions.refresh(token)


# Refreshing ----------------------------------------------------------------------------------------------------------


async def test_session_goes_on_by_new_tokens(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    seen = {begun.refresh_token}
    for _ in range(5):
        clock.now += 900
        after = await sessions.refresh(begun.refresh_token)
        assert (after.id, after.user_id, after.email) == (begun.id, "ada", "ada@example.com")
        assert after.refresh_token not in seen
        seen.add(after.refresh_token)
        begun = after
    assert await sessions.state(begun.id, "ada") == "live"


async def test_used_token_ends_the_whole_session(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    stays = await begin(sessions)
    after = await sessions.refresh(begun.refresh_token)
    clock.now += REPEAT + 1
    with structlog.testing.capture_logs() as logs:
        await refused(sessions, begun.refresh_token)
    assert logs == [{"event": "refresh token used twice, session ended", "user": "ada", "log_level": "warning"}]
    await refused(sessions, after.refresh_token)
    assert await sessions.state(begun.id, "ada") == "ended"
    assert await sessions.state(stays.id, "ada") == "live"


async def test_token_used_long_ago_ends_the_session_too(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    token = begun.refresh_token
    for _ in range(50):
        clock.now += 3_600
        token = (await sessions.refresh(token)).refresh_token
    await refused(sessions, begun.refresh_token)
    await refused(sessions, token)


async def test_lost_answer_is_given_again_within_some_seconds(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    await sessions.refresh(begun.refresh_token)
    clock.now += REPEAT - 1
    again = await sessions.refresh(begun.refresh_token)
    clock.now += 900
    assert (await sessions.refresh(again.refresh_token)).id == begun.id


async def test_clients_tabs_that_refresh_at_once_stay_logged_in(sessions: Sessions, clock: Clock) -> None:
    """They share one store: whichever answer was stored last is used from then on."""
    begun = await begin(sessions)
    answers = await asyncio.gather(*(sessions.refresh(begun.refresh_token) for _ in range(4)))
    assert len({answer.refresh_token for answer in answers}) == 4
    clock.now += 900
    after = await sessions.refresh(answers[2].refresh_token)
    clock.now += 900
    assert (await sessions.refresh(after.refresh_token)).id == begun.id


async def test_thief_who_repeats_in_time_is_found_out_by_the_next_use(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    owners = await sessions.refresh(begun.refresh_token)
    thiefs = await sessions.refresh(begun.refresh_token)
    clock.now += 900
    await sessions.refresh(thiefs.refresh_token)
    clock.now += 60
    await refused(sessions, owners.refresh_token)
    assert await sessions.state(begun.id, "ada") == "ended"


async def test_session_has_an_end_however_often_it_is_refreshed(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    token = begun.refresh_token
    for _ in range(29):
        clock.now += 86_400
        token = (await sessions.refresh(token)).refresh_token
    clock.now += LIFETIME - 29 * 86_400
    await refused(sessions, token)
    assert await sessions.state(begun.id, "ada") == "ended"


async def test_clock_that_steps_back_logs_nobody_out(sessions: Sessions, clock: Clock) -> None:
    begun = await begin(sessions)
    clock.now += 900
    after = await sessions.refresh(begun.refresh_token)
    clock.now -= 3_600
    last = await sessions.refresh(after.refresh_token)
    assert await sessions.state(begun.id, "ada") == "live"
    with pytest.raises(InvalidRefreshToken):
        await sessions.refresh(begun.refresh_token)
    await refused(sessions, last.refresh_token)


async def test_tokens_are_not_piled_up(sessions: Sessions, clock: Clock, database: Database) -> None:
    token = (await begin(sessions)).refresh_token
    for _ in range(30):
        clock.now += 900
        token = (await sessions.refresh(token)).refresh_token
    async with database.read() as connection:
        kept = (await connection.execute(select(func.count()).select_from(refresh_tokens))).scalar_one()
    assert kept <= 2


async def test_blocked_user_does_not_go_on(sessions: Sessions, database: Database) -> None:
    begun = await begin(sessions)
    await Profiles(database).change("ada", is_blocked=True)
    for _ in range(2):
        with pytest.raises(AccountBlocked):
            await sessions.refresh(begun.refresh_token)
    await Profiles(database).change("ada", is_blocked=False)
    assert (await sessions.refresh(begun.refresh_token)).id == begun.id


async def test_deleted_user_does_not_go_on(sessions: Sessions, database: Database) -> None:
    begun = await begin(sessions)
    await Profiles(database).delete("ada")
    await refused(sessions, begun.refresh_token)


async def test_token_of_one_session_does_not_fit_another(sessions: Sessions) -> None:
    one, other = await begin(sessions), await begin(sessions)
    head, secret = len(PREFIX), len(PREFIX) + 32
    swapped = one.refresh_token[:head] + other.refresh_token[head:secret] + one.refresh_token[secret:]
    await refused(sessions, swapped)
    assert [await sessions.state(begun.id, "ada") for begun in (one, other)] == ["live", "live"]


async def test_what_was_made_up_never_reaches_the_database() -> None:
    """Neither does it end a session whose id is known."""
    database = LateDatabase()
    await database.close()
    sessions = Sessions(database, Secrets.from_key(SECRET_KEY))
    stranger = Secrets.from_key(SECRET_KEY + "!").with_check(PREFIX + "0" * 32 + "a" * 43)
    for token in ("", PREFIX, stranger, "\ud800" * len(stranger), "a.b.c", "x" * 1_000_000, stranger + "\0"):
        await refused(sessions, token)


async def test_no_token_is_in_the_database(address: Address, request: pytest.FixtureRequest) -> None:
    async with opened(address) as database:
        await add_user(database, "ada")
        sessions = Sessions(database, Secrets.from_key(SECRET_KEY))
        tokens = [(await begin(sessions)).refresh_token for _ in range(5)]
        tokens += [(await sessions.refresh(token)).refresh_token for token in tokens]
    stolen = dump(address, request)
    for token in tokens:
        assert token[len(PREFIX) + 32 :].encode() not in stolen
        assert token[len(PREFIX) : len(PREFIX) + 32].encode() in stolen


# Ending --------------------------------------------------------------------------------------------------------------


async def test_ended_session_is_ended_at_once(sessions: Sessions) -> None:
    ends, stays = await begin(sessions), await begin(sessions)
    for begun in (ends, stays):
        assert await sessions.state(begun.id, "ada") == "live"
    await sessions.end(ends.id, "ada")
    assert await sessions.state(ends.id, "ada") == "ended"
    assert await sessions.state(stays.id, "ada") == "live"
    await refused(sessions, ends.refresh_token)
    await sessions.end(ends.id, "ada")


async def test_session_is_its_users_alone(sessions: Sessions, database: Database) -> None:
    await add_user(database, "bob")
    begun = await begin(sessions)
    assert await sessions.state(begun.id, "bob") == "ended"
    await sessions.end(begun.id, "bob")
    assert await sessions.state(begun.id, "ada") == "live"


async def test_state_of_a_blocked_user_and_of_nobody(sessions: Sessions, database: Database) -> None:
    begun = await begin(sessions)
    await Profiles(database).change("ada", is_blocked=True)
    assert await sessions.state(begun.id, "ada") == "blocked"
    assert await sessions.state("0" * 32, "ada") == "blocked"
    assert await sessions.state(begun.id, "nobody") == "ended"


async def test_other_gateways_notice_within_seconds(
    sessions: Sessions, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Sessions(database, Secrets.from_key(SECRET_KEY), clock)
    ticks = Clock(50.0)
    monkeypatch.setattr(replica._states, "_clock", ticks)
    begun = await begin(sessions)
    assert await replica.state(begun.id, "ada") == "live"
    await sessions.end(begun.id, "ada")
    assert REMEMBERED <= 5
    ticks.now += REMEMBERED
    assert await replica.state(begun.id, "ada") == "ended"


async def test_logout_between_a_look_and_its_answer_counts(sessions: Sessions) -> None:
    """However the two fall together, nobody remembers afterwards that the session stood."""
    for _ in range(20):
        begun = await begin(sessions)
        await asyncio.gather(
            sessions.state(begun.id, "ada"), sessions.end(begun.id, "ada"), sessions.state(begun.id, "ada")
        )
        assert await sessions.state(begun.id, "ada") == "ended"


async def test_logout_and_refresh_at_once_do_not_wait_for_each_other(sessions: Sessions) -> None:
    for _ in range(10):
        begun = await begin(sessions)
        found = await asyncio.gather(
            sessions.refresh(begun.refresh_token),
            sessions.end(begun.id, "ada"),
            sessions.refresh(begun.refresh_token),
            return_exceptions=True,
        )
        assert found[1] is None
        assert all(isinstance(one, Begun | InvalidRefreshToken) for one in (found[0], found[2])), found
        assert await sessions.state(begun.id, "ada") == "ended"
        await refused(sessions, begun.refresh_token)


async def test_old_sessions_are_purged(sessions: Sessions, clock: Clock, database: Database) -> None:
    old = await begin(sessions)
    clock.now += LIFETIME - 10
    young = await begin(sessions)
    clock.now += 20
    await sessions.purge(clock.now)
    async with database.read() as connection:
        rows = (await connection.execute(select(refresh_tokens.c.session_id))).scalars().all()
    assert rows == [young.id]
    await refused(sessions, old.refresh_token)
