"""The settings' table written out."""

import re

from gateway import settings_text
from gateway.settings import load, table


def test_listing_has_a_line_for_each() -> None:
    lines = settings_text.listing().splitlines()
    assert [line.split()[0] for line in lines] == [setting.row.env for setting in table()]


def test_env_example_uncommented_is_the_defaults() -> None:
    lines = re.findall(r"^#([A-Z_]+)=(.*)$", settings_text.env_example(), re.MULTILINE)
    environment = dict(lines)
    assert set(environment) == {setting.row.env for setting in table()}
    environment["LETTA_BASE_URL"] = "http://127.0.0.1:8283"
    assert load(environment) == load({"LETTA_BASE_URL": "http://127.0.0.1:8283"})


def test_markdown_names_alias_default_and_field() -> None:
    rows = settings_text.markdown().splitlines()
    assert rows[0].startswith("| setting |")
    assert "| `LETTA_API_KEY` | `letta_api_key` |  |" in settings_text.markdown()
    assert "Also: LETTA_API_TOKEN." in settings_text.markdown()
    assert "| `LETTA_GATEWAY_PORT` | `port` | `8080` |" in settings_text.markdown()
