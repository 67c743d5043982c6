import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway import keys
from gateway.accounts.billing.litellm import LitellmBilling
from gateway.accounts.billing.local import LocalBilling
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.supabase import SupabaseIdentity
from gateway.accounts.profiles import Budget
from gateway.letta.scripted import ScriptedBackend
from gateway.live_settings.current import LiveSettings
from gateway.server.accounts import Accounts, account_secrets, default_budget, is_registration_open
from gateway.server.app import build_app
from gateway.settings import Price, SettingError, Settings
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from tests.server.people import town
from tests.server.running import settings
from tests.storage.late import late_database

SUPABASE = {"identity": "supabase", "supabase_url": "https://p.supabase.co", "supabase_anon_key": "sb_publishable"}
LITELLM = {
    "billing": "litellm",
    "litellm_base_url": "http://litellm.invalid",
    "litellm_master_key": "sk-master",
    "user_model": "gpt-5",
}


async def built(**chosen: Any) -> tuple[type, type]:
    """Return what identity and billing are."""
    async with late_database() as database:
        accounts = Accounts(LiveSettings(settings(**chosen)), database, ScriptedBackend(), TaskSet())
        kinds = type(accounts.identity), type(accounts.billing)
        await accounts.close()
    return kinds


@pytest.mark.parametrize(
    ("chosen", "kinds"),
    [
        ({}, (LocalIdentity, LocalBilling)),
        (SUPABASE, (SupabaseIdentity, LocalBilling)),
        (LITELLM, (LocalIdentity, LitellmBilling)),
        ({**SUPABASE, **LITELLM}, (SupabaseIdentity, LitellmBilling)),
    ],
    ids=["embedded", "supabase", "litellm", "both"],
)
async def test_settings_choose_who_knows_passwords_and_prices(chosen: dict[str, Any], kinds: tuple[type, type]) -> None:
    assert await built(**chosen) == kinds


async def test_prices_and_agents_are_those_of_the_settings() -> None:
    chosen = settings(prices={"m": Price(2.0, 10.0, 1.0)}, user_model="m", user_embedding="e", user_tools=("t",))
    async with late_database() as database:
        accounts = Accounts(LiveSettings(chosen), database, ScriptedBackend(), TaskSet())
        assert await accounts.billing.cost("m", Usage(10, 1, cached_tokens=4)) == 26
        config = accounts.agents._config
        assert (config.model, config.embedding, config.tools) == ("m", "e", ("t",))
        await accounts.close()


@pytest.mark.parametrize(
    ("registration", "host", "is_open"),
    [
        ("auto", "127.0.0.1", True),
        ("auto", "::1", True),
        ("auto", "localhost", True),
        ("auto", "::", False),
        ("auto", "192.0.2.1", False),
        ("open", "::", True),
        ("closed", "127.0.0.1", False),
    ],
)
def test_who_may_register(registration: str, host: str, *, is_open: bool) -> None:
    assert is_registration_open(settings(registration=registration, host=host)) is is_open


def test_budget_of_users() -> None:
    assert default_budget(settings()) is None
    assert default_budget(settings(user_budget="2.5/day")) == Budget(2_500_000, "day")


def test_secret_is_made_once(tmp_path: Path) -> None:
    chosen = Settings(home=str(tmp_path / "home"))
    first, again = (account_secrets(chosen, is_shared=False) for _ in range(2))
    assert first.is_ours(again.with_check("text"))
    assert (tmp_path / "home" / "secret.key").stat().st_mode & 0o777 == 0o600


def test_gateways_on_one_database_need_one_secret(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="SECRET_KEY is needed") as caught:
        account_secrets(Settings(home=str(tmp_path)), is_shared=True)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    account_secrets(settings(), is_shared=True)


async def test_secret_that_cannot_be_had_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text("short")
    (tmp_path / "secret.key").chmod(0o600)
    async with late_database() as database:
        with pytest.raises(SettingError, match="too short"):
            build_app(settings(secret_key="", home=str(tmp_path)), database, backend=ScriptedBackend())


async def test_same_registration_many_times_at_once_is_one_user_with_one_agent() -> None:
    account = {"email": "dora@example.com", "password": "correct horse battery", "name": "Dora"}
    async with town(talks=False) as gateway:
        before = len(gateway.backend.listed)
        answers = await asyncio.gather(
            *(gateway.send("POST", "/api/v1/auth/register", None, account) for _ in range(4))
        )
        assert {answer.status for answer in answers} == {201}
        assert len({answer.json()["user"]["id"] for answer in answers}) == 1
        assert len(gateway.backend.listed) == before + 1
        tokens = {answer.json()["access_token"] for answer in answers}
        assert len(tokens) == 4, "each has a session of its own"
        for token in tokens:
            assert (await gateway.send("GET", "/api/v1/auth/me", token)).status == 200


async def test_parts_are_where_handlers_find_them() -> None:
    async with late_database() as database:
        app = build_app(settings(), database, backend=ScriptedBackend())
        accounts = app[keys.ACCOUNTS]
        assert isinstance(accounts, Accounts)
        assert app[keys.PROFILES] is accounts.profiles
        assert app[keys.CREDENTIALS] is accounts.credentials
        assert app[keys.REGISTRATION] is accounts.registration
        await accounts.close()


async def test_sessions_that_are_over_are_looked_for_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    purged: list[float] = []

    async def purge(now: float) -> None:
        purged.append(now)

    async with late_database() as database:
        accounts = Accounts(LiveSettings(settings()), database, ScriptedBackend(), TaskSet())
        monkeypatch.setattr(accounts, "_purge", purge)
        for now in (1_000_000.0, 1_000_030.0, 1_003_599.0, 1_003_600.0):
            await accounts.sweep(now)
        await accounts.close()
    assert purged == [1_000_000.0, 1_003_600.0]
