import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from gateway.accounts.billing.litellm import LitellmBilling, LitellmConfig
from gateway.accounts.billing.protocol import Billing, Spent, SpentDay
from gateway.accounts.profiles import Budget, Profile, Profiles
from gateway.accounts.secrets import Secrets
from gateway.errors import BudgetExceeded, GatewayError, UpstreamAuthFailed, UpstreamUnavailable
from gateway.storage.engine import Database
from gateway.translation.agent_events import Usage
from tests.accounts.billing.fake_litellm import MASTER_KEY, FakeLitellm
from tests.accounts.recorded_service import Sample, sample, served

ANN: Final = "11111111-1111-4111-8111-111111111111"
BOB: Final = "22222222-2222-4222-8222-222222222222"
SECRETS: Final = Secrets.from_key("a secret of at least thirty-two characters")
ACTIVITY: Final = "/user/daily/activity"


@pytest.fixture
async def proxy() -> AsyncIterator[FakeLitellm]:
    fake = FakeLitellm()
    async with served(fake):
        yield fake


@pytest.fixture
def profiles(database: Database) -> Profiles:
    return Profiles(database)


@contextlib.asynccontextmanager
async def billing_by(
    proxy: FakeLitellm, profiles: Profiles, *, key: str = MASTER_KEY, budget: Budget | None = None
) -> AsyncIterator[LitellmBilling]:
    made = LitellmBilling(LitellmConfig(proxy.url, key, budget), profiles=profiles, secrets=SECRETS)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def billing(proxy: FakeLitellm, profiles: Profiles) -> AsyncIterator[LitellmBilling]:
    async with billing_by(proxy, profiles, budget=Budget(5_000_000, "month")) as made:
        yield made


@pytest.fixture
async def ann(profiles: Profiles) -> Profile:
    return await new_profile(profiles, ANN)


async def new_profile(profiles: Profiles, user_id: str, **fields: Any) -> Profile:
    profile = Profile(id=user_id, email=f"{user_id}@example.com", created_at=1.0, updated_at=1.0, **fields)
    assert await profiles.add(profile)
    return profile


def key_of(profile: Profile | None) -> str | None:
    assert profile is not None
    return None if profile.litellm_key is None else SECRETS.decrypt(profile.litellm_key)


def test_it_is_a_billing(billing: LitellmBilling) -> None:
    kind: Billing = billing
    assert kind is billing


# Accounts ------------------------------------------------------------------------------------------------------------


async def test_account_with_a_key_of_its_own(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    opened = await billing.open_account(ann)
    assert proxy.keys_of(ANN) == [key_of(opened)]
    assert opened == await profiles.find(ANN)
    asked = proxy.asked("POST", "/user/new")[0].json()
    assert asked.pop("key_alias").startswith(f"letta-gateway-{ANN}-")
    assert asked == {
        "user_id": ANN,
        "user_email": f"{ANN}@example.com",
        "max_budget": 5.0,
        "budget_duration": "1mo",
        "user_role": "internal_user",
        "auto_create_key": True,
    }


async def test_key_is_not_readable_where_it_is_stored(billing: LitellmBilling, ann: Profile) -> None:
    opened = await billing.open_account(ann)
    assert opened.litellm_key is not None
    assert "sk-" not in opened.litellm_key
    assert "sk-" not in repr(billing.provider_of(opened))
    provider = billing.provider_of(opened)
    assert provider is not None
    assert provider.name == billing.provider_name(ANN)


async def test_account_that_is_open_stays(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    opened = await billing.open_account(ann)
    asked = len(proxy.requests)
    assert await billing.open_account(opened) == opened
    assert len(proxy.requests) == asked


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        (Budget(10_000, "day"), (0.01, "1d")),
        (Budget(2_500_000, "month"), (2.5, "1mo")),
        (Budget(0, "total"), (0.0, None)),
        (None, (5.0, "1mo")),
    ],
)
async def test_budget_of_the_account(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, own: Budget | None, asked: tuple[float, str | None]
) -> None:
    await billing.open_account(await new_profile(profiles, BOB, budget=own))
    assert (proxy.users[BOB]["max_budget"], proxy.users[BOB]["budget_duration"]) == asked


async def test_no_budget_at_all(proxy: FakeLitellm, profiles: Profiles, ann: Profile) -> None:
    async with billing_by(proxy, profiles) as billing:
        await billing.open_account(ann)
    assert proxy.users[ANN]["max_budget"] is None


