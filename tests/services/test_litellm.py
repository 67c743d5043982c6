"""Users billed by a real LiteLLM proxy, behind a real Letta V1 server: what it counts, the gateway counts."""

import asyncio
import urllib.error
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Final

import pytest
import pytest_asyncio

from gateway.letta.demo_model import MODEL as UPSTREAM
from gateway.letta.demo_model import RunningDemoModel
from tests.live.gateways import gateway_before, sdk
from tests.live.postgres import running_postgres
from tests.live.setup_v1 import state_folder
from tests.live.v1_server import EMBEDDING_HANDLE, V1Server
from tests.server.subprocesses import GatewayProcess
from tests.services.litellm.proxy import (
    COMPLETION_PRICE,
    MASTER_KEY,
    MODEL,
    PROMPT_PRICE,
    LitellmProxy,
    running_litellm,
)
from tests.services.people import OPERATOR_KEY, Person, ask, eventually, registered

pytestmark = pytest.mark.asyncio(loop_scope="session")

API_KEY: Final = "sk-somebody-else"


@pytest.fixture(scope="session")
def litellm(demo_model: RunningDemoModel) -> Iterator[LitellmProxy]:
    with (
        state_folder() as books,
        running_postgres(books, None) as database,
        state_folder() as state,
        running_litellm(state, database, demo_model.base_url, UPSTREAM) as proxy,
    ):
        yield proxy


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(v1: V1Server, litellm: LitellmProxy) -> AsyncIterator[GatewayProcess]:
    async with gateway_before(
        v1,
        LETTA_GATEWAY_API_KEYS=API_KEY,
        LETTA_GATEWAY_OPERATOR_KEY=OPERATOR_KEY,
        LETTA_GATEWAY_REGISTRATION="open",
        LETTA_GATEWAY_BILLING="litellm",
        LITELLM_BASE_URL=litellm.base_url,
        LITELLM_MASTER_KEY=MASTER_KEY,
        LETTA_GATEWAY_USER_MODEL=MODEL,
        LETTA_GATEWAY_USER_EMBEDDING=EMBEDDING_HANDLE,
    ) as running:
        yield running


def spent_at(litellm: LitellmProxy, person: Person) -> Decimal:
    """Return what LiteLLM says that somebody spent, to the millionth of a dollar."""
    user = litellm.call("GET", f"/user/info?user_id={person.id}")["user_info"]
    return Decimal(repr(user["spend"])).quantize(Decimal("0.000001"))


def keys_at(litellm: LitellmProxy, person: Person) -> list[str]:
    """Return by what LiteLLM knows somebody's keys."""
    return [key["token"] for key in litellm.call("GET", f"/user/info?user_id={person.id}")["keys"]]


async def ledger_of(person: Person) -> Decimal:
    """Return what the gateway's own ledger says."""
    return Decimal((await person.ask("GET", "/api/v1/user/usage")).body["totals"]["cost"])


async def billed_like_the_ledger(litellm: LitellmProxy, person: Person) -> Decimal:
    """Wait until LiteLLM has written its books, and return what stands in both."""

    async def same() -> Decimal | None:
        ledger = await ledger_of(person)
        return ledger if ledger and ledger == spent_at(litellm, person) else None

    found: Decimal = await eventually(same)
    return found


