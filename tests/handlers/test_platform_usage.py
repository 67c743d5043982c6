from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from gateway import keys
from gateway.accounts.billing.protocol import Spent, SpentDay
from gateway.accounts.profiles import Profile
from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import Hang, Script, says
from gateway.settings import Price
from gateway.translation.agent_events import TextDelta, Usage
from tests.server.people import API_KEY, Town, town
from tests.server.wire import request, until

TODAY = datetime.now(UTC).date()


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    prices = {"scripted/model": Price(1.0, 10.0, 0.1)}
    async with town(talks=False, prices=prices, user_budget="1/total") as running:
        running.backend.play(says("Yes.", usage=Usage(1_000, 50, cached_tokens=200)))
        said = await running.api("POST", "/chat/message", running.ann, {"message": "Hello", "stream": False})
        assert said.status == 200
        yield running


async def test_usage_by_day_model_and_api(gateway: Town) -> None:
    answer = await gateway.api("GET", "/user/usage", gateway.ann)
    assert answer.status == 200
    found = answer.json()
    sums = {
        "turns": 1,
        "failed_turns": 0,
        "prompt_tokens": 1_000,
        "completion_tokens": 50,
        "cached_tokens": 200,
        "reasoning_tokens": 0,
        "cost": "0.001320",
    }
    (row,) = found["data"]
    assert row == {**sums, "day": row["day"], "model": "scripted/model", "source": "platform"}
    assert row["day"] in {TODAY.isoformat(), (TODAY + timedelta(days=1)).isoformat()}
    assert found["totals"] == sums
    assert found["budget"] == {
        "amount": "1.000000",
        "period": "total",
        "spent": "0.001320",
        "held": "0.000000",
        "remaining": "0.998680",
    }
    assert found["billed"] is None
    assert (datetime.fromisoformat(found["to"]) - datetime.fromisoformat(found["from"])).days == 29


async def test_answers_that_are_left_are_paid_for(gateway: Town) -> None:
    """Letta counts no step that was cut: what the user saw of it is an estimate of what it took."""
    gateway.backend.play(Script(([TextDelta("word " * 400)], Hang()), counted=Usage(0, 0)))
    message = {"message": "Tell me a story", "stream": True}
    async with gateway.connect() as connection:
        headers = {"Content-Type": "application/json", **gateway.ann.bearer}
        await connection.send(request("POST", "/api/v1/chat/message", headers, msgspec.json.encode(message)))
        await until(lambda: gateway.backend.turns[-1].heard == 1)
    await until(lambda: gateway.app[keys.TURNS].held == 0)
    totals = (await gateway.api("GET", "/user/usage", gateway.ann)).json()["totals"]
    assert (totals["turns"], totals["completion_tokens"]) == (2, 50), "tokens are those that Letta counts"
    assert totals["cost"] == f"{0.001320 + (1_000 + 10 * 500) / 1e6:.6f}"


async def test_operator_sees_the_same_and_the_sums_of_all(gateway: Town) -> None:
    own = (await gateway.api("GET", "/user/usage", gateway.ann)).json()
    assert (await gateway.admin("GET", f"/users/{gateway.ann.id}/usage")).json() == own
    await gateway.send("POST", "/v1/responses", API_KEY, {"model": "friend", "input": "Hello"})
    found = (await gateway.admin("GET", "/usage")).json()
    assert found["totals"]["turns"] == 2
    first, second = found["owners"]
    assert first == {**own["totals"], "owner": gateway.ann.id}
    assert second["owner"].startswith("key_")


async def test_days_of_others_are_left_out(gateway: Town) -> None:
    before = (await gateway.api("GET", "/user/usage?from=2020-01-01&to=2020-12-31", gateway.ann)).json()
    assert (before["from"], before["to"], before["data"]) == ("2020-01-01", "2020-12-31", [])
    assert before["totals"]["turns"] == 0
    assert (await gateway.api("GET", "/user/usage?to=2020-03-01", gateway.ann)).json()["from"] == "2020-02-01"
    assert (await gateway.api("GET", "/user/usage", gateway.ben)).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"),
        ("to=2026-02-30", "to"),
        ("from=2026-11-21T00:00:00", "from"),
        ("from=20261121", "from"),
        ("from=2025-01-01&to=2026-11-21", "to"),
        ("from=2026-11-21&to=2026-11-20", "to"),
        ("from=2026-11-21&from=2026-11-20", "from"),
        ("to=0000-01-02", "to"),
        ("from=%00", "from"),
        ("from=' OR 1=1 --", "from"),
    ],
)
async def test_days_that_are_none(gateway: Town, query: str, param: str) -> None:
    target = query.replace(" ", "%20")
    for answer in (
        await gateway.api("GET", f"/user/usage?{target}", gateway.ann),
        await gateway.admin("GET", f"/usage?{target}"),
        await gateway.admin("GET", f"/users/{gateway.ann.id}/usage?{target}"),
    ):
        assert (answer.status, answer.error["param"]) == (400, param)


async def test_what_the_biller_says_is_told_beside_the_ledger(gateway: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    async def spent(profile: Profile, first_day: str, last_day: str) -> Spent:
        return Spent((SpentDay(first_day, 1_320),))

    monkeypatch.setattr(gateway.app[keys.BILLING], "spent", spent)
    found = (await gateway.api("GET", "/user/usage", gateway.ann)).json()
    assert found["billed"] == [{"day": found["from"], "cost": "0.001320"}]


async def test_biller_that_is_down_does_not_hide_the_ledger(gateway: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    async def spent(profile: Profile, first_day: str, last_day: str) -> Spent:
        raise UpstreamUnavailable

    monkeypatch.setattr(gateway.app[keys.BILLING], "spent", spent)
    answer = await gateway.api("GET", "/user/usage", gateway.ann)
    assert (answer.status, answer.json()["billed"], answer.json()["totals"]["turns"]) == (200, None, 1)
