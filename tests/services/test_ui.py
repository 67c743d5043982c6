"""The operator's page in headless Chromium, before a real App Server: at a phone's width and at a desk's."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import pytest_asyncio

from gateway.accounts.operator_sessions import COOKIE
from tests.live.app_server import AppServer
from tests.live.gateways import gateway_before
from tests.server.running import JSON
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.surroundings import API_KEY, Client, base_url, run

_HERE: Final = Path(__file__).parent
_ROOT: Final = _HERE.parents[1]
SHOTS: Final = _ROOT / ".cache" / "screenshots"
"""Where the screenshots of the last run are."""
OPERATOR_KEY: Final = "sk-operator-of-the-services"
WIDTHS: Final = {360: "dark", 1280: "light"}
PATIENCE: Final = 420.0


class Seen(msgspec.Struct):
    """What the browser saw, by the names of its steps, at one width."""

    width: int
    steps: dict[str, dict[str, Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(app_server: AppServer) -> AsyncIterator[GatewayProcess]:
    environment = {"LETTA_GATEWAY_API_KEYS": API_KEY, "LETTA_GATEWAY_OPERATOR_KEY": OPERATOR_KEY}
    async with gateway_before(app_server, **environment) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=WIDTHS)
async def seen(
    request: pytest.FixtureRequest,
    served: GatewayProcess,
    app_server: AppServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Seen]:
    """Go through the page once at each width."""
    width: int = request.param
    home = tmp_path_factory.mktemp("browser")
    shutil.copy(_HERE / "operator_page.mjs", home)
    (home / "node_modules").symlink_to(installs.NODE_MODULES)
    SHOTS.mkdir(parents=True, exist_ok=True)
    agent = app_server.create_agent()
    chromium = shutil.which("chromium")
    assert chromium is not None
    ended = await run(
        Client(base_url(served), agent.name),
        [installs.NODE, home / "operator_page.mjs"],
        home=home,
        cwd=home,
        seconds=PATIENCE,
        more={
            "AGENT": agent.name,
            "API_KEY": API_KEY,
            "AXE": str(installs.AXE),
            "CHROMIUM": chromium,
            "GATEWAY": f"http://127.0.0.1:{served.port}",
            "KEY": OPERATOR_KEY,
            "NO_KEY": str(_ROOT / "gateway" / "ui" / "static" / "no_key.html"),
            "SCHEME": WIDTHS[width],
            "SHOTS": str(SHOTS),
            "WIDTH": str(width),
        },
    )
    steps = [msgspec.json.decode(line) for line in ended.output.splitlines()]
    assert ended.status == 0, (ended.errors, [step["step"] for step in steps])
    yield Seen(width, {step.pop("step"): step for step in steps})
    app_server.delete_agent(agent.id)


def test_operator_signs_in_by_the_key_alone(seen: Seen) -> None:
    refused, came_in = seen.steps["sign-in"], seen.steps["signed-in"]
    assert refused["error"].startswith("401 invalid_api_key")
    assert refused["focus"] == "operator-key"
    assert came_in["focus"] == "overview-title"
    (cookie,) = came_in["cookies"]
    assert (cookie["name"], cookie["path"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, "/ui", True, "Strict")
    assert came_in["scripts"] == ""


def test_chat_shows_reasoning_words_and_markup_as_text(seen: Seen) -> None:
    chat = seen.steps["chat"]
    assert "Reasoning and tools" in chat["marked"].replace("\n", " ")
    assert "You said: think of <img src=x onerror=alert(1)> & more" in chat["marked"]
    assert "tokens read" in chat["marked"]
    assert chat["images"] == 0


async def test_chat_shows_errors_as_the_api_tells_them(seen: Seen, served: GatewayProcess) -> None:
    failed = seen.steps["chat"]["failed"]
    agents = await served.ask("GET", "/v1/models", {"X-Api-Key": API_KEY})
    model = agents.json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "fail with 400"}]}
    by_api = await served.ask("POST", "/v1/chat/completions", {**JSON, "X-Api-Key": API_KEY}, msgspec.json.encode(body))
    assert by_api.status >= 400
    assert by_api.code in failed
    assert by_api.error["message"] in failed
    assert "req_" in failed


def test_answer_is_stopped_and_a_new_conversation_begins(seen: Seen) -> None:
    assert "Stopped." in seen.steps["stopped"]["stopped"]
    assert "word9" in seen.steps["stopped"]["stopped"]
    assert seen.steps["new"]["left"] == 0


def test_setting_that_is_changed_holds_at_once(seen: Seen) -> None:
    settings = seen.steps["settings"]
    assert any("LETTA_GATEWAY_RATE_LIMIT is wrong" in words for words in settings["refused"])
    assert any("holds from now on" in words for words in settings["saved"])
    assert set(settings["limited"][:-1]) == {200}
    assert settings["limited"][-1] == 429
    assert settings["focus"] == "setting-LETTA_GATEWAY_RATE_LIMIT"
    assert seen.steps["reset"] == {"free": [200, 200, 200], "shown": "600/minute"}


def test_tool_of_the_servers_machine_is_there_once_it_is_allowed(seen: Seen) -> None:
    tool = seen.steps["tool"]
    assert "[Glob" not in tool["without"]
    assert '[Glob {"pattern":"*.nothing"}]' in tool["with"]
    assert "[Glob: " in tool["with"]


def test_user_is_made_blocked_and_given_a_budget(seen: Seen) -> None:
    users = seen.steps["users"]
    assert users["blockedFocus"] == f"Unblock user-of-{seen.width}@example.com"
    assert users["user"].startswith("Active")
    assert "$5.000000 a month" in users["user"]


def test_overview_goes_on_and_leaves_the_focus_where_it_is(seen: Seen) -> None:
    overview = seen.steps["overview"]
    assert overview["kept"] == "Settings"
    assert "rate_limit_exceeded" in overview["errors"]
    assert overview["agents"]


def test_gateway_that_is_away_is_told_of_and_its_figures_are_old(seen: Seen) -> None:
    away = seen.steps["unreachable"]
    assert away["role"] == "alert"
    assert "cannot be reached" in away["problem"]
    assert "What is shown is of" in away["problem"]
    assert seen.steps["reachable"] == {"stale": 0}


def test_session_that_ends_leaves_nothing_on_the_page(seen: Seen) -> None:
    assert seen.steps["expired"] == {"words": "Your session is over. Sign in again.", "left": 0}


def test_page_without_a_key_says_how_to_set_one(seen: Seen) -> None:
    assert "LETTA_GATEWAY_OPERATOR_KEY" in seen.steps["no-key"]["words"]


def test_session_is_over_after_the_sign_out(seen: Seen) -> None:
    assert (seen.steps["signed-out"]["cookies"], seen.steps["signed-out"]["status"]) == ([], 401)


def test_nothing_foreign_is_asked_for_and_the_policy_stops_nothing(seen: Seen, served: GatewayProcess) -> None:
    assert seen.steps["signed-out"]["hosts"] == [f"127.0.0.1:{served.port}"]
    assert seen.steps["signed-out"]["problems"] == []


SECTIONS: Final = ("chat", "settings", "users", "overview")


@pytest.mark.parametrize("step", ["sign-in", *SECTIONS, "unreachable", "no-key"])
def test_everybody_can_use_it(seen: Seen, step: str) -> None:
    """No violation that axe finds, light or dark, and nothing that stands beyond the edge of the screen."""
    assert seen.steps[step]["violations"] == []
    assert seen.steps[step]["width"] <= seen.width


@pytest.mark.parametrize("step", SECTIONS)
def test_keyboard_reaches_everything_and_shows_where_it_is(seen: Seen, step: str) -> None:
    walk = seen.steps[step]["walk"]
    assert walk["wanted"] == walk["reached"] > 1
    assert walk["unseen"] == []
