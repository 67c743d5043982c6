import json
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any, Final

import msgspec
import pytest
import structlog

from gateway.accounts.brute_force import GuardConfig, LoginGuard
from gateway.accounts.errors import (
    AccountBlocked,
    AccountExists,
    EmailNotConfirmed,
    InvalidCredentials,
    InvalidRefreshToken,
    InvalidToken,
    PasswordElsewhere,
    PasswordRefused,
    TooManyAttempts,
    WeakPassword,
)
from gateway.accounts.identity.protocol import IdentityProvider, NewUser, Tokens, Verified
from gateway.accounts.identity.supabase import SupabaseConfig, SupabaseIdentity
from gateway.errors import GatewayError, InvalidRequest, UpstreamAuthFailed, UpstreamInvalid, UpstreamUnavailable
from gateway.storage.engine import Database
from tests.accounts.identity.signed_tokens import SECRET, SESSION, USER, by_key, by_secret, published
from tests.accounts.recorded_service import RecordedService, Sample, recorded_service, sample

ANON: Final = "sb_publishable_anon"
SERVICE: Final = "sb_secret_service"
SIGNUP: Final = "/auth/v1/signup"
TOKEN: Final = "/auth/v1/token"
LOGOUT: Final = "/auth/v1/logout"
ADMIN: Final = f"/auth/v1/admin/users/{USER}"
JWKS: Final = "/auth/v1/.well-known/jwks.json"
EMAIL: Final = "d1795186692008@ex.com"
ANN: Final = Verified(USER, SESSION, "ann@example.com")
RECORDED_USER: Final = "01a1f977-135c-72fd-a178-c77fa0c53be4"


def refused(status: int, code: str, **headers: str) -> Sample:
    """Return a refusal as supabase/auth writes it for the version of its API that is asked for."""
    return Sample(status, {"code": code, "message": "text"}, {"X-Supabase-Api-Version": "2024-01-01", **headers})


def told(verified: Verified) -> Verified:
    """Return whom a token speaks for, whenever it was issued."""
    assert abs(verified.issued_at - time.time()) < 60
    return msgspec.structs.replace(verified, issued_at=0.0)


@pytest.fixture
async def server() -> AsyncIterator[RecordedService]:
    async with recorded_service() as running:
        yield running


async def identity_of(server: RecordedService, database: Database, **config: Any) -> SupabaseIdentity:
    given = {"anon_key": ANON, "service_key": SERVICE, "jwt_secret": SECRET, "answer": 2.0, **config}
    return SupabaseIdentity(msgspec.convert({"url": f"{server.url}/", **given}, SupabaseConfig), database)


@pytest.fixture
async def identity(server: RecordedService, database: Database) -> AsyncIterator[SupabaseIdentity]:
    made = await identity_of(server, database)
    yield made
    await made.close()


def test_it_is_an_identity_provider(identity: SupabaseIdentity) -> None:
    provider: IdentityProvider = identity
    assert json.loads(provider.jwks()) == {"keys": []}


# Registration --------------------------------------------------------------------------------------------------------


