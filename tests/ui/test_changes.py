from typing import Any

import msgspec
import pytest

from gateway import keys
from gateway.letta.backend import Agent
from gateway.letta.scripted import ScriptedBackend
from gateway.live_settings.current import EDITABLE
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.settings import Origin, table
from tests.server.recorded_logs import recorded_logs
from tests.server.running import FRIEND, JSON, Running, serving, settings
from tests.server.wire import until
from tests.storage.late import late_database
from tests.ui.operator_page import API_KEY, OPERATOR_KEY, page, signed_in

KEY = {"X-Api-Key": API_KEY}
CHANGES = {
    "LETTA_GATEWAY_SERVER_TOOLS": ('{"Milo":["Read"]}', "rate limits are no JSON"),
    "LOG_LEVEL": ("WARNING", "LOUD"),
    "LETTA_GATEWAY_RATE_LIMIT": ("5/minute", "five"),
    "LETTA_GATEWAY_CONVERSATION": ("stateless", "both"),
    "LETTA_GATEWAY_TOOL_ACTIVITY": ("reasoning", "shown"),
    "LETTA_GATEWAY_QUEUE_DEPTH": ("3", "-1"),
    "LETTA_GATEWAY_MAX_TURNS": ("7", "many"),
    "LETTA_GATEWAY_REGISTRATION": ("closed", "ajar"),
}


def test_every_setting_that_can_change_is_tried() -> None:
    assert set(CHANGES) == {setting.row.env for setting in EDITABLE.values()}
    assert not [setting.row.env for setting in EDITABLE.values() if setting.row.secret]


@pytest.mark.parametrize("name", CHANGES)
async def test_change_holds_is_shown_and_is_taken_back(name: str) -> None:
    right, wrong = CHANGES[name]
    async with page() as operator:
        with recorded_logs():  # whose level is put back
            before = await operator.setting(name)
            refused = await operator.change(name, wrong)
            assert (refused.status, refused.error["param"]) == (400, "value")
            assert name in refused.error["message"]
            assert await operator.setting(name) == before
            changed = (await operator.change(name, right)).json()
            assert (changed["value"], changed["source"], changed["configured"]) == (right, "changed", before["value"])
            assert changed["changed_at"] > 0
            assert await operator.setting(name) == changed
            reset = await operator.ask("DELETE", f"settings/{name}")
            assert reset.json() == before == await operator.setting(name)


@pytest.mark.parametrize("name", ["LETTA_GATEWAY_OPERATOR_KEY", "SECRET_KEY", "LETTA_BASE_URL", "nothing", "log_level"])
async def test_other_settings_cannot_be_changed(name: str) -> None:
    async with page() as operator:
        for answer in (await operator.change(name, "x"), await operator.ask("DELETE", f"settings/{name}")):
            assert (answer.status, answer.error["param"]) == (400, "name")


async def test_no_secret_is_in_any_answer() -> None:
    secrets: dict[str, Any] = {
        setting.field: f"canary-of-{setting.field}-1234567890abcdef"
        for setting in table()
        if setting.row.secret and setting.field not in ("api_keys", "middleware_config", "database_url", "redis_url")
    }
    urls = {"ollama_base_url": "http://me:canary-password@ollama.invalid:11434"}
    async with serving(settings(**secrets, **urls, api_keys=(API_KEY, "canary-key"))) as gateway:
        operator = await signed_in(gateway, secrets["operator_key"])
        for path in ("settings", "overview", "keys", "usage", "users", "models", "session"):
            answer = await operator.ask("GET", path)
            assert answer.status == 200, path
            assert b"canary" not in answer.body, path
            assert API_KEY.encode() not in answer.body, path
        shown = await operator.setting("LETTA_API_KEY")
        assert (shown["value"], shown["configured"], shown["is_secret"], shown["is_set"]) == (None, None, True, True)
        assert (await operator.setting("SUPABASE_JWT_ISSUER"))["value"] == ""
        assert (await operator.setting("OLLAMA_BASE_URL"))["value"] == "http://***@ollama.invalid:11434"


# What changes --------------------------------------------------------------------------------------------------------


async def test_rate_limit_holds_for_the_next_request() -> None:
    async with page() as operator:
        gateway = operator.gateway
        await operator.change("LETTA_GATEWAY_RATE_LIMIT", "2/minute")
        assert [(await gateway.ask("GET", "/v1/models", KEY)).status for _ in range(3)] == [200, 200, 429]
        await operator.ask("DELETE", "settings/LETTA_GATEWAY_RATE_LIMIT")
        assert (await gateway.ask("GET", "/v1/models", KEY)).status == 200


async def test_turns_that_are_held_at_once() -> None:
    async with page() as operator:
        await operator.change("LETTA_GATEWAY_MAX_TURNS", "1")
        assert operator.gateway.metrics.levels().most_turns == 1
        assert operator.gateway.app[keys.TURNS]._policy.max_turns == 1
        assert (await operator.gateway.chat(headers=KEY)).status == 200


