import time

import pytest

from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.billing.local import LocalBilling
from gateway.accounts.credentials import REMEMBERED, Caller, UserCredentials
from gateway.accounts.deletion import Deletion
from gateway.accounts.errors import AccountBlocked, DeletionUnfinished, InvalidToken
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.protocol import Tokens, Verified
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.registration import Registration
from gateway.accounts.secrets import Secrets
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.accounts.user_keys import UserKey, UserKeys
from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import ScriptedBackend
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from tests.accounts.faults import Faults, FaultyIdentity
from tests.accounts.identities import EMAIL, HOME, PASSWORD, SECRET_KEY, local_identity


class Platform:
    """What credentials are made of, on one database; ``completed`` are the users that registration was asked for."""

    def __init__(self, database: Database) -> None:
        self.identity: LocalIdentity = local_identity(database)
        self.profiles = Profiles(database)
        self.keys = UserKeys(database, Secrets.from_key(SECRET_KEY))
        self.completed: list[Verified] = []
        self.credentials = UserCredentials(self.identity, self.keys, self.profiles, self._complete)

    async def _complete(self, verified: Verified) -> Profile:
        self.completed.append(verified)
        profile = Profile(id=verified.user_id, email=verified.email or "", created_at=1.0, updated_at=1.0)
        await self.profiles.add(profile)
        return profile


@pytest.fixture
def platform(database: Database) -> Platform:
    return Platform(database)


@pytest.fixture
async def ada(platform: Platform) -> Tokens:
    return await platform.identity.register(EMAIL, PASSWORD, HOME)


async def test_caller_by_access_token(platform: Platform, ada: Tokens) -> None:
    caller = await platform.credentials.caller_of_token(ada.access_token)
    session_id = (await platform.identity.verify(ada.access_token)).session_id
    assert caller == Caller(ada.user_id, ada.user_id, None, session_id)
    assert platform.completed == []


async def test_caller_by_personal_key(platform: Platform, ada: Tokens) -> None:
    key, plaintext = await platform.keys.make(ada.user_id, "laptop")
    for _ in range(2):
        assert await platform.credentials.caller_of_key(plaintext) == Caller(ada.user_id, ada.user_id, key.id, None)


async def test_credential_that_is_nobodys(platform: Platform, ada: Tokens) -> None:
    for made_up in ("sk-lg-", "sk-lg-" + "a" * 51, ada.access_token, ada.refresh_token):
        assert await platform.credentials.caller_of_key(made_up) is None
    _, plaintext = await platform.keys.make(ada.user_id, "laptop")
    for made_up in ("", plaintext, ada.refresh_token):
        with pytest.raises(InvalidToken):
            await platform.credentials.caller_of_token(made_up)


async def test_deleted_key_is_refused_as_soon_as_it_is_forgotten(platform: Platform, ada: Tokens) -> None:
    key, plaintext = await platform.keys.make(ada.user_id, "laptop")
    _, other = await platform.keys.make(ada.user_id, "desktop")
    for one in (plaintext, other):
        assert await platform.credentials.caller_of_key(one) is not None
    await platform.keys.delete(ada.user_id, key.id)
    platform.credentials.forget(ada.user_id)
    assert await platform.credentials.caller_of_key(plaintext) is None
    assert await platform.credentials.caller_of_key(other) is not None