async def test_registration_begins_a_session(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", SIGNUP, sample("supabase/signup"))
    made = await identity.register(EMAIL, "Passw0rd!x", "192.0.2.7")
    assert isinstance(made, Tokens)
    assert (made.user_id, made.email, made.expires_in) == (RECORDED_USER, EMAIL, 3_600)
    assert made.access_token.count(".") == 2
    assert made.refresh_token == "01a1f977-1419-76ff-a8f4-4b5b93ad8c82"
    asked = server.asked("POST", SIGNUP)[0]
    assert asked.json() == {"email": EMAIL, "password": "Passw0rd!x"}
    assert asked.headers["X-Supabase-Api-Version"] == "2024-01-01"


async def test_registration_that_waits_for_a_confirmation(server: RecordedService, identity: SupabaseIdentity) -> None:
    user = {"id": USER, "email": EMAIL, "identities": [{"id": "x"}], "confirmation_sent_at": "2026-11-21T00:00:00Z"}
    server.on("POST", SIGNUP, Sample(200, user))
    assert await identity.register(EMAIL, "Passw0rd!x", "") == NewUser(USER, EMAIL)


async def test_made_up_user_of_a_known_address_is_nobody(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", SIGNUP, Sample(200, {"id": "made-up", "email": EMAIL, "identities": []}))
    assert await identity.register(EMAIL, "Passw0rd!x", "") == NewUser(None, EMAIL)
    assert not server.asked("POST", TOKEN)


async def test_known_address_with_its_password_is_logged_in(
    server: RecordedService, identity: SupabaseIdentity
) -> None:
    server.on("POST", SIGNUP, sample("supabase/signup-dup"))
    server.on("POST", TOKEN, sample("supabase/token-password"))
    made = await identity.register(EMAIL, "Passw0rd!x", "")
    assert isinstance(made, Tokens)
    assert made.user_id == RECORDED_USER


async def test_known_address_with_another_password(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", SIGNUP, sample("supabase/signup-dup"))
    server.on("POST", TOKEN, sample("supabase/token-bad"))
    with pytest.raises(AccountExists):
        await identity.register(EMAIL, "another", "")


async def test_weak_password(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", SIGNUP, sample("supabase/signup-weak"))
    with pytest.raises(PasswordRefused) as raised:
        await identity.register(EMAIL, "1", "")
    assert (raised.value.code, raised.value.param) == ("weak_password", "password")


async def test_operator_makes_a_user_who_need_not_confirm(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", "/auth/v1/admin/users", Sample(200, {"id": RECORDED_USER, "email": EMAIL}))
    server.on("POST", TOKEN, sample("supabase/token-password"))
    made = await identity.register(EMAIL, "Passw0rd!x", None)
    assert isinstance(made, Tokens)
    asked = server.asked("POST", "/auth/v1/admin/users")[0]
    assert asked.json() == {"email": EMAIL, "password": "Passw0rd!x", "email_confirm": True}
    assert (asked.headers["apikey"], asked.headers["Authorization"]) == (SERVICE, f"Bearer {SERVICE}")
    assert not server.asked("POST", SIGNUP)


async def test_operator_whose_service_key_is_refused(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", "/auth/v1/admin/users", refused(403, "bad_jwt"))
    with pytest.raises(UpstreamAuthFailed):
        await identity.register(EMAIL, "Passw0rd!x", None)


async def test_operator_makes_a_user_who_is_there_already(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", "/auth/v1/admin/users", refused(422, "email_exists"))
    server.on("POST", TOKEN, sample("supabase/token-bad"))
    with pytest.raises(AccountExists):
        await identity.register(EMAIL, "Passw0rd!x", None)


async def test_operator_without_a_service_key_signs_up(server: RecordedService, database: Database) -> None:
    identity = await identity_of(server, database, service_key="")
    server.on("POST", SIGNUP, sample("supabase/signup"))
    assert isinstance(await identity.register(EMAIL, "Passw0rd!x", None), Tokens)
    await identity.close()


async def test_guesses_are_slowed_down(server: RecordedService, identity: SupabaseIdentity) -> None:
    """Supabase Auth has no bound of its own by account."""
    server.on("POST", TOKEN, *([refused(400, "invalid_credentials")] * 40))
    found = []
    for _ in range(40):
        with pytest.raises((InvalidCredentials, TooManyAttempts)) as raised:
            await identity.login(EMAIL, "wrong", "192.0.2.7")
        found.append(type(raised.value))
    assert found[:5] == [InvalidCredentials] * 5
    assert found[-1] is TooManyAttempts
    assert len(server.asked("POST", TOKEN)) < 10, "Supabase is asked no more"


async def test_registrations_of_one_address_are_bounded(server: RecordedService, database: Database) -> None:
    config = msgspec.convert({"url": server.url, "anon_key": ANON}, SupabaseConfig)
    pace = msgspec.structs.replace(GuardConfig().registration, free=2)
    identity = SupabaseIdentity(config, database, guard=LoginGuard(GuardConfig(registration=pace)))
    server.on("POST", SIGNUP, *([sample("supabase/signup")] * 4))
    for _ in range(2):
        await identity.register(EMAIL, "Passw0rd!x", "192.0.2.7")
    with pytest.raises(TooManyAttempts):
        await identity.register(EMAIL, "Passw0rd!x", "192.0.2.7")
    await identity.register(EMAIL, "Passw0rd!x", "192.0.2.8")
    await identity.close()


# Sessions ------------------------------------------------------------------------------------------------------------


async def test_login(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, sample("supabase/token-password"))
    tokens = await identity.login(EMAIL, "Passw0rd!x", "192.0.2.7")
    assert (tokens.user_id, tokens.email) == (RECORDED_USER, EMAIL)
    assert server.asked("POST", TOKEN)[0].query == {"grant_type": "password"}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (sample("supabase/token-bad"), InvalidCredentials),
        (refused(400, "email_not_confirmed"), EmailNotConfirmed),
        (refused(400, "user_banned"), AccountBlocked),
        (refused(429, "over_request_rate_limit"), TooManyAttempts),
    ],
)
async def test_login_that_is_refused(
    server: RecordedService, identity: SupabaseIdentity, answer: Sample, kind: type[Exception]
) -> None:
    server.on("POST", TOKEN, answer)
    with pytest.raises(kind):
        await identity.login(EMAIL, "no", "192.0.2.7")


async def test_refresh_gives_a_new_pair(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, sample("supabase/token-password"))
    tokens = await identity.refresh("old", "192.0.2.7")
    assert (tokens.user_id, tokens.email) == (RECORDED_USER, EMAIL)
    asked = server.asked("POST", TOKEN)[0]
    assert (asked.query, asked.json()) == ({"grant_type": "refresh_token"}, {"refresh_token": "old"})


async def test_refresh_token_that_was_used(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, refused(400, "refresh_token_already_used"))
    with pytest.raises(InvalidRefreshToken):
        await identity.refresh("used", "")


async def test_session_of_another_kind_is_502(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, Sample(200, {"access_token": "a"}))
    with pytest.raises(UpstreamInvalid):
        await identity.login(EMAIL, "Passw0rd!x", "")


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_supabase_that_is_down_is_503(server: RecordedService, identity: SupabaseIdentity, status: int) -> None:
    for path in (SIGNUP, TOKEN, LOGOUT, "/auth/v1/user"):
        server.on("POST", path, Sample(status, {"code": status}))
    token = by_secret()
    for asked in (
        identity.register(EMAIL, "x", ""),
        identity.login(EMAIL, "x", ""),
        identity.refresh("x", ""),
        identity.logout(token, ANN, everywhere=False),
    ):
        with pytest.raises(UpstreamUnavailable) as raised:
            await asked
        assert raised.value.headers()["Retry-After"]
    assert (await identity.verify(token)).user_id == USER


# The client's address ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("service_key", "sent"), [(SERVICE, SERVICE), ("eyJ.legacy.key", ANON), ("", ANON)])
async def test_address_goes_along_with_a_key_that_may_tell_it(
    server: RecordedService, service_key: str, sent: str, database: Database
) -> None:
    identity = await identity_of(server, database, service_key=service_key)
    server.on("POST", TOKEN, sample("supabase/token-password"))
    await identity.login(EMAIL, "x", "192.0.2.7")
    headers = server.asked("POST", TOKEN)[0].headers
    assert (headers["Sb-Forwarded-For"], headers["X-Forwarded-For"]) == ("192.0.2.7", "192.0.2.7")
    assert (headers["apikey"], headers["Authorization"]) == (sent, f"Bearer {sent}")
    await identity.close()


async def test_address_that_is_not_known(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, sample("supabase/token-password"))
    await identity.login(EMAIL, "x", "")
    headers = server.asked("POST", TOKEN)[0].headers
    assert not {"Sb-Forwarded-For", "X-Forwarded-For"} & set(headers)
    assert headers["apikey"] == ANON


# Access tokens -------------------------------------------------------------------------------------------------------


async def test_token_is_checked_without_asking(server: RecordedService, identity: SupabaseIdentity) -> None:
    assert told(await identity.verify(by_secret())) == ANN
    assert told(await identity.verify(by_secret(email="", session_id=None))) == Verified(USER, None, None)
    assert server.requests == []


async def test_token_is_checked_by_the_key_set(server: RecordedService, database: Database) -> None:
    identity = await identity_of(server, database, jwt_secret="")
    server.on("GET", JWKS, Sample(200, {"keys": [published()]}))
    assert told(await identity.verify(by_key())) == ANN
    assert told(await identity.verify(by_key())) == ANN
    assert len(server.requests) == 1
    with pytest.raises(InvalidToken):
        await identity.verify(by_secret())
    await identity.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Sample(503), UpstreamUnavailable),
        (Sample(404), UpstreamInvalid),
        (Sample(200, {}), UpstreamInvalid),
        (Sample(200, {"keys": []}), InvalidToken),
    ],
)
async def test_key_set_that_is_not_to_be_had(
    server: RecordedService, answer: Sample, kind: type[Exception], database: Database
) -> None:
    identity = await identity_of(server, database, jwt_secret="")
    server.on("GET", JWKS, answer)
    for _ in range(2):
        with pytest.raises(kind):
            await identity.verify(by_key())
    assert len(server.requests) == 1
    await identity.close()


# Logout --------------------------------------------------------------------------------------------------------------


async def test_logout_ends_this_session_here_at_once(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", LOGOUT, Sample(204))
    token = by_secret()
    await identity.logout(token, ANN, everywhere=False)
    asked = server.asked("POST", LOGOUT)[0]
    assert (asked.query, asked.headers["Authorization"]) == ({"scope": "local"}, f"Bearer {token}")
    with pytest.raises(InvalidToken):
        await identity.verify(token)
    assert (await identity.verify(by_secret(session_id="another"))).session_id == "another"


async def test_logout_everywhere_ends_all_that_began_before(
    server: RecordedService, identity: SupabaseIdentity
) -> None:
    """By Supabase's own clock, which is a minute behind here."""
    now = int(time.time())
    server.on("POST", LOGOUT, Sample(204, headers={"Date": formatdate(now - 60, usegmt=True)}))
    await identity.logout(by_secret(), ANN, everywhere=True)
    assert server.asked("POST", LOGOUT)[0].query == {"scope": "global"}
    for old in (by_secret(), by_secret(session_id="older", iat=now - 61)):
        with pytest.raises(InvalidToken):
            await identity.verify(old)
    assert (await identity.verify(by_secret(session_id="new", iat=now - 60))).session_id == "new"
    assert (await identity.verify(by_secret(sub="bob", session_id="his", iat=now - 600))).user_id == "bob"


@pytest.mark.parametrize("code", ["session_not_found", "user_not_found", "bad_jwt"])
async def test_session_that_is_over_already(server: RecordedService, identity: SupabaseIdentity, code: str) -> None:
    server.on("POST", LOGOUT, refused(403, code))
    await identity.logout(by_secret(), ANN, everywhere=False)
    with pytest.raises(InvalidToken):
        await identity.verify(by_secret())


async def test_logout_that_is_refused(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", LOGOUT, refused(400, "validation_failed"))
    with pytest.raises(InvalidRequest):
        await identity.logout(by_secret(), ANN, everywhere=False)
    assert told(await identity.verify(by_secret())) == ANN


# Password ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [[Sample(204)], [refused(403, "bad_jwt")], [Sample(503)]])
async def test_password_is_changed_in_a_new_session(
    server: RecordedService, identity: SupabaseIdentity, answers: list[Sample]
) -> None:
    server.on("POST", TOKEN, sample("supabase/token-password"))
    server.on("PUT", "/auth/v1/user", Sample(200, {"id": USER}))
    server.on("POST", LOGOUT, *answers)
    tokens = await identity.change_password(by_secret(), ANN, "Passw0rd!x", "An0ther!x")
    assert server.asked("POST", TOKEN)[0].json() == {"email": "ann@example.com", "password": "Passw0rd!x"}
    asked = server.asked("PUT", "/auth/v1/user")[0]
    assert asked.json() == {"password": "An0ther!x", "current_password": "Passw0rd!x"}
    assert asked.headers["Authorization"] == f"Bearer {tokens.access_token}"
    ended = server.asked("POST", LOGOUT)[0]
    assert (ended.query, ended.headers["Authorization"]) == ({"scope": "others"}, f"Bearer {tokens.access_token}")
    with pytest.raises(InvalidToken):
        await identity.verify(by_secret())


async def test_wrong_current_password(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("POST", TOKEN, sample("supabase/token-bad"))
    with pytest.raises(InvalidCredentials):
        await identity.change_password(by_secret(), ANN, "wrong", "An0ther!x")
    assert not server.asked("PUT", "/auth/v1/user")
    assert told(await identity.verify(by_secret())) == ANN


async def test_new_password_that_is_refused_leaves_no_session(
    server: RecordedService, identity: SupabaseIdentity
) -> None:
    server.on("POST", TOKEN, sample("supabase/token-password"))
    server.on("PUT", "/auth/v1/user", refused(422, "weak_password"))
    server.on("POST", LOGOUT, Sample(204))
    with pytest.raises(PasswordRefused):
        await identity.change_password(by_secret(), ANN, "Passw0rd!x", "1")
    begun = sample("supabase/token-password").response["access_token"]
    assert server.asked("POST", LOGOUT)[0].headers["Authorization"] == f"Bearer {begun}"
    assert told(await identity.verify(by_secret())) == ANN


async def test_address_that_the_token_does_not_tell(server: RecordedService, identity: SupabaseIdentity) -> None:
    server.on("GET", "/auth/v1/user", Sample(200, {"id": USER, "email": EMAIL}))
    server.on("POST", TOKEN, sample("supabase/token-bad"))
    with pytest.raises(InvalidCredentials):
        await identity.change_password(by_secret(), Verified(USER, None, None), "wrong", "An0ther!x")
    assert server.asked("POST", TOKEN)[0].json()["email"] == EMAIL


# Administration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [Sample(200, {}), refused(404, "user_not_found")])
async def test_user_is_deleted(server: RecordedService, identity: SupabaseIdentity, answer: Sample) -> None:
    server.on("DELETE", ADMIN, answer)
    await identity.delete(USER)
    asked = server.asked("DELETE", ADMIN)[0]
    assert (asked.headers["apikey"], asked.headers["Authorization"]) == (SERVICE, f"Bearer {SERVICE}")


async def test_account_stays_at_supabase_without_a_service_key(server: RecordedService, database: Database) -> None:
    """The deletion here goes on to its end: it could never finish otherwise."""
    identity = await identity_of(server, database, service_key="")
    with structlog.testing.capture_logs() as logs:
        await identity.delete(USER)
    assert ["SUPABASE_SERVICE_KEY" in line["event"] for line in logs] == [True]
    assert server.requests == []
    await identity.close()


@pytest.mark.parametrize(
    "answer", [refused(403, "not_admin"), refused(401, "no_authorization"), Sample(403, {"message": "Invalid API key"})]
)
async def test_service_key_that_is_refused(server: RecordedService, identity: SupabaseIdentity, answer: Sample) -> None:
    server.on("DELETE", ADMIN, answer)
    with pytest.raises(UpstreamAuthFailed):
        await identity.delete(USER)


async def test_id_of_a_user_is_no_path(server: RecordedService, identity: SupabaseIdentity) -> None:
    with pytest.raises(UpstreamInvalid):
        await identity.delete("../../signup")
    assert [request.path for request in server.requests] == ["/auth/v1/admin/users/../../signup"]


async def test_blocked_user_is_banned_and_their_sessions_end(
    server: RecordedService, identity: SupabaseIdentity
) -> None:
    server.on("PUT", ADMIN, Sample(200, {"id": USER}, {"Date": formatdate(usegmt=True)}))
    await identity.set_blocked(USER, is_blocked=True)
    assert server.asked("PUT", ADMIN)[0].json() == {"ban_duration": "876000h"}
    with pytest.raises(InvalidToken):
        await identity.verify(by_secret(iat=int(time.time()) - 5))
    await identity.set_blocked(USER, is_blocked=False)
    assert server.asked("PUT", ADMIN)[1].json() == {"ban_duration": "none"}
    assert (await identity.verify(by_secret(session_id="new", iat=int(time.time()) + 2))).session_id == "new"


async def test_password_that_the_operator_sets_ends_the_sessions(
    server: RecordedService, identity: SupabaseIdentity
) -> None:
    server.on("PUT", ADMIN, Sample(200, {"id": USER}, {"Date": formatdate(usegmt=True)}))
    assert await identity.set_password(USER, "another fine password")
    assert server.asked("PUT", ADMIN)[0].json() == {"password": "another fine password"}
    with pytest.raises(InvalidToken):
        await identity.verify(by_secret(iat=int(time.time()) - 5))


@pytest.mark.parametrize(
    ("answer", "error"),
    [(refused(422, "weak_password"), WeakPassword), (refused(404, "user_not_found"), None)],
)
async def test_password_that_the_operator_cannot_set(
    server: RecordedService, identity: SupabaseIdentity, answer: Sample, error: type[GatewayError] | None
) -> None:
    server.on("PUT", ADMIN, answer)
    if error is None:
        assert not await identity.set_password(USER, "12345678")
    else:
        with pytest.raises(error):
            await identity.set_password(USER, "12345678")
    assert (await identity.verify(by_secret(iat=int(time.time()) - 5))).user_id == USER


async def test_password_without_a_service_key_is_set_elsewhere(server: RecordedService, database: Database) -> None:
    identity = await identity_of(server, database, service_key="")
    with pytest.raises(PasswordElsewhere):
        await identity.set_password(USER, "another fine password")
    assert server.requests == []
    await identity.close()


async def test_block_without_a_service_key_ends_sessions_here(server: RecordedService, database: Database) -> None:
    identity = await identity_of(server, database, service_key="")
    old = by_secret(iat=int(time.time()) - 5)
    await identity.set_blocked(USER, is_blocked=True)
    assert server.requests == []
    with pytest.raises(InvalidToken):
        await identity.verify(old)
    await identity.close()


def test_keys_are_not_shown() -> None:
    shown = repr(SupabaseConfig("https://x", ANON, SERVICE, SECRET))
    assert not any(secret in shown for secret in (ANON, SERVICE, SECRET))
