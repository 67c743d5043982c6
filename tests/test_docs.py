"""What the documents say is so."""

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from gateway import settings_text
from gateway.conversations.attempts import KEEP, REMEMBER
from gateway.conversations.identity import CHAT_HEADERS, TASK_HEADER
from gateway.conversations.outcomes import MAX_BODY
from gateway.handlers.answering import LONGEST_KEY
from gateway.letta.app_server_parked import LONGEST
from gateway.server.lifecycle import KEEP_RESPONSES
from gateway.settings import Settings, table
from gateway.translation.openai_types import ChatCompletionRequest
from gateway.translation.responses_types import ResponsesRequest
from gateway.translation.tools import MOST_SCHEMAS, MOST_TOOLS
from tests.services.open_webui.server import HEADERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
HEADINGS = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def section(heading: str) -> str:
    """Return what stands under a heading of the README, up to the next one."""
    _, found, rest = README.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_env_example_is_the_table() -> None:
    assert (ROOT / "deploy/env.example").read_text("utf-8") == settings_text.env_example(), "run `make env-example`"


def test_readme_holds_the_table_of_settings() -> None:
    assert settings_text.markdown() in README, "put settings_text.markdown() between the README's marks"


@pytest.mark.parametrize(
    ("path", "request_type"),
    [("/v1/chat/completions", ChatCompletionRequest), ("/v1/responses", ResponsesRequest)],
)
def test_readme_names_every_field_of_a_request(path: str, request_type: type[msgspec.Struct]) -> None:
    rows = re.findall(r"^\| (.+) \| .+ \|$", section(f"### What becomes of each field of `POST {path}`"), re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)", "".join(rows)))
    assert {field.name for field in msgspec.structs.fields(request_type)} <= named


def test_readme_names_every_value_of_a_setting_that_is_one_of_some() -> None:
    text = section("### Which conversation") + section("### System prompts")
    for field in ("conversation", "system_prompts"):
        values = get_args(get_args(Settings.__annotations__[field])[0])
        assert len(values) > 1
        for value in values:
            assert re.search(rf"^\| `{value}`", text, re.MULTILINE), value


def test_readme_names_every_header_that_names_a_chat() -> None:
    text = section("### Which conversation")
    assert all(f"`{name}`" in text for name in (*CHAT_HEADERS, TASK_HEADER))


def test_readme_tells_the_limits_that_are_kept() -> None:
    tools = section("### Tools of the client")
    assert f"more than {MOST_TOOLS} tools, or {MOST_SCHEMAS // 1024} KiB of schemas" in tools
    assert f"{LONGEST:g} s at most" in tools
    assert f"({Settings().tool_wait:g} s)" in tools
    retries = section("### Retries")
    assert f"{LONGEST_KEY} characters at most" in retries
    assert f"up to {MAX_BODY // 1024**2} MiB" in retries
    assert (KEEP, REMEMBER, KEEP_RESPONSES) == (86_400, 60, 30 * 86_400), "a day, a minute, thirty days"


def test_readme_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 _-]", "", text.lower()).replace(" ", "-") for text in HEADINGS}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links
    assert links <= headings


def test_examples_can_be_read() -> None:
    blocks = re.findall(r"^```(python|json|toml)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    readers: dict[str, Callable[[str], object]] = {"python": ast.parse, "json": json.loads, "toml": tomllib.loads}
    assert {kind for kind, _ in blocks} == set(readers)
    for kind, text in blocks:
        assert readers[kind](text)


def test_bodies_in_the_curl_examples_are_json() -> None:
    bodies = [json.loads(body) for body in re.findall(r"-d '(.*?)'", README)]
    assert len([body for body in bodies if "messages" in body]) >= 4


def test_readme_names_every_error_code() -> None:
    sources = [*(ROOT / "gateway").rglob("*.py"), *(ROOT / "middleware").rglob("*.py")]
    text = "".join(source.read_text("utf-8") for source in sources)
    codes = set(re.findall(r'(?:default_code|code) ?= ?"(\w+)"', text))
    never_shown = {"agent_gone", "conversation_gone"}  # answered as model_not_found
    cells = re.findall(r"^\| \d[^|]*\| ([^|]*) \|", section("### Errors"), re.MULTILINE)
    assert sorted(codes - never_shown) == sorted(re.findall(r"`(\w+)`", "".join(cells)))


def test_readme_names_every_middleware() -> None:
    setup = (ROOT / "setup.cfg").read_text("utf-8")
    for name in re.findall(r"^    (\w+) = middleware\.\w+:middleware$", setup, re.MULTILINE):
        assert f"`{name}`" in README


def test_readme_names_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_no_lock_names_an_address() -> None:
    for lock in (ROOT / "deploy/locks").glob("*.txt"):
        text = lock.read_text("utf-8")
        assert "://" not in text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all("--hash=sha256:" in line or line.endswith("\\") for line in lines)


def test_no_npm_lock_names_an_address() -> None:
    for lock in (ROOT / "deploy/locks").rglob("package-lock.json"):
        packages = json.loads(lock.read_text("utf-8"))["packages"]
        assert all("integrity" in package for name, package in packages.items() if name)
        assert not [name for name, package in packages.items() if "resolved" in package]


def test_every_setting_is_named_by_its_field_or_by_letta() -> None:
    for setting in table():
        assert setting.row.env.lower().removeprefix(
            "letta_gateway_"
        ) == setting.field or not setting.row.env.startswith("LETTA_GATEWAY_")


def test_readme_names_every_setting_that_can_change_on_the_page() -> None:
    text = section("### The operator's page")
    for setting in table():
        is_named = f"`{setting.row.env}`" in text
        assert is_named == (setting.row.live or setting.field in ("operator_key", "secret_key")), setting.field


def test_headers_of_open_webui_are_those_that_its_real_one_is_tried_with() -> None:
    headers = json.dumps(HEADERS)
    configs = json.dumps({"0": {"enable": True, "headers": HEADERS}})
    assert f"\n{headers}\n" in README
    assert README.count(f"OPENAI_API_CONFIGS='{configs}'") == 2
