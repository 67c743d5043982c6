import asyncio

import pytest

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.letta.probe import Probe
from gateway.letta.scripted import Hold, Script, ScriptedBackend
from gateway.translation.agent_events import TextDelta
from tests.server.running import FRIEND, chat_request, local_letta, serving, settings
from tests.server.wire import until
from tests.ui.operator_page import OPERATOR_KEY, page, signed_in


async def test_what_is_under_way() -> None:
    gate, backend = asyncio.Event(), ScriptedBackend([FRIEND])
    backend.play(Script(steps=([TextDelta("Hel")], Hold(gate))))
    async with serving(settings(operator_key=OPERATOR_KEY), backend) as gateway, gateway.connect() as client:
        operator = await signed_in(gateway)
        await client.send(chat_request(stream=True))
        await client.head()
        now = (await operator.ask("GET", "overview")).json()
        levels = now["levels"]
        assert (levels["open_streams"], levels["open_turns"], levels["held_turns"]) == (1, 1, 1)
        (turn,) = now["turns"]
        assert (turn["agent_id"], turn["owner"], turn["source"]) == (FRIEND.id, "local", "chat_completions")
        assert 0 <= now["now"] - turn["began_at"] < 60
        gate.set()
        await client.reader.read(1)
        await until(lambda: not gateway.metrics.levels().held_turns)
        assert (await operator.ask("GET", "overview")).json()["turns"] == []


async def test_errors_are_those_of_the_requests_that_are_counted() -> None:
    async with page() as operator:
        await operator.ask("PATCH", "settings/LOG_LEVEL", {})
        await operator.gateway.ask("GET", "/ui/api/overview")
        await operator.gateway.ask("GET", "/api/v1/admin/users")
        await operator.gateway.ask("GET", "/v1/models")
        totals = (await operator.ask("GET", "overview")).json()["totals"]
        assert (totals["requests"], totals["errors"]) == (1, 1)


async def test_what_it_depends_on() -> None:
    async with page() as operator:
        parts = {part["name"]: part for part in (await operator.ask("GET", "overview")).json()["dependencies"]}
        assert (parts["letta"]["status"], parts["database"]["status"]) == ("ok", "ok")
    async with page() as operator:
        operator.gateway.backend.down = UpstreamUnavailable()
        parts = {part["name"]: part for part in (await operator.ask("GET", "overview")).json()["dependencies"]}
        assert (parts["letta"]["status"], parts["letta"]["code"]) == ("failed", "upstream_unavailable")


async def test_dependency_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ui.overview.PATIENCE", 1.5)

    async def hang() -> None:
        await asyncio.Event().wait()

    async with page() as operator:
        app = operator.gateway.app
        app[keys.PROBES]["letta"] = Probe(hang, app[keys.TASKS])
        parts = {part["name"]: part for part in (await operator.ask("GET", "overview")).json()["dependencies"]}
        assert (parts["letta"]["status"], parts["letta"]["code"]) == ("failed", "not_answered")
        assert parts["database"]["status"] == "ok"


async def test_who_answers_where_letta_is_the_gateways_own() -> None:
    async with serving(settings(operator_key=OPERATOR_KEY), local=local_letta()) as gateway:
        now = (await (await signed_in(gateway)).ask("GET", "overview")).json()
        assert "scripted" in now["note"]
        assert now["version"]
        assert now["draining"] is False


async def test_agents_are_the_models_of_the_api() -> None:
    async with page() as operator:
        assert [model["id"] for model in (await operator.ask("GET", "models")).json()["data"]] == ["friend"]
        assert (await operator.ask("GET", "models/friend")).json()["letta"]["agent_id"] == FRIEND.id
