"""What the documents say is so."""

import re
from pathlib import Path

import msgspec

from gateway import settings_text
from gateway.settings import table
from gateway.translation.openai_types import ChatCompletionRequest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_env_example_is_the_table() -> None:
    assert (ROOT / "deploy/env.example").read_text("utf-8") == settings_text.env_example(), "run `make env-example`"


def test_readme_holds_the_table_of_settings() -> None:
    assert settings_text.markdown() in README, "put settings_text.markdown() between the README's marks"


def test_readme_names_every_field_of_a_request() -> None:
    section = README.split("### What becomes of each field")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)", section))
    assert {field.name for field in msgspec.structs.fields(ChatCompletionRequest)} <= named


def test_readme_names_every_error_code() -> None:
    section = README.split("### Errors")[1].split("\n## ")[0]
    sources = [*(ROOT / "gateway").rglob("*.py"), *(ROOT / "middleware").rglob("*.py")]
    text = "".join(source.read_text("utf-8") for source in sources)
    codes = set(re.findall(r'(?:default_code|code) ?= ?"(\w+)"', text))
    never_shown = {"agent_gone"}  # answered as model_not_found
    assert codes - never_shown <= set(re.findall(r"`(\w+)`", section))


def test_readme_names_every_middleware() -> None:
    setup = (ROOT / "setup.cfg").read_text("utf-8")
    for name in re.findall(r"^    (\w+) = middleware\.\w+:middleware$", setup, re.MULTILINE):
        assert f"`{name}`" in README


def test_readme_names_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_no_lock_names_an_address() -> None:
    for lock in (ROOT / "deploy/locks").iterdir():
        text = lock.read_text("utf-8")
        assert "://" not in text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all("--hash=sha256:" in line or line.endswith("\\") for line in lines)


def test_every_setting_is_named_by_its_field_or_by_letta() -> None:
    for setting in table():
        assert setting.row.env.lower().removeprefix(
            "letta_gateway_"
        ) == setting.field or not setting.row.env.startswith("LETTA_GATEWAY_")