async def test_other_gateways_notice_a_deleted_key_within_seconds(
    platform: Platform, ada: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, plaintext = await platform.keys.make(ada.user_id, "laptop")
    assert await platform.credentials.caller_of_key(plaintext) is not None
    await platform.keys.delete(ada.user_id, key.id)
    platform.credentials._callers._clock = lambda: float("inf")
    assert await platform.credentials.caller_of_key(plaintext) is None


async def test_refusal_is_not_looked_up_again_for_some_seconds(
    platform: Platform, ada: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, plaintext = await platform.keys.make(ada.user_id, "laptop")
    await platform.keys.delete(ada.user_id, key.id)
    find, asked = platform.keys.find, list[str]()

    async def counted(plaintext: str) -> UserKey | None:
        asked.append(plaintext)
        return await find(plaintext)

    monkeypatch.setattr(platform.keys, "find", counted)
    for _ in range(3):
        assert await platform.credentials.caller_of_key(plaintext) is None
    assert len(asked) == 1
    _, new = await platform.keys.make(ada.user_id, "another")
    assert await platform.credentials.caller_of_key(new) is not None
    now = time.monotonic()
    platform.credentials._refused._clock = lambda: now + REMEMBERED + 1
    assert await platform.credentials.caller_of_key(plaintext) is None
    assert len(asked) == 3


async def test_deleted_user_of_an_identity_service_is_not_looked_up_again_for_some_seconds(
    platform: Platform, ada: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their token holds for up to an hour, and the service is not asked about it."""
    asked = []

    async def good(_: str) -> Verified:
        return Verified(ada.user_id, None, EMAIL)

    async def deleted(verified: Verified) -> Profile:
        asked.append(verified)
        raise InvalidToken

    monkeypatch.setattr(platform.identity, "verify", good)
    monkeypatch.setattr(platform.credentials, "_complete", deleted)
    await platform.profiles.delete(ada.user_id)
    for _ in range(3):
        with pytest.raises(InvalidToken):
            await platform.credentials.caller_of_token(ada.access_token)
    assert len(asked) == 1
    platform.credentials.forget(ada.user_id)
    monkeypatch.setattr(platform.credentials, "_complete", platform._complete)
    assert (await platform.credentials.caller_of_token(ada.access_token)).user_id == ada.user_id


async def test_blocked_user_is_told_so_by_either_way(platform: Platform, ada: Tokens) -> None:
    _, plaintext = await platform.keys.make(ada.user_id, "laptop")
    await platform.credentials.caller_of_key(plaintext)
    await platform.credentials.caller_of_token(ada.access_token)
    await platform.identity.set_blocked(ada.user_id, is_blocked=True)
    platform.credentials.forget(ada.user_id)
    with pytest.raises(AccountBlocked):
        await platform.credentials.caller_of_key(plaintext)
    with pytest.raises(AccountBlocked):
        await platform.credentials.caller_of_token(ada.access_token)
    await platform.identity.set_blocked(ada.user_id, is_blocked=False)
    platform.credentials.forget(ada.user_id)
    assert await platform.credentials.caller_of_key(plaintext) is not None


async def test_deleted_user_has_no_credentials(platform: Platform, ada: Tokens) -> None:
    _, plaintext = await platform.keys.make(ada.user_id, "laptop")
    await platform.credentials.caller_of_key(plaintext)
    await platform.identity.delete(ada.user_id)
    await platform.profiles.delete(ada.user_id)
    platform.credentials.forget(ada.user_id)
    assert await platform.credentials.caller_of_key(plaintext) is None
    with pytest.raises(InvalidToken):
        await platform.credentials.caller_of_token(ada.access_token)
    assert platform.completed == []


async def test_user_whom_only_the_identity_service_knows_gets_a_profile(database: Database) -> None:
    platform = Platform(database)
    credentials = UserCredentials(Elsewhere(), platform.keys, platform.profiles, platform._complete)
    for _ in range(2):
        assert await credentials.caller_of_token("token of eve") == Caller("eve", "eve", None, "session")
    assert platform.completed == [Verified("eve", "session", "eve@example.com")]


async def test_token_that_tells_another_address_completes_the_profile_again(database: Database) -> None:
    platform = Platform(database)
    eve = Profile(id="eve", email="eve@before.example.com", created_at=1.0, updated_at=1.0)
    assert await platform.profiles.add(eve)
    credentials = UserCredentials(Elsewhere(), platform.keys, platform.profiles, platform._complete)
    await credentials.caller_of_token("token of eve")
    assert platform.completed == [Verified("eve", "session", "eve@example.com")]


async def test_token_of_a_user_whose_deletion_is_under_way(database: Database) -> None:
    """An identity service's token stays valid: what is left of the profile is blocked, and none is made anew."""
    gone, faults = "token of eve", Faults()
    platform, identity, backend = Platform(database), FaultyIdentity(faults), ScriptedBackend()
    agents = PersonalAgents(
        backend=backend,
        profiles=platform.profiles,
        billing=LocalBilling({}),
        database=database,
        config=AgentConfig(),
        stopping=Stopping(database, NoTurns),
        tasks=TaskSet(),
    )
    gateways: list[UserCredentials] = []

    def forget(user_id: str) -> None:
        gateways[0].forget(user_id)

    deletion = Deletion(
        database=database,
        identity=identity,
        profiles=platform.profiles,
        agents=agents,
        billing=LocalBilling({}),
        stopping=Stopping(database, NoTurns),
        forget=forget,
    )
    registration = Registration(
        identity=identity,
        profiles=platform.profiles,
        agents=agents,
        deletion=deletion,
        is_open=lambda: True,
    )
    for _ in range(2):
        gateways.append(UserCredentials(Elsewhere(), platform.keys, platform.profiles, registration.complete))
        assert (await gateways[-1].caller_of_token(gone)).user_id == "eve"
    here, elsewhere = gateways

    backend.down = UpstreamUnavailable()
    with pytest.raises(DeletionUnfinished):
        await deletion.delete("eve")
    with pytest.raises(AccountBlocked):
        await here.caller_of_token(gone)
    elsewhere._standings._clock = lambda: time.monotonic() + REMEMBERED
    with pytest.raises(AccountBlocked):
        await elsewhere.caller_of_token(gone)

    backend.down = None
    await deletion.delete("eve")
    elsewhere._standings._clock = lambda: time.monotonic() + 3 * REMEMBERED
    for gateway in gateways:
        with pytest.raises(InvalidToken):
            await gateway.caller_of_token(gone)
    assert await platform.profiles.find("eve") is None


class Elsewhere:
    """An identity service that knows everybody who names themselves."""

    async def verify(self, access_token: str) -> Verified:
        name = access_token.removeprefix("token of ")
        return Verified(name, "session", f"{name}@example.com")
