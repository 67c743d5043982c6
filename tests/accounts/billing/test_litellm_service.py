from collections.abc import AsyncIterator

import msgspec
import pytest

from gateway.accounts.billing.litellm_service import (
    CONFLICT,
    NOT_FOUND,
    Account,
    Activity,
    KeyNames,
    LitellmService,
    MadeKey,
    ModelRows,
    NewAccount,
    UserNames,
)
from gateway.errors import UpstreamAuthFailed, UpstreamInvalid, UpstreamUnavailable
from tests.accounts.recorded_service import RecordedService, Sample, recorded_service, sample


@pytest.fixture
async def server() -> AsyncIterator[RecordedService]:
    async with recorded_service() as running:
        yield running


@pytest.fixture
async def service(server: RecordedService) -> AsyncIterator[LitellmService]:
    made = LitellmService(server.url, "sk-master")
    yield made
    await made.close()


async def test_recorded_account(server: RecordedService, service: LitellmService) -> None:
    server.on("GET", "/user/info", sample("litellm/user-info"))
    account = await service.get("/user/info", Account, {"user_id": "u"})
    assert account is not None
    assert account.user_info is not None
    assert (account.user_info.spend, account.user_info.max_budget) == (0.004200000000000001, 0.01)
    assert [key.token[:8] for key in account.keys] == ["c5b8482b"]
    asked = server.asked("GET", "/user/info")[0]
    assert (asked.query, asked.headers["Authorization"]) == ({"user_id": "u"}, "Bearer sk-master")


async def test_recorded_answers_of_other_kinds(server: RecordedService, service: LitellmService) -> None:
    server.on("GET", "/activity", sample("litellm/user-daily-activity"))
    server.on("GET", "/models", sample("litellm/model-info"))
    server.on("POST", "/key", sample("litellm/key-generate"))
    activity = await service.get("/activity", Activity, {})
    models = await service.get("/models", ModelRows, {})
    made = await service.post("/key", UserNames(["u"]), MadeKey)
    assert activity is not None
    assert [(day.date, day.metrics.spend) for day in activity.results] == [("2026-11-20", 0.004200000000000001)]
    assert models is not None
    assert [(row.model_name, row.model_info.output_cost_per_token) for row in models.data] == [("priced", 6e-05)]
    assert made.key.startswith("sk-")


async def test_what_does_not_exist_is_none(server: RecordedService, service: LitellmService) -> None:
    server.on("GET", "/user/info", sample("litellm/user-info-missing"))
    server.on("POST", "/user/new", sample("litellm/user-new-duplicate"))
    server.on("POST", "/key/delete", sample("litellm/key-delete-unknown"))
    account = NewAccount(user_id="u", user_email="e", key_alias="k", max_budget=None, budget_duration=None)
    assert await service.get("/user/info", Account, {}) is None
    assert await service.post_unless(CONFLICT, "/user/new", account, MadeKey) is None
    assert await service.post_unless(NOT_FOUND, "/key/delete", KeyNames(["k"]), msgspec.Raw) is None


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (Sample(401, {"error": {"type": "token_not_found_in_db"}}), UpstreamAuthFailed, "billing_auth_failed"),
        (Sample(403), UpstreamAuthFailed, "billing_auth_failed"),
        (Sample(400, {"error": {"message": "secret text"}}), UpstreamInvalid, "billing_invalid_response"),
        (Sample(404), UpstreamInvalid, "billing_invalid_response"),
        (Sample(200, ["no account"]), UpstreamInvalid, "billing_invalid_response"),
        (Sample(500), UpstreamUnavailable, "billing_unavailable"),
        (Sample(503), UpstreamUnavailable, "billing_unavailable"),
    ],
)
async def test_other_answers(
    server: RecordedService, service: LitellmService, answer: Sample, kind: type[Exception], code: str
) -> None:
    server.on("POST", "/key/generate", answer)
    with pytest.raises(kind) as raised:
        await service.post("/key/generate", UserNames(["u"]), MadeKey)
    assert getattr(raised.value, "code", None) == code
    assert "secret" not in str(raised.value)


def test_account_that_is_not_ready_is_503(service: LitellmService) -> None:
    error = service.not_ready()
    assert (error.status, error.code) == (503, "billing_unavailable")
