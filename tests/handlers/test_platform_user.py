import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.accounts.deletion import PATIENCE
from gateway.accounts.profiles import MAX_METADATA
from gateway.errors import StorageUnavailable, UpstreamUnavailable
from gateway.letta.scripted import Hang, Script
from gateway.storage import failures
from gateway.translation.platform_types import Message
from tests.server.people import API_KEY, PASSWORD, Town, town
from tests.server.wire import until


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    async with town() as running:
        yield running


# The profile ---------------------------------------------------------------------------------------------------------


async def test_profile_is_changed_in_parts(gateway: Town) -> None:
    first = (await gateway.api("GET", "/user/profile", gateway.ann)).json()
    named = await gateway.api("PATCH", "/user/profile", gateway.ann, {"name": " Anna "})
    assert (named.status, named.json()) == (200, {**first, "name": "Anna"})
    told = await gateway.api("PATCH", "/user/profile", gateway.ann, {"metadata": {"theme": "dark", "n": [1, None]}})
    assert told.json() == {**first, "name": "Anna", "metadata": {"theme": "dark", "n": [1, None]}}
    assert (await gateway.api("PATCH", "/user/profile", gateway.ann, {})).json() == told.json()
    assert (await gateway.api("GET", "/auth/me", gateway.ann)).json() == told.json()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": None}, "name"),
        ({"name": 5}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "two\r\nlines"}, "name"),
        ({"name": "\u202egnp.exe"}, "name"),
        ({"name": "nul\0"}, "name"),
        ({"metadata": None}, "metadata"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": "text"}, "metadata"),
        ({"metadata": {"x": "y" * MAX_METADATA}}, "metadata"),
    ],
)
async def test_profile_that_cannot_be(gateway: Town, body: object, param: str) -> None:
    before = (await gateway.api("GET", "/user/profile", gateway.ann)).body
    answer = await gateway.api("PATCH", "/user/profile", gateway.ann, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert (await gateway.api("GET", "/user/profile", gateway.ann)).body == before


@pytest.mark.parametrize(
    "name", ["Robert'); DROP TABLE user_profiles;--", "%_\\", "<script>alert(1)</script>", "张伟 🍵"]
)
async def test_odd_names_are_kept_as_they_are(gateway: Town, name: str) -> None:
    answer = await gateway.api("PATCH", "/user/profile", gateway.ann, {"name": name, "metadata": {name: name}})
    assert (answer.json()["name"], answer.json()["metadata"]) == (name, {name: name})
    found = await gateway.admin("GET", "/users?search=" + "".join(f"%{byte:02x}" for byte in name.encode()))
    assert [user["name"] for user in found.json()["data"]] == [name], "and found by exactly that"


# Keys ----------------------------------------------------------------------------------------------------------------


async def test_key_is_shown_once_and_works_until_it_is_deleted(gateway: Town) -> None:
    made = await gateway.api("POST", "/user/keys", gateway.ann, {"name": "phone"})
    assert made.status == 201
    key = made.json()["key"]
    assert made.json().keys() == {"id", "name", "hint", "created_at", "last_used_at", "key"}
    listed = await gateway.api("GET", "/user/keys", gateway.ann)
    assert [one["name"] for one in listed.json()["data"]] == ["phone", "ann's laptop"]
    assert key not in listed.body.decode()
    assert key.endswith(listed.json()["data"][0]["hint"])
    assert (await gateway.send("GET", "/v1/models", key)).status == 200
    assert (await gateway.api("DELETE", f"/user/keys/{made.json()['id']}", gateway.ann)).status == 204
    assert (await gateway.send("GET", "/v1/models", key)).status == 401, "at once"
    assert (await gateway.send("GET", "/v1/models", gateway.ann.key)).status == 200
    again = await gateway.api("DELETE", f"/user/keys/{made.json()['id']}", gateway.ann)
    assert (again.status, again.code) == (404, "key_not_found")


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb"])
async def test_key_without_a_fit_name(gateway: Town, name: str) -> None:
    answer = await gateway.api("POST", "/user/keys", gateway.ann, {"name": name})
    assert (answer.status, answer.error["param"]) == (400, "name")


async def test_use_of_a_key_is_in_the_users_usage(gateway: Town) -> None:
    usage = (await gateway.api("GET", "/user/usage", gateway.ann)).json()
    assert {row["source"]: row["turns"] for row in usage["data"]} == {"platform": 1, "responses": 1}


# Export and farewell -------------------------------------------------------------------------------------------------


async def test_export_holds_everything_and_no_secret(gateway: Town) -> None:
    answer = await gateway.api("GET", "/user/export", gateway.ann)
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert answer.header("content-disposition") == 'attachment; filename="export.json"'
    found = answer.json()
    assert found.keys() == {"user", "memory", "keys", "usage", "messages", "responses"}
    assert found["user"] == (await gateway.api("GET", "/user/profile", gateway.ann)).json()
    assert found["keys"] == (await gateway.api("GET", "/user/keys", gateway.ann)).json()["data"]
    assert found["messages"] == (await gateway.api("GET", "/chat/history", gateway.ann)).json()["data"]
    assert found["memory"][0]["value"] == "the secret of ann@example.com"
    assert [turn["source"] for turn in sorted(found["usage"], key=lambda turn: turn["started_at"])] == [
        "platform",
        "responses",
    ]
    assert [one["response"]["id"] for one in found["responses"]] == [gateway.ann.response_id]
    text = answer.body.decode()
    assert gateway.ann.key not in text
    assert PASSWORD not in text
    assert "$argon2" not in text
    assert not [secret for secret in gateway.ben.secrets if secret in text]


async def test_export_that_breaks_off_does_not_look_whole(gateway: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    history = gateway.app[keys.HISTORY]

    async def broken(user_id: str) -> AsyncIterator[Message]:
        for number in range(2_000):
            yield Message(id=f"msg_{number}", role="user", status="complete", text="x" * 100, created_at=1.0)
        raise StorageUnavailable(failures.GONE)

    monkeypatch.setattr(history, "export", broken)
    answer = await gateway.api("GET", "/user/export", gateway.ann)
    assert (answer.status, answer.complete) == (200, False)
    assert b"msg_1" in answer.body


async def test_export_when_letta_is_down_is_refused(gateway: Town) -> None:
    gateway.backend.down = UpstreamUnavailable()
    assert (await gateway.api("GET", "/user/export", gateway.ann)).status == 503


async def test_deleted_user_leaves_nothing(gateway: Town) -> None:
    ann = gateway.ann
    assert (await gateway.api("DELETE", "/user", ann)).status == 204
    for method, path in (("GET", "/auth/me"), ("GET", "/chat/history"), ("DELETE", "/user"), ("GET", "/user/export")):
        assert (await gateway.api(method, path, ann)).status == 401, path
    assert (await gateway.send("GET", "/v1/models", ann.key)).status == 401
    refresh = await gateway.send("POST", "/api/v1/auth/refresh", None, {"refresh_token": ann.refresh_token})
    assert refresh.status == 401
    account = {"email": ann.email, "password": PASSWORD}
    assert (await gateway.send("POST", "/api/v1/auth/login", None, account)).status == 401
    assert ann.agent_id in gateway.backend.gone
    assert (await gateway.admin("GET", f"/users/{ann.id}")).status == 404
    usage = (await gateway.admin("GET", "/usage")).json()
    assert {row["owner"] for row in usage["owners"]} == {gateway.ben.id}
    again = await gateway.send("POST", "/api/v1/auth/register", None, account)
    assert again.status == 201, "the e-mail is free again"
    assert again.json()["user"]["id"] != ann.id
    history = await gateway.send("GET", "/api/v1/chat/history", again.json()["access_token"])
    assert history.json()["data"] == []


async def test_deletion_goes_on_when_letta_is_back(gateway: Town) -> None:
    ann = gateway.ann
    gateway.backend.down = UpstreamUnavailable()
    answer = await gateway.api("DELETE", "/user", ann)
    assert (answer.status, answer.code) == (503, "deletion_unfinished")
    assert (await gateway.api("GET", "/auth/me", ann)).status in (401, 403)
    assert (await gateway.send("GET", "/v1/models", ann.key)).status in (401, 403)
    gateway.backend.down = None
    await gateway.app[keys.ACCOUNTS].sweep(time.time() + PATIENCE + 1)
    assert ann.agent_id in gateway.backend.gone
    assert (await gateway.admin("GET", f"/users/{ann.id}")).status == 404


async def test_user_who_is_deleted_in_the_middle_of_an_answer(gateway: Town) -> None:
    ann = gateway.ann
    gateway.backend.play(Script((Hang(),)))
    loop = asyncio.get_running_loop()
    talking = loop.create_task(gateway.api("POST", "/chat/message", ann, {"message": "Hello", "stream": False}))
    await until(lambda: gateway.backend.turns[-1].taken and not gateway.backend.turns[-1].heard)
    assert (await gateway.api("DELETE", "/user", ann)).status == 204
    assert gateway.backend.turns[-1].cancelled
    answer = await talking
    assert (answer.status, answer.code) == (502, "response_cancelled")
    await until(lambda: gateway.app[keys.TURNS].held == 0)
    report = await gateway.admin("GET", "/usage")
    assert {row["owner"] for row in report.json()["owners"]} == {gateway.ben.id}
    assert (await gateway.admin("GET", f"/users/{ann.id}")).status == 404


async def test_api_key_of_the_operators_has_no_profile(gateway: Town) -> None:
    assert (await gateway.send("GET", "/api/v1/user/profile", API_KEY)).status == 401
