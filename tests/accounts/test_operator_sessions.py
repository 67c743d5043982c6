import pytest

from gateway.accounts.errors import TooManyAttempts
from gateway.accounts.operator_sessions import LIFETIME, OperatorSessions
from gateway.errors import AuthenticationFailed, Forbidden, StorageUnavailable
from gateway.storage.address import Address
from gateway.storage.engine import Database
from tests.storage.databases import opened
from tests.storage.late import LateDatabase

SECRET = b"s" * 32
KEY = "sk-operator"
HERE = "203.0.113.7"


def sessions(
    database: Database | None = None, *, secret: bytes = SECRET, key: str = KEY, now: float = 1_000.0
) -> OperatorSessions:
    return OperatorSessions(database or LateDatabase(), secret, key, now=lambda: now)


async def test_session_is_known_by_all_that_share_secret_and_key() -> None:
    session, cookie = await sessions().begin(KEY, HERE)
    assert sessions().find(cookie) == session
    assert session.expires_at == 1_000.0 + LIFETIME
    assert sessions(secret=b"t" * 32).find(cookie) is None
    assert sessions(key="another").find(cookie) is None
    assert sessions(key="").find(cookie) is None
    assert KEY not in cookie


async def test_sessions_are_told_apart() -> None:
    known = sessions()
    (one, _), (other, _) = await known.begin(KEY, HERE), await known.begin(KEY, HERE)
    assert len({one.id, other.id, one.csrf_token, other.csrf_token}) == 4
    assert known.is_token_of(one, one.csrf_token)
    for given in ("", other.csrf_token, one.id, one.csrf_token.upper(), "\udcff"):
        assert not known.is_token_of(one, given)


@pytest.mark.parametrize("cookie", [None, "", ".", "..", "...", "a.b.c", "a.1.\udcff", "x" * 10_000])
def test_cookie_that_is_none_of_ours(cookie: str | None) -> None:
    assert sessions().find(cookie) is None


async def test_cookie_with_a_later_end_is_forged() -> None:
    _, cookie = await sessions().begin(KEY, HERE)
    session_id, expires_at, signature = cookie.split(".")
    assert sessions().find(f"{session_id}.{int(expires_at) + 1}.{signature}") is None
    assert sessions(now=float(expires_at) - 1).find(cookie) is not None
    assert sessions(now=float(expires_at)).find(cookie) is None


async def test_csrf_token_is_no_signature_of_a_cookie() -> None:
    session, cookie = await sessions().begin(KEY, HERE)
    forged = ".".join([*cookie.split(".")[:2], session.csrf_token])
    assert sessions().find(forged) is None


async def test_guesses_are_slowed_down_by_address() -> None:
    known = sessions()
    for _ in range(5):
        with pytest.raises(AuthenticationFailed):
            await known.begin("guess", HERE)
    with pytest.raises((AuthenticationFailed, TooManyAttempts)):
        await known.begin("guess", HERE)
    with pytest.raises(TooManyAttempts):
        await known.begin(KEY, HERE)
    assert await known.begin(KEY, "198.51.100.9")


async def test_without_a_key_nobody_comes_in() -> None:
    with pytest.raises(Forbidden):
        await sessions(key="").begin("", HERE)


async def test_ended_session_is_over_everywhere_and_after_a_restart(address: Address) -> None:
    async with opened(address) as database:
        here, elsewhere = sessions(database), sessions(database)
        session, cookie = await here.begin(KEY, HERE)
        await here.end(session)
        assert here.find(cookie) is None
        assert elsewhere.find(cookie) == session
        await elsewhere.load()
        assert elsewhere.find(cookie) is None
        await here.end(session)


async def test_session_has_ended_here_though_it_cannot_be_written_down() -> None:
    database = LateDatabase()
    known = sessions(database)
    session, cookie = await known.begin(KEY, HERE)
    await database.close()
    with pytest.raises(StorageUnavailable):
        await known.end(session)
    assert known.find(cookie) is None
