from collections.abc import AsyncIterator

import pytest

from gateway.settings import key_owner
from tests.server.people import API_KEY, OPERATOR_KEY, PASSWORD, Town, town
from tests.ui.operator_page import Page, signed_in


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    async with town(talks=False) as running:
        yield running


@pytest.fixture
async def operator(gateway: Town) -> Page:
    return await signed_in(gateway, OPERATOR_KEY)


async def test_api_keys_by_the_names_of_their_holders(gateway: Town, operator: Page) -> None:
    hello = {"model": "friend", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await gateway.send("POST", "/v1/chat/completions", API_KEY, hello)).status == 200
    assert (await operator.ask("GET", "keys")).json() == {"owners": [key_owner(API_KEY)]}
    owners = (await operator.ask("GET", "usage")).json()["owners"]
    assert [(sums["owner"], sums["turns"]) for sums in owners] == [(key_owner(API_KEY), 1)]


async def test_users_are_found_made_blocked_and_given_a_budget(gateway: Town, operator: Page) -> None:
    listed = (await operator.ask("GET", "users?limit=20&search=ann")).json()["data"]
    assert [user["email"] for user in listed] == ["ann@example.com"]
    ann = f"users/{gateway.ann.id}"
    assert (await operator.ask("POST", f"{ann}/block")).json()["is_blocked"] is True
    assert (await gateway.api("GET", "/auth/me", gateway.ann)).status == 403
    assert (await operator.ask("POST", f"{ann}/unblock")).json()["is_blocked"] is False
    budget = {"amount": "5", "period": "month"}
    assert (await operator.ask("PATCH", ann, {"budget": budget})).json()["budget"] == {**budget, "amount": "5.000000"}
    made = await operator.ask("POST", "users", {"email": "dora@example.com", "password": PASSWORD})
    assert made.status == 201
    assert (await operator.ask("GET", f"{ann}/usage")).json()["totals"]["turns"] == 0


async def test_key_of_a_user_is_seen_and_deleted(gateway: Town, operator: Page) -> None:
    path = f"users/{gateway.ann.id}/keys"
    assert (await gateway.send("GET", "/v1/models", gateway.ann.key)).status == 200
    answer = await operator.ask("GET", path)
    (key,) = answer.json()["data"]
    assert key["id"] == gateway.ann.key_id
    assert key["hint"] == gateway.ann.key[-4:]
    assert gateway.ann.key not in answer.body.decode()
    assert (await operator.ask("DELETE", f"{path}/{key['id']}")).status == 204
    assert (await gateway.send("GET", "/v1/models", gateway.ann.key)).status == 401
    assert (await operator.ask("DELETE", f"{path}/{key['id']}")).code == "key_not_found"


async def test_key_of_another_user_is_none_of_this_one(gateway: Town, operator: Page) -> None:
    answer = await operator.ask("DELETE", f"users/{gateway.ben.id}/keys/{gateway.ann.key_id}")
    assert answer.status == 404
    assert (await gateway.send("GET", "/v1/models", gateway.ann.key)).status == 200


@pytest.mark.parametrize("user", ["nobody", "%00", "00000000-0000-4000-8000-000000000000"])
async def test_nobodys_keys(operator: Page, user: str) -> None:
    for method, path in (("GET", f"users/{user}/keys"), ("DELETE", f"users/{user}/keys/k")):
        assert (await operator.ask(method, path)).code == "user_not_found"