async def test_two_users_are_billed_apart_to_the_millionth(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    ann, bob = await registered(gateway), await registered(gateway)
    await ann.has_an_agent()
    await bob.has_an_agent()
    for person, messages in ((ann, ("hello", "hello again", "and a third time")), (bob, ("hi there",))):
        for number, message in enumerate(messages):
            said = await person.say(message, stream=number % 2 == 1)
            assert said.status == 200, said.text
            assert f"You said: {message}" in said.text or number % 2 == 1
    spent = [await billed_like_the_ledger(litellm, person) for person in (ann, bob)]
    assert spent[0] > spent[1] > 0
    for person, sum_of in zip((ann, bob), spent, strict=True):
        usage = (await person.ask("GET", "/api/v1/user/usage")).body
        tokens = usage["totals"]
        priced = tokens["prompt_tokens"] * Decimal(repr(PROMPT_PRICE))
        assert priced + tokens["completion_tokens"] * Decimal(repr(COMPLETION_PRICE)) == sum_of
        assert sum(Decimal(day["cost"]) for day in usage["billed"]) == sum_of
        assert {row["model"] for row in usage["data"]} == {f"litellm-{person.id}/{MODEL}"}


async def test_personal_key_bills_its_user(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    agent = await ann.has_an_agent()
    async with sdk(gateway, await ann.personal_key()) as client:
        answer = await client.chat.completions.create(model=agent, messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == "You said: hello"
    assert await billed_like_the_ledger(litellm, ann) > 0


async def test_turns_at_once_are_all_billed(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    people = [await registered(gateway) for _ in range(3)]
    for person in people:
        await person.has_an_agent()
    said = await asyncio.gather(*(person.say(f"message {number}") for person in people for number in range(4)))
    assert {one.status for one in said} == {200}
    for person in people:
        await billed_like_the_ledger(litellm, person)
        assert (await person.ask("GET", "/api/v1/user/usage")).body["totals"]["turns"] == 4


async def test_budget_by_the_operator(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    await ann.has_an_agent()
    assert (await ann.say("hello")).status == 200
    await billed_like_the_ledger(litellm, ann)

    async def allow(amount: str) -> None:
        change = {"budget": {"amount": amount, "period": "day"}}
        said = await ask(gateway, "PATCH", f"/api/v1/admin/users/{ann.id}", change, key=OPERATOR_KEY)
        assert said.status == 200, said.text

    await allow("0.000001")
    assert litellm.call("GET", f"/user/info?user_id={ann.id}")["user_info"]["max_budget"] == 0.000001
    for stream in (False, True):
        refused = await ann.say("hello again", stream=stream)
        assert (refused.status, refused.body["error"]["code"]) == (402, "budget_exceeded")
    await allow("10")
    assert (await ann.say("hello again")).status == 200


async def test_budget_that_litellm_refuses_behind_letta(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    """A budget of the key's own, which the gateway does not look at before the turn."""
    ann = await registered(gateway)
    await ann.has_an_agent()
    assert (await ann.say("hello")).status == 200
    before = await billed_like_the_ledger(litellm, ann)
    [key] = keys_at(litellm, ann)
    litellm.call("POST", "/key/update", {"key": key, "max_budget": 0.000001})
    for stream in (False, True):
        refused = await ann.say("hello again", stream=stream)
        assert (refused.status, refused.body["error"]["code"]) == (402, "budget_exceeded"), refused.text
        assert "key" not in refused.text.lower()
    assert await ledger_of(ann) == before == spent_at(litellm, ann)
    litellm.call("POST", "/key/update", {"key": key, "max_budget": None})


async def test_deleted_user_leaves_no_key(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    await ann.has_an_agent()
    assert len(keys_at(litellm, ann)) == 1
    assert (await ann.ask("DELETE", "/api/v1/user")).status == 204
    with pytest.raises(urllib.error.HTTPError) as raised:
        keys_at(litellm, ann)
    with raised.value as refused:
        assert refused.code == 404


async def test_nobody_is_shown_a_key(litellm: LitellmProxy, gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    await ann.has_an_agent()
    for path in ("/api/v1/user/export", "/api/v1/user/profile", "/api/v1/agent/status"):
        said = await ann.ask("GET", path)
        assert said.status == 200
        assert not any(secret in said.text for secret in ("sk-", "litellm_key", litellm.base_url))
    shown = await ask(gateway, "GET", f"/api/v1/admin/users/{ann.id}", key=OPERATOR_KEY)
    assert "litellm" not in shown.text
    assert MASTER_KEY not in gateway.errors
