import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.accounts.profiles import Profile
from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import Hang, Script
from gateway.translation.agent_events import TextDelta, Usage
from tests.server.people import OPERATOR_KEY, PASSWORD, Town, town
from tests.server.wire import until


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    async with town(talks=False, registration="closed") as running:
        yield running


@pytest.fixture(autouse=True)
def _open_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann and Ben were there before registration was closed."""
    made = Town.settle_down

    async def settle_down(self: Town, name: str) -> object:
        registration = self.app[keys.REGISTRATION]
        before = registration._is_open
        registration._is_open = lambda: True
        try:
            return await made(self, name)
        finally:
            registration._is_open = before

    monkeypatch.setattr(Town, "settle_down", settle_down)


async def test_operator_makes_users_where_registration_is_closed(gateway: Town) -> None:
    account = {"email": "Dora@Example.com", "password": PASSWORD, "name": "Dora"}
    refused = await gateway.send("POST", "/api/v1/auth/register", None, account)
    assert (refused.status, refused.code) == (403, "registration_closed")
    made = await gateway.admin("POST", "/users", account)
    assert made.status == 201
    user = made.json()
    assert user.keys() == {
        "id",
        "email",
        "name",
        "metadata",
        "agent",
        "is_blocked",
        "budget",
        "created_at",
        "updated_at",
    }
    assert (user["email"], user["name"], user["is_blocked"], user["budget"]) == (
        "dora@example.com",
        "Dora",
        False,
        None,
    )
    assert user["agent"]["id"] in [agent.id for agent in gateway.backend.listed]
    login = await gateway.send("POST", "/api/v1/auth/login", None, account)
    assert login.json()["user"]["id"] == user["id"]
    again = await gateway.admin("POST", "/users", {**account, "password": "another fine password"})
    assert (again.status, again.code) == (409, "account_exists")


async def test_operator_makes_many_users_and_is_not_slowed_down(gateway: Town) -> None:
    for number in range(30):
        made = await gateway.admin("POST", "/users", {"email": f"u{number}@example.com", "password": PASSWORD})
        assert made.status == 201


async def test_users_by_pages_and_search(gateway: Town) -> None:
    for name in ("carl", "dora", "emil"):
        await gateway.admin("POST", "/users", {"email": f"{name}@example.org", "password": PASSWORD})
    seen, cursor = [], ""
    while True:
        page = (await gateway.admin("GET", f"/users?limit=2{cursor}")).json()
        assert len(page["data"]) <= 2
        seen += [user["email"].partition("@")[0] for user in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == ["ann", "ben", "carl", "dora", "emil"]
    for search, found in (("EXAMPLE.ORG", 3), ("Ann", 1), ("%25", 0), ("_", 0), ("nobody", 0), ("'--", 0)):
        assert len((await gateway.admin("GET", f"/users?search={search}")).json()["data"]) == found, search


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=1000000000", "limit"),
        ("limit=many", "limit"),
        ("limit=5&limit=6", "limit"),
        ("cursor=nobody", "cursor"),
        ("cursor=%00", "cursor"),
        ("search=" + "x" * 201, "search"),
    ],
)
async def test_page_that_cannot_be(gateway: Town, query: str, param: str) -> None:
    answer = await gateway.admin("GET", f"/users?{query}")
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_budget_is_given_and_taken(gateway: Town) -> None:
    path = f"/users/{gateway.ann.id}"
    for amount, told in (("5", "5.000000"), (0.1, "0.100000"), (0, "0.000000"), ("0.000001", "0.000001")):
        answer = await gateway.admin("PATCH", path, {"budget": {"amount": amount, "period": "month"}})
        assert (answer.status, answer.json()["budget"]) == (200, {"amount": told, "period": "month"})
    named = await gateway.admin("PATCH", path, {"name": "Anna"})
    assert (named.json()["name"], named.json()["budget"]["period"]) == ("Anna", "month")
    assert (await gateway.admin("PATCH", path, {"budget": None})).json()["budget"] is None


async def test_budget_of_nothing_is_402(gateway: Town) -> None:
    await gateway.admin("PATCH", f"/users/{gateway.ann.id}", {"budget": {"amount": "0", "period": "day"}})
    for answer in (
        await gateway.api("POST", "/chat/message", gateway.ann, {"message": "Hello"}),
        await gateway.send("POST", "/v1/responses", gateway.ann.key, {"model": gateway.ann.agent_id, "input": "Hello"}),
    ):
        assert (answer.status, answer.code, answer.error["type"]) == (402, "budget_exceeded", "insufficient_quota")
    assert gateway.backend.turns == []
    assert (await gateway.api("POST", "/chat/message", gateway.ben, {"message": "Hi"})).status == 200


@pytest.mark.parametrize(
    "budget",
    [
        {"amount": "-1", "period": "month"},
        {"amount": "1000000001", "period": "month"},
        {"amount": "0.0000001", "period": "month"},
        {"amount": "1e400", "period": "month"},
        {"amount": "NaN", "period": "month"},
        {"amount": "Infinity", "period": "month"},
        {"amount": "five", "period": "month"},
        {"amount": "5", "period": "year"},
        {"amount": "5"},
        "5/month",
    ],
)
async def test_budget_that_is_none(gateway: Town, budget: object) -> None:
    answer = await gateway.admin("PATCH", f"/users/{gateway.ann.id}", {"budget": budget})
    assert answer.status == 400
    assert str(answer.error["param"]).startswith("budget")
    assert (await gateway.admin("GET", f"/users/{gateway.ann.id}")).json()["budget"] is None


async def test_blocked_user_is_out_at_once_and_comes_in_again(gateway: Town) -> None:
    ann = gateway.ann
    assert (await gateway.api("GET", "/auth/me", ann)).status == 200
    assert (await gateway.send("GET", "/v1/models", ann.key)).status == 200
    blocked = await gateway.admin("POST", f"/users/{ann.id}/block")
    assert (blocked.status, blocked.json()["is_blocked"]) == (200, True)
    account = {"email": ann.email, "password": PASSWORD}
    for answer in (
        await gateway.api("GET", "/auth/me", ann),
        await gateway.send("GET", "/v1/models", ann.key),
        await gateway.send("POST", "/api/v1/auth/login", None, account),
    ):
        assert (answer.status, answer.code) == (403, "account_blocked")
    assert (await gateway.admin("POST", f"/users/{ann.id}/block")).status == 200, "once more changes nothing"
    free = await gateway.admin("POST", f"/users/{ann.id}/unblock")
    assert (free.status, free.json()["is_blocked"]) == (200, False)
    assert (await gateway.send("GET", "/v1/models", ann.key)).status == 200
    assert (await gateway.api("GET", "/auth/me", ann)).status == 401, "the session of before stays ended"
    assert (await gateway.send("POST", "/api/v1/auth/login", None, account)).status == 200


async def test_forgotten_password_is_set_by_the_operator(gateway: Town) -> None:
    ann, fresh = gateway.ann, {"password": "another fine password"}
    weak = await gateway.admin("POST", f"/users/{ann.id}/password", {"password": "short"})
    assert (weak.status, weak.code) == (400, "weak_password")
    assert (await gateway.api("GET", "/auth/me", ann)).status == 200
    given = await gateway.admin("POST", f"/users/{ann.id}/password", fresh)
    assert (given.status, given.json()["email"]) == (200, ann.email)
    assert (await gateway.api("GET", "/auth/me", ann)).status == 401, "the session of before is over"
    old, new = ({"email": ann.email, "password": password} for password in (PASSWORD, fresh["password"]))
    assert (await gateway.send("POST", "/api/v1/auth/login", None, old)).code == "invalid_credentials"
    assert (await gateway.send("POST", "/api/v1/auth/login", None, new)).status == 200
    assert (await gateway.send("GET", "/v1/models", ann.key)).status == 200, "personal keys stay"
    assert (await gateway.admin("POST", "/users/nobody/password", fresh)).code == "user_not_found"


async def test_blocked_user_hears_no_more_of_an_answer_under_way(gateway: Town) -> None:
    gateway.backend.play(Script(([TextDelta("Once upon")], Hang()), counted=Usage(70, 9)))
    stream = asyncio.get_running_loop().create_task(
        gateway.send("POST", "/v1/responses", gateway.ann.key, {"model": gateway.ann.agent_id, "input": "Tell"})
    )
    await until(lambda: any(turn.heard for turn in gateway.backend.turns))
    assert (await gateway.admin("POST", f"/users/{gateway.ann.id}/block")).status == 200
    assert gateway.backend.turns[-1].cancelled
    assert (await stream).code == "response_cancelled"
    usage = (await gateway.admin("GET", f"/users/{gateway.ann.id}/usage")).json()
    assert (usage["totals"]["prompt_tokens"], usage["totals"]["completion_tokens"]) == (70, 9)


async def test_biller_that_is_down_leaves_a_user_out(gateway: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, billing = gateway.ann, gateway.app[keys.BILLING]
    asked: list[bool] = []

    async def down(profile: Profile, *, is_blocked: bool) -> None:
        asked.append(is_blocked)
        raise UpstreamUnavailable

    with monkeypatch.context() as broken:
        broken.setattr(billing, "set_blocked", down)
        refused = await gateway.admin("POST", f"/users/{ann.id}/block")
        assert (refused.status, refused.code) == (503, UpstreamUnavailable().code)
        assert (await gateway.send("GET", "/v1/models", ann.key)).code == "account_blocked"
    assert (await gateway.admin("POST", f"/users/{ann.id}/block")).status == 200
    with monkeypatch.context() as broken:
        broken.setattr(billing, "set_blocked", down)
        assert (await gateway.admin("POST", f"/users/{ann.id}/unblock")).status == 503
        assert (await gateway.send("GET", "/v1/models", ann.key)).code == "account_blocked"
    assert (await gateway.admin("POST", f"/users/{ann.id}/unblock")).status == 200
    assert (await gateway.send("GET", "/v1/models", ann.key)).status == 200
    assert asked == [True, False]


async def test_deleted_by_the_operator(gateway: Town) -> None:
    assert (await gateway.admin("DELETE", f"/users/{gateway.ann.id}")).status == 204
    assert (await gateway.api("GET", "/auth/me", gateway.ann)).status == 401
    assert (await gateway.admin("DELETE", f"/users/{gateway.ann.id}")).status == 404


async def test_deletion_that_waits_for_letta(gateway: Town) -> None:
    gateway.backend.down = UpstreamUnavailable()
    answer = await gateway.admin("DELETE", f"/users/{gateway.ann.id}")
    assert (answer.status, answer.code) == (503, "deletion_unfinished")
    gateway.backend.down = None
    assert (await gateway.admin("DELETE", f"/users/{gateway.ann.id}")).status == 204


async def test_operator_key_is_not_to_be_guessed(gateway: Town) -> None:
    codes = [(await gateway.send("GET", "/api/v1/admin/users", f"sk-guess-{number}")).code for number in range(30)]
    assert codes[0] == "forbidden"
    assert codes[-1] == "too_many_attempts"


async def test_without_an_operator_key_nobody_is_the_operator() -> None:
    async with town(talks=False, operator_key="", registration="open") as gateway:
        for key in (None, "", OPERATOR_KEY, gateway.ann.token):
            answer = await gateway.send("GET", "/api/v1/admin/users", key)
            assert (answer.status, answer.code) == (403, "forbidden")