async def test_users_have_providers_of_their_own(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    providers = [
        billing.provider_of(await billing.open_account(profile)) for profile in (ann, await new_profile(profiles, BOB))
    ]
    assert [provider and (provider.name, provider.base_url) for provider in providers] == [
        (f"litellm-{ANN}", f"{proxy.url}/v1"),
        (f"litellm-{BOB}", f"{proxy.url}/v1"),
    ]
    assert [provider and proxy.keys[provider.api_key] for provider in providers] == [ANN, BOB]


async def test_user_without_an_account_is_not_served_at_others_expense(billing: LitellmBilling, ann: Profile) -> None:
    with pytest.raises(UpstreamUnavailable):
        billing.provider_of(ann)


@pytest.mark.parametrize("path", ["/user/new", "/key/generate", "/user/info"])
@pytest.mark.parametrize("how", ["breaks", "dies"])
async def test_account_is_opened_after_any_step_failed(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile, path: str, how: str
) -> None:
    """The proxy answers no more, before or after it did what it was asked: as when the gateway dies there."""
    getattr(proxy, how).add(path)
    for _ in range(2):
        with contextlib.suppress(UpstreamUnavailable):
            await billing.open_account(await profiles.find(ANN) or ann)
    getattr(proxy, how).clear()
    await profiles.change(ANN, litellm_key=None)  # as if it had died before that was written
    opened = await billing.open_account(await profiles.find(ANN) or ann)
    assert proxy.keys_of(ANN) == [key_of(opened)]
    assert proxy.users[ANN]["max_budget"] == 5.0


async def test_account_of_a_gateway_that_died_has_todays_budget(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    await billing.open_account(ann)
    await profiles.change(ANN, litellm_key=None, budget=Budget(1_000_000, "day"))
    await billing.open_account(await profiles.find(ANN) or ann)
    assert (proxy.users[ANN]["max_budget"], proxy.users[ANN]["budget_duration"]) == (1.0, "1d")


async def test_address_that_somebody_else_has_at_litellm(
    proxy: FakeLitellm, billing: LitellmBilling, ann: Profile
) -> None:
    proxy.users["somebody"] = {"user_email": ann.email, "spend": 0.0}
    opened = await billing.open_account(ann)
    assert proxy.keys_of(ANN) == [key_of(opened)]
    assert (proxy.users[ANN]["user_email"], proxy.users[ANN]["max_budget"]) == (None, 5.0)


async def test_key_under_another_secret_is_replaced(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    before = await billing.open_account(ann)
    other = Secrets.from_key("another secret of at least thirty-two characters")
    changed = await profiles.change(ANN, litellm_key=other.encrypt("sk-unreadable"))
    assert changed is not None
    after = await billing.open_account(changed)
    assert proxy.keys_of(ANN) == [key_of(after)]
    assert key_of(after) != key_of(before)


async def test_gateways_that_open_one_account_at_once(proxy: FakeLitellm, profiles: Profiles, ann: Profile) -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(billing_by(proxy, profiles)) for _ in range(4)]
        opened = await asyncio.gather(*(one.open_account(ann) for one in gateways), return_exceptions=True)
        assert any(isinstance(one, Profile) for one in opened)
        assert all(isinstance(one, Profile | UpstreamUnavailable) for one in opened)
        final = await gateways[0].open_account(await profiles.find(ANN) or ann)
    stored = key_of(await profiles.find(ANN))
    assert stored == key_of(final)
    assert stored in proxy.keys_of(ANN)


async def test_user_who_was_deleted_meanwhile_leaves_nothing(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    await profiles.delete(ANN)
    with pytest.raises(UpstreamUnavailable):
        await billing.open_account(ann)
    assert (proxy.users, proxy.keys) == ({}, {})


async def test_closed_account_leaves_no_key(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    opened = await billing.open_account(ann)
    await billing.open_account(await new_profile(profiles, BOB))
    for _ in range(2):
        await billing.close_account(opened)
    assert set(proxy.users) == set(proxy.keys.values()) == {BOB}


async def test_key_of_a_blocked_user(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    opened = await billing.open_account(ann)
    await billing.set_blocked(opened, is_blocked=True)
    assert proxy.blocked == {key_of(opened)}
    await billing.set_blocked(opened, is_blocked=False)
    assert proxy.blocked == set()
    proxy.keys.clear()
    await billing.set_blocked(opened, is_blocked=True)
    await billing.set_blocked(ann, is_blocked=True)
    assert proxy.blocked == set()


async def test_wrong_master_key_is_the_operators_matter(proxy: FakeLitellm, profiles: Profiles, ann: Profile) -> None:
    async with billing_by(proxy, profiles, key="sk-wrong") as billing:
        with pytest.raises(UpstreamAuthFailed, match="LITELLM_MASTER_KEY"):
            await billing.open_account(ann)


async def test_proxy_that_is_down(
    proxy: FakeLitellm, billing: LitellmBilling, profiles: Profiles, ann: Profile
) -> None:
    opened = await billing.open_account(ann)
    proxy.breaks |= {"/user/new", "/user/info", "/user/delete", "/user/update", ACTIVITY, "/model/info"}
    for asked in (
        billing.open_account(await new_profile(profiles, BOB)),
        billing.admit(ANN),
        billing.cost("p/m", Usage(1, 1)),
        billing.spent(opened, "2026-11-01", "2026-11-30"),
        billing.set_budget(opened, None),
        billing.close_account(opened),
    ):
        with pytest.raises(GatewayError) as raised:
            await asked
        assert (raised.value.status, raised.value.code) == (503, "billing_unavailable")


# Budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spend", "limit", "admitted"),
    [
        (0.0, 0.01, True),
        (0.009999, 0.01, True),
        (0.01, 0.01, False),
        (0.5, 0.01, False),
        (0.0, 0.0, False),
        (9.0, None, True),
    ],
)
async def test_admission_by_what_litellm_has_spent(
    proxy: FakeLitellm, billing: LitellmBilling, spend: float, limit: float | None, *, admitted: bool
) -> None:
    proxy.users[ANN] = {"spend": spend, "max_budget": limit}
    if admitted:
        await billing.admit(ANN)
    else:
        with pytest.raises(BudgetExceeded):
            await billing.admit(ANN)


async def test_spending_is_not_asked_for_before_every_turn(proxy: FakeLitellm, billing: LitellmBilling) -> None:
    proxy.users[ANN] = {"spend": 0.0, "max_budget": 1.0}
    for _ in range(5):
        await billing.admit(ANN)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("owner", ["local", "key_0123456789ab", "", "{" + ANN + "}", ANN.upper().replace("1", "A")])
async def test_who_is_no_user_has_no_budget_at_litellm(proxy: FakeLitellm, billing: LitellmBilling, owner: str) -> None:
    await billing.admit(owner)
    assert proxy.requests == []


async def test_user_whom_litellm_does_not_know_yet(billing: LitellmBilling) -> None:
    await billing.admit(BOB)


async def test_larger_budget_counts_at_once(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    opened = await billing.open_account(ann)
    proxy.users[ANN]["spend"] = 6.0
    with pytest.raises(BudgetExceeded):
        await billing.admit(ANN)
    await billing.set_budget(opened, Budget(7_000_000, "month"))
    await billing.admit(ANN)
    await billing.set_budget(opened, None)
    with pytest.raises(BudgetExceeded):
        await billing.admit(ANN)


async def test_budget_of_a_user_without_an_account_waits_for_it(
    proxy: FakeLitellm, billing: LitellmBilling, ann: Profile
) -> None:
    """LiteLLM would make a user of whom it knows nothing but the budget."""
    await billing.set_budget(ann, Budget(1, "day"))
    assert proxy.requests == []


# What was spent ------------------------------------------------------------------------------------------------------


async def test_recorded_day(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    proxy.on("GET", ACTIVITY, sample("litellm/user-daily-activity"))
    spent = await billing.spent(ann, "2026-11-19", "2026-11-21")
    assert spent == Spent((SpentDay("2026-11-20", 4_200),))
    assert spent.micros == 4_200
    query = proxy.asked("GET", ACTIVITY)[0].query
    assert query == {
        "start_date": "2026-11-19",
        "end_date": "2026-11-21",
        "user_id": ANN,
        "page": "1",
        "page_size": "1000",
    }


def page(days: dict[str, float], *, more: bool) -> Sample:
    results = [{"date": day, "metrics": {"spend": spend}} for day, spend in days.items()]
    return Sample(200, {"results": results, "metadata": {"has_more": more}})


async def test_day_that_stands_on_two_pages(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    proxy.on(
        "GET",
        ACTIVITY,
        page({"2026-11-20": 0.1, "2026-11-21": 0.000001}, more=True),
        page({"2026-11-20": 0.2, "2026-11-19": 0.0}, more=False),
    )
    spent = await billing.spent(ann, "2026-11-19", "2026-11-21")
    assert spent == Spent((SpentDay("2026-11-20", 300_000), SpentDay("2026-11-21", 1)))
    assert [asked.query["page"] for asked in proxy.asked("GET", ACTIVITY)] == ["1", "2"]


async def test_user_who_spent_nothing(proxy: FakeLitellm, billing: LitellmBilling, ann: Profile) -> None:
    assert await billing.spent(ann, "2026-11-19", "2026-11-21") == Spent(())


async def test_cost_by_litellms_prices(proxy: FakeLitellm, billing: LitellmBilling) -> None:
    proxy.on("GET", "/model/info", sample("litellm/model-info"))
    assert await billing.cost(f"litellm-{ANN}/priced", Usage(100, 20)) == 4_200
    assert len(proxy.requests) == 1


def test_key_is_not_shown() -> None:
    assert "sk-" not in repr(LitellmConfig("http://x", "sk-master"))
