"""Two users of the platform API on a real Letta server of either kind: each has their own of everything."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from gateway.letta.demo_model import RunningDemoModel
from gateway.letta.demo_script import ChatRequest, play, usage
from tests.live import app_server, v1_server
from tests.live.gateways import gateway_before, sdk
from tests.live.letta_server import LettaServer
from tests.server.subprocesses import GatewayProcess
from tests.services.people import OPERATOR_KEY, Person, ask, registered

PRICES = '{"*": {"prompt": 2.5, "completion": 10}}'
COUNTS = ("prompt_tokens", "completion_tokens")
_read_chat = msgspec.json.Decoder(ChatRequest).decode


@pytest.fixture
async def gateway(letta: LettaServer) -> AsyncIterator[GatewayProcess]:
    await asyncio.to_thread(letta.start)
    settings = {"LETTA_GATEWAY_PRICES": PRICES, "LETTA_GATEWAY_OPERATOR_KEY": OPERATOR_KEY}
    model = {"v1": v1_server.MODEL_HANDLE, "app_server": app_server.MODEL_HANDLE}[letta.kind]
    async with gateway_before(letta, LETTA_GATEWAY_USER_MODEL=model, **settings) as running:
        yield running


def asked_of(model: RunningDemoModel, since: int) -> dict[str, int]:
    """Return what the model was asked and said since then, by its own count."""
    totals = dict.fromkeys(COUNTS, 0)
    for seen in model.requests[since:]:
        if seen.path.endswith("/chat/completions"):
            request = _read_chat(seen.body)
            took = usage(request, play(request))
            for name in COUNTS:
                totals[name] += getattr(took, name)
    return totals


async def usage_of(person: Person) -> dict[str, Any]:
    totals: dict[str, Any] = (await person.ask("GET", "/api/v1/user/usage")).body["totals"]
    return totals


async def test_two_users_see_their_own_and_the_numbers_add_up(gateway: GatewayProcess, model: RunningDemoModel) -> None:
    since = len(model.requests)
    ann, bob = [await registered(gateway) for _ in range(2)]
    agents = [await person.has_an_agent() for person in (ann, bob)]
    assert len(set(agents)) == 2
    answers = {person.id: [await person.say(f"{person.email} says {n}") for n in range(2)] for person in (ann, bob)}
    async with sdk(gateway, await ann.personal_key()) as client:
        [named] = [model.id async for model in client.models.list()]
        told = await client.chat.completions.create(model=named, messages=[{"role": "user", "content": "by my key"}])
    assert told.usage is not None

    for person, other in ((ann, bob), (bob, ann)):
        history = (await person.ask("GET", "/api/v1/chat/history")).body["data"]
        assert [said["text"] for said in history if said["role"] == "user"] == [
            f"{person.email} says 1",
            f"{person.email} says 0",
        ]
        assert other.email not in str(history)
        memory = (await person.ask("PATCH", "/api/v1/agent/memory/human", {"value": f"I am {person.email}."})).body
        assert memory["value"] == f"I am {person.email}."
    for person in (ann, bob):
        blocks = (await person.ask("GET", "/api/v1/agent/memory")).body["data"]
        assert [block["value"] for block in blocks if block["label"] == "human"] == [f"I am {person.email}."]

    of_ann, of_bob = await usage_of(ann), await usage_of(bob)
    assert (of_ann["turns"], of_bob["turns"]) == (3, 2)
    counted = asked_of(model, since)
    for name in COUNTS:
        told_bob = [said.body["usage"][name] for said in answers[bob.id]]
        assert of_bob[name] == sum(told_bob)
        assert of_ann[name] + of_bob[name] == counted[name]
    days = await ask(gateway, "GET", "/api/v1/admin/usage", key=OPERATOR_KEY)
    assert Decimal(days.body["totals"]["cost"]) == Decimal(of_ann["cost"]) + Decimal(of_bob["cost"]) > 0


async def test_user_who_is_deleted_leaves_nothing(gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    agent = await ann.has_an_agent()
    key = await ann.personal_key()
    assert (await ann.say("Remember this.")).status == 200
    assert (await ann.ask("DELETE", "/api/v1/user")).status == 204
    assert (await ann.ask("GET", "/api/v1/auth/me")).status == 401
    assert (await ask(gateway, "GET", "/v1/models", key=key)).status == 401
    assert (await ask(gateway, "GET", f"/v1/models/{agent}", key=None)).status == 404
    assert (await ask(gateway, "GET", f"/api/v1/admin/users/{ann.id}", key=OPERATOR_KEY)).status == 404