async def test_conversation_mode_holds_for_the_next_request() -> None:
    async with page() as operator:
        gateway = operator.gateway
        await gateway.chat(headers=KEY)
        await operator.change("LETTA_GATEWAY_CONVERSATION", "stateless")
        await gateway.chat(headers=KEY)
        own, throwaway = (turn.sent.conversation_id for turn in gateway.backend.turns)
        assert own is None
        assert throwaway is not None


async def test_registration_is_opened() -> None:
    account = {"email": "ann@example.com", "password": "correct horse battery staple"}
    async with page(registration="closed") as operator:

        async def register() -> int:
            body = msgspec.json.encode(account)
            return (await operator.gateway.ask("POST", "/api/v1/auth/register", JSON, body)).status

        assert await register() == 403
        await operator.change("LETTA_GATEWAY_REGISTRATION", "open")
        assert await register() == 201


async def test_log_level_hides_no_change_and_nobody_who_comes_in() -> None:
    async with page() as operator:
        with recorded_logs(level="INFO") as logs:
            await operator.change("LOG_LEVEL", "ERROR")
            await operator.change("LETTA_GATEWAY_QUEUE_DEPTH", "3")
            await operator.ask("DELETE", "settings/LETTA_GATEWAY_QUEUE_DEPTH")
            await signed_in(operator.gateway)
            await operator.ask("DELETE", "session")
        told = [line for line in logs.lines if line["event"] != "request"]
        assert [(line["event"], line.get("setting"), line.get("new")) for line in told] == [
            ("setting changed", "LOG_LEVEL", "ERROR"),
            ("setting changed", "LETTA_GATEWAY_QUEUE_DEPTH", "3"),
            ("setting changed", "LETTA_GATEWAY_QUEUE_DEPTH", "8"),
            ("operator signed in", None, None),
            ("operator signed out", None, None),
        ]
        assert {line["client"] for line in told} == {"127.0.0.1"}


async def test_page_that_was_opened_earlier_takes_back_nobody_elses_change() -> None:
    async with page() as operator:
        other = await signed_in(operator.gateway)
        seen = await operator.setting("LETTA_GATEWAY_SERVER_TOOLS")
        await other.change("LETTA_GATEWAY_SERVER_TOOLS", '{"Milo": ["Read"]}')
        body = {"value": '{"Ann": ["Glob"]}', "changed_at": seen["changed_at"]}
        answer = await operator.ask("PATCH", "settings/LETTA_GATEWAY_SERVER_TOOLS", body)
        assert (answer.status, answer.code) == (409, "setting_changed")
        assert (await operator.setting("LETTA_GATEWAY_SERVER_TOOLS"))["value"] == '{"Milo":["Read"]}'
        assert (await operator.ask("PATCH", "settings/LOG_LEVEL", {"value": "DEBUG"})).status == 400


async def test_empty_value_takes_the_place_of_none() -> None:
    async with page(rate_limit="60/minute") as operator:
        answer = await operator.change("LETTA_GATEWAY_RATE_LIMIT", "")
        assert (answer.status, answer.error["param"]) == (400, "value")
        assert "reset it" in answer.error["message"]
        assert (await operator.setting("LETTA_GATEWAY_RATE_LIMIT"))["value"] == "60/minute"


# Others, and later ---------------------------------------------------------------------------------------------------


async def test_changes_are_kept_over_a_restart_and_seen_by_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server.lifecycle.LOOK_PERIOD", 0.05)
    origins = {"queue_depth": Origin("environment", "LETTA_GATEWAY_QUEUE_DEPTH")}
    async with late_database() as database:
        monkeypatch.setattr(type(database), "is_shared", True)

        async def start() -> tuple[Running, Listener]:
            backend = ScriptedBackend([FRIEND, Agent("agent-2", "Milo", 0)])
            app = build_app(
                settings(operator_key=OPERATOR_KEY, queue_depth=5), database, backend=backend, origins=origins
            )
            listener = Listener(app, "127.0.0.1", 0)
            await listener.start()
            return Running(app, backend, listener, "127.0.0.1"), listener

        (one, one_listener), (other, other_listener) = await start(), await start()
        operator = await signed_in(one)
        shown = await operator.setting("LETTA_GATEWAY_QUEUE_DEPTH")
        assert (shown["source"], shown["found"]) == ("environment", "LETTA_GATEWAY_QUEUE_DEPTH")
        await operator.change("LETTA_GATEWAY_QUEUE_DEPTH", "3")
        assert one.app[keys.LIVE].current.queue_depth == 3
        await until(lambda: other.app[keys.LIVE].current.queue_depth == 3)
        await operator.ask("DELETE", "session")
        operator.gateway = other
        await until(lambda: other.app[keys.OPERATOR_SESSIONS].find(operator.cookie) is None)
        await one_listener.stop()
        await other_listener.stop()
        with recorded_logs() as logs:
            later, later_listener = await start()
        assert later.app[keys.LIVE].current.queue_depth == 3
        (line,) = [line for line in logs.lines if line["event"] == "setting changed"]
        assert (line["setting"], line["old"], line["new"]) == ("LETTA_GATEWAY_QUEUE_DEPTH", "5", "3")
        assert "client" not in line, "nobody changes it now"
        await later_listener.stop()
