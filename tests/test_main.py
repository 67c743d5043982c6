import os
import re
import signal
from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.__main__ import main
from tests.server.subprocesses import gateway_process
from tests.server.upstream import Upstream

CLEAN = {"LETTA_BASE_URL": None, "LETTA_API_KEY": None, "LETTA_API_TOKEN": None}


async def test_check_when_all_is_well() -> None:
    async with Upstream() as letta, gateway_process(letta.url, "check", serves=False) as command:
        assert await command.ended() == 0
    assert "agents     ok      1 found" in command.output
    assert re.fullmatch(r"letta-gateway: database /\S+/gateway\.db; Letta http://127\.0\.0\.1:\d+\n", command.errors)


async def test_check_when_letta_is_down() -> None:
    async with gateway_process("http://127.0.0.1:9", "check", serves=False) as command:
        assert await command.ended() == 1
    assert "letta      FAILED" in command.output
    assert re.fullmatch(r"letta-gateway: database /\S+/gateway\.db; Letta http://127\.0\.0\.1:\d+\n", command.errors)


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"LETTA_BASE_URL": "not a url"}, "LETTA_BASE_URL"),
        ({"LETTA_BASE_URL": "http://127.0.0.1:9", "LETTA_GATEWAY_PORT": "many"}, "LETTA_GATEWAY_PORT"),
        ({"LETTA_BASE_URL": "http://127.0.0.1:9", "LETTA_GATEWAY_PROT": "1"}, "LETTA_GATEWAY_PROT"),
        ({"LETTA_BASE_URL": "http://127.0.0.1:9", "LETTA_GATEWAY_HOST": "::"}, "LETTA_GATEWAY_HOST"),
    ],
)
def test_wrong_setting_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, environment: dict[str, str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [command], env={**CLEAN, **environment})
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("letta-gateway: ")
    assert named in line


async def test_check_when_nothing_is_configured(tmp_path: Path) -> None:
    async with gateway_process(None, "check", serves=False, LETTA_GATEWAY_HOME=str(tmp_path)) as command:
        assert await command.ended() == 0
    assert "letta      local   'serve' starts one; a scripted model answers" in command.output
    assert os.listdir(tmp_path) == [], "nothing is started"  # noqa: PTH208 - a list of names


def test_settings_are_listed_without_any_being_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["check", "--settings"], env=CLEAN)
    assert result.exit_code == 0
    for name in ("LETTA_BASE_URL", "LETTA_GATEWAY_PORT", "LETTA_GATEWAY_MIDDLEWARE_CONFIG"):
        assert name in result.stdout


def test_description_of_the_api_is_written_without_any_setting_being_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["check", "--openapi"], env=CLEAN)
    assert result.exit_code == 0
    assert result.stdout_bytes == files("gateway").joinpath("openapi.json").read_bytes()


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "none.toml"), "check"], env=CLEAN)
    assert result.exit_code == 2
    assert "none.toml" in result.stderr


async def test_config_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    async with Upstream() as letta:
        file.write_text(f'letta_base_url = "{letta.url}"\nenvironment = "production"\n')
        async with gateway_process(None, "--config", str(file), "serve") as gateway:
            assert (await gateway.ask("GET", "/v1/models")).json()["data"][0]["id"] == "friend"
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
    assert gateway.output == ""
    first, second, third, *_ = gateway.errors.splitlines()
    assert first.startswith("Letta Gateway serves http://127.0.0.1:")
    assert "curl" in second
    assert "no API key" in third


def test_database_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {**CLEAN, "LETTA_GATEWAY_HOME": str(tmp_path / "home"), "LETTA_GATEWAY_DATABASE_URL": None}
    said = []
    for command in ("current", "upgrade", "upgrade", "current"):
        result = CliRunner().invoke(main, ["db", command], env=environment)
        assert result.exit_code == 0, result.output
        said.append(result.stdout)
    newest = said[1].split()[1].strip(",")
    assert said == [
        f"schema none, newest {newest}\n",
        f"schema {newest}, from none\n",
        f"schema {newest}, as it was\n",
        f"schema {newest}, newest {newest}\n",
    ]
    assert (tmp_path / "home" / "gateway.db").exists()


@pytest.mark.parametrize("command", ["current", "upgrade"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:secret@db/gateway", "LETTA_GATEWAY_DATABASE_URL is wrong"),
        ("postgresql://me:secret@127.0.0.1:9/gateway", "the database of LETTA_GATEWAY_DATABASE_URL cannot be reached"),
    ],
)
def test_database_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, url: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["db", command], env={**CLEAN, "LETTA_GATEWAY_DATABASE_URL": url})
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"letta-gateway: {said}")
    assert "secret" not in result.output


def test_help() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "serve" in result.stdout
    assert "check" in result.stdout
