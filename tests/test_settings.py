import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import settings as module
from gateway.settings import (
    LETTA_CLOUD,
    Budget,
    Origin,
    Price,
    Setting,
    SettingError,
    Settings,
    budget_of,
    check_reachable,
    is_loopback,
    key_owner,
    load,
    load_with_origins,
    show_value,
    table,
    with_change,
)

LETTA = {"LETTA_BASE_URL": "http://127.0.0.1:8283"}
TOML_LETTA = 'letta_base_url = "http://127.0.0.1:8283"\n'
CANARY = "sk-canary-7f3a"
SECRET = "0123456789abcdef0123456789abcdef"
SUPABASE = {"SUPABASE_URL": "https://project.supabase.co", "SUPABASE_ANON_KEY": "anon"}
LITELLM = {
    "LITELLM_BASE_URL": "http://litellm:4000",
    "LITELLM_MASTER_KEY": "sk-master",
    "LETTA_GATEWAY_USER_MODEL": "openai/gpt-4o",
}
POSTGRES = {"LETTA_GATEWAY_DATABASE_URL": "postgresql://me@db/gateway"}
REDIS = {"LETTA_GATEWAY_REDIS_URL": "redis://cache:6379/1"}
SHARED = {**POSTGRES, **REDIS}
NEEDS = {
    "identity": SUPABASE,
    "billing": LITELLM,
    "redis_url": POSTGRES,
    "advertise": SHARED,
    "shared_port": SHARED,
}
"""What must be set beside a setting's other value."""

# Of every setting: a value other than its default, as the environment writes it.
OTHER: dict[str, tuple[str, Any]] = {
    "letta_base_url": ("https://letta.example.com:8443/base", "https://letta.example.com:8443/base"),
    "letta_api_key": ("sk-let", "sk-let"),
    "letta_project": ("my-project", "my-project"),
    "server_tools": ('{"Milo":["Bash","Read"]}', {"Milo": ("Bash", "Read")}),
    "model": ("openai/gpt-5", "openai/gpt-5"),
    "openai_api_key": ("sk-openai", "sk-openai"),
    "anthropic_api_key": ("sk-anthropic", "sk-anthropic"),
    "openrouter_api_key": ("sk-openrouter", "sk-openrouter"),
    "ollama_base_url": ("127.0.0.1:11434", "127.0.0.1:11434"),
    "lmstudio_base_url": ("http://127.0.0.1:1234/v1", "http://127.0.0.1:1234/v1"),
    "environment": ("production", "production"),
    "log_level": ("DEBUG", "DEBUG"),
    "host": ("::1", "::1"),
    "port": ("9090", 9090),
    "shared_port": ("9092", 9092),
    "metrics_port": ("9091", 9091),
    "home": ("/var/lib/letta-gateway", "/var/lib/letta-gateway"),
    "database_url": ("postgresql://me@db/gateway", "postgresql://me@db/gateway"),
    "database_connections": ("4", 4),
    "redis_url": ("redis://localhost:6379/1", "redis://localhost:6379/1"),
    "advertise": ("http://10.0.0.7:8080", "http://10.0.0.7:8080"),
    "secret_key": (SECRET, SECRET),
    "api_keys": ("key-1, key-2,", ("key-1", "key-2")),
    "operator_key": ("op-key", "op-key"),
    "trusted_networks": ("10.0.0.0/8,::1", ("10.0.0.0/8", "::1")),
    "cors_origins": (
        "https://app.example.com,http://localhost:3000",
        ("https://app.example.com", "http://localhost:3000"),
    ),
    "rate_limit": ("10/second;100/minute", "10/second;100/minute"),
    "max_body": ("1024", 1024),
    "body_timeout": ("1.5", 1.5),
    "connect_timeout": ("1.5", 1.5),
    "first_byte_wait": ("1.5", 1.5),
    "first_event_timeout": ("1.5", 1.5),
    "silence_timeout": ("1.5", 1.5),
    "turn_timeout": ("1.5", 1.5),
    "write_timeout": ("1.5", 1.5),
    "grace": ("0", 0.0),
    "on_disconnect": ("finish", "finish"),
    "conversation": ("stateless", "stateless"),
    "system_prompts": ("message", "message"),
    "tool_activity": ("reasoning", "reasoning"),
    "tool_wait": ("1.5", 1.5),
    "queue_depth": ("0", 0),
    "queue_wait": ("1.5", 1.5),
    "max_turns": ("7", 7),
    "models_ttl": ("0", 0.0),
    "registration": ("open", "open"),
    "registrations": ("0", 0),
    "identity": ("supabase", "supabase"),
    "supabase_url": ("https://project.supabase.co", "https://project.supabase.co"),
    "supabase_anon_key": ("sb_publishable_1", "sb_publishable_1"),
    "supabase_service_key": ("sb_secret_1", "sb_secret_1"),
    "supabase_jwt_secret": ("a secret with blanks", "a secret with blanks"),
    "supabase_jwt_issuer": ("https://project.supabase.co/auth/v1", "https://project.supabase.co/auth/v1"),
    "billing": ("litellm", "litellm"),
    "litellm_base_url": ("http://litellm:4000", "http://litellm:4000"),
    "litellm_master_key": ("sk-master", "sk-master"),
    "prices": (
        '{"*":{"prompt":2.5,"completion":10,"cached":1.25}}',
        {"*": Price(prompt=2.5, completion=10, cached=1.25)},
    ),
    "user_budget": ("5/month", "5/month"),
    "user_model": ("openai/gpt-4o", "openai/gpt-4o"),
    "user_embedding": ("openai/text-embedding-3-small", "openai/text-embedding-3-small"),
    "user_tools": ("web_search,run_code", ("web_search", "run_code")),
    "middleware": ("request_id,my_own", ("request_id", "my_own")),
    "middleware_config": ('{"my_own":{"depth":2}}', {"my_own": {"depth": 2}}),
}

SETTINGS = list(table())
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.field)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder without a configuration file."""
    monkeypatch.chdir(tmp_path)


def toml(tmp_path: Path, text: str, name: str = "letta-gateway.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def toml_value(value: Any) -> str:
    """The value as TOML writes it."""
    match value:
        case tuple():
            return f"[{', '.join(map(toml_value, value))}]"
        case dict():
            inner = ", ".join(f"{toml_value(name)} = {toml_value(item)}" for name, item in value.items())
            return f"{{ {inner} }}"
        case Price():
            return toml_value(msgspec.structs.asdict(value))
        case _:
            return msgspec.json.encode(value).decode()


def wrong(environ: dict[str, str], config_file: Path | None = None) -> str:
    """The one line that a wrong setting stops the start with."""
    with pytest.raises(SettingError) as raised:
        load({**LETTA, **environ}, config_file)
    line = str(raised.value)
    assert "\n" not in line
    assert line.endswith(".")
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return line


# The table -----------------------------------------------------------------------------------------------------------


def test_every_setting_is_tried_here() -> None:
    assert [setting.field for setting in SETTINGS] == list(OTHER) == list(Settings.__struct_fields__)


@every_setting
def test_row_has_a_name_and_a_help(setting: Setting) -> None:
    assert re.fullmatch(
        r"(LETTA|ENVIRONMENT|LOG_LEVEL|SECRET_KEY|(OPENAI|ANTHROPIC|OPENROUTER|OLLAMA|LMSTUDIO|SUPABASE|LITELLM)_)"
        r"[A-Z_]*",
        setting.row.env,
    )
    assert setting.row.help.endswith(".")
    assert len(setting.row.help) < 120
    assert "\n" not in setting.row.help


def test_names_are_each_given_once() -> None:
    names = [name for setting in SETTINGS for name in (setting.row.env, *setting.row.aliases)]
    assert len(names) == len(set(names))


@every_setting
def test_default_is_shown_as_the_environment_would_hold_it(setting: Setting) -> None:
    shown = show_value(setting.default)
    key = {"LETTA_API_KEY": "x"} if setting.field == "letta_base_url" else {}
    again = getattr(load({**LETTA, **key, setting.row.env: shown}), setting.field)
    assert again == (LETTA["LETTA_BASE_URL"] if setting.field == "letta_base_url" and not key else again)
    if setting.field != "letta_base_url":
        assert again == setting.default


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (30.0, "30"),
        (0.5, "0.5"),
        (8080, "8080"),
        ((), ""),
        (("a", "b"), "a,b"),
        ({}, ""),
        ({"a": {}}, '{"a":{}}'),
        ("x", "x"),
        (True, "true"),
        (False, "false"),
    ],
)
def test_value_is_shown(value: Any, shown: str) -> None:
    assert show_value(value) == shown


# Where values come from ----------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_readme() -> None:
    loaded = load(LETTA)
    assert (loaded.host, loaded.port, loaded.environment, loaded.on_disconnect) == (
        "127.0.0.1",
        8080,
        "development",
        "cancel",
    )
    assert (loaded.connect_timeout, loaded.first_byte_wait, loaded.first_event_timeout) == (5, 5, 120)
    assert (loaded.silence_timeout, loaded.turn_timeout, loaded.grace) == (60, 900, 30)
    assert loaded == Settings(letta_base_url=LETTA["LETTA_BASE_URL"])


@every_setting
def test_from_the_environment(setting: Setting) -> None:
    raw, value = OTHER[setting.field]
    needed = {**LETTA, **NEEDS.get(setting.field, {})}
    assert getattr(load({**needed, setting.row.env: raw}), setting.field) == value
    assert value != setting.default


@every_setting
def test_from_a_file_that_the_environment_names(setting: Setting, tmp_path: Path) -> None:
    raw, value = OTHER[setting.field]
    secret = tmp_path / "secret"
    secret.write_text(f"{raw}\n")
    needed = {**LETTA, **NEEDS.get(setting.field, {})}
    environ = {name: text for name, text in needed.items() if name != setting.row.env}
    assert getattr(load({**environ, f"{setting.row.env}_FILE": str(secret)}), setting.field) == value


@every_setting
def test_from_toml_and_the_environment_over_it(setting: Setting, tmp_path: Path) -> None:
    raw, value = OTHER[setting.field]
    line = f"{setting.field} = {toml_value(value)}\n"
    config = toml(tmp_path, line if setting.field == "letta_base_url" else TOML_LETTA + line)
    needed = NEEDS.get(setting.field, {})
    assert getattr(load(needed), setting.field) == value
    assert getattr(load(needed, config), setting.field) == value
    default = show_value(setting.default) or LETTA["LETTA_BASE_URL"]
    if setting.default not in ("", (), {}):
        assert getattr(load({**needed, setting.row.env: default}), setting.field) == setting.default
    assert getattr(load({**needed, setting.row.env: raw}), setting.field) == value


@every_setting
def test_from_systemds_credentials_and_everything_else_over_them(setting: Setting, tmp_path: Path) -> None:
    raw, value = OTHER[setting.field]
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / setting.row.env).write_text(f"{raw}\n")
    needed = {**LETTA, **NEEDS.get(setting.field, {}), "CREDENTIALS_DIRECTORY": str(folder)}
    environ = {name: text for name, text in needed.items() if name != setting.row.env}
    assert getattr(load(environ), setting.field) == value
    if setting.default not in ("", (), {}):
        default = show_value(setting.default)
        assert getattr(load({**environ, setting.row.env: default}), setting.field) == setting.default
        toml(tmp_path, f"{setting.field} = {toml_value(setting.default)}\n")
        assert getattr(load(environ), setting.field) == setting.default


def test_credential_under_an_alias_or_empty_or_of_others(tmp_path: Path) -> None:
    for name, text in (("LETTA_API_TOKEN", b"old"), ("SECRET_KEY", b"\n"), ("tls.key", b"\xff"), ("lower_case", b"1")):
        (tmp_path / name).write_bytes(text)
    loaded = load({**LETTA, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (loaded.letta_api_key, loaded.secret_key) == ("old", "")


@pytest.mark.parametrize("secret", [b"\xff", None])
def test_credentials_that_cannot_be_read(secret: bytes | None, tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    if secret is not None:
        folder.mkdir()
        (folder / "SECRET_KEY").write_bytes(secret)
    with pytest.raises(SettingError, match=r"^CREDENTIALS_DIRECTORY cannot be read: ") as raised:
        load({**LETTA, "CREDENTIALS_DIRECTORY": str(folder)})
    assert "\n" not in str(raised.value)


def test_credential_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "SECRET_KEY").write_text(CANARY)
    line = wrong({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert line.startswith("SECRET_KEY is wrong: ")
    assert CANARY not in line
    (tmp_path / "LETTA_GATEWAY_API_KEY").write_text(CANARY)
    line = wrong({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert line.startswith("LETTA_GATEWAY_API_KEY is a credential and not a setting.")
    assert CANARY not in line


def test_alias_and_the_name_over_it() -> None:
    assert load({**LETTA, "LETTA_API_TOKEN": "old"}).letta_api_key == "old"
    assert load({**LETTA, "LETTA_API_TOKEN": "old", "LETTA_API_KEY": "new"}).letta_api_key == "new"


def test_alias_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old\n")
    assert load({**LETTA, "LETTA_API_TOKEN_FILE": "token"}).letta_api_key == "old"


def test_empty_variable_is_an_unset_one(tmp_path: Path) -> None:
    toml(tmp_path, TOML_LETTA + "port = 9090\n")
    assert load({"LETTA_GATEWAY_PORT": "", "LETTA_GATEWAY_PORT_FILE": "", "LETTA_BASE_URL": ""}).port == 9090


def test_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETTA_BASE_URL", "http://letta:8283")
    assert load().letta_base_url == "http://letta:8283"


def test_toml_is_read_where_it_is_named_alone(tmp_path: Path) -> None:
    elsewhere = toml(tmp_path, TOML_LETTA + "port = 1\n", "other.toml")
    toml(tmp_path, TOML_LETTA + "port = 2\n")
    assert load({}, elsewhere).port == 1
    assert load({}).port == 2


def test_key_without_a_url_means_letta_cloud() -> None:
    assert load({"LETTA_API_KEY": "sk-let"}).letta_base_url == LETTA_CLOUD
    assert load({**LETTA, "LETTA_API_KEY": "sk-let"}).letta_base_url == LETTA["LETTA_BASE_URL"]


def test_nothing_is_set_means_a_local_letta() -> None:
    loaded = load({})
    assert (loaded.letta_base_url, loaded.letta_api_key, loaded.server_tools) == ("", "", {})


def test_providers_key_means_no_letta_cloud() -> None:
    assert load({"OPENAI_API_KEY": "sk-1"}).letta_base_url == ""


def test_ollamas_own_variable_and_ours_over_it() -> None:
    assert load({"OLLAMA_HOST": "0.0.0.0"}).ollama_base_url == "0.0.0.0"  # noqa: S104
    assert load({"OLLAMA_HOST": "a", "OLLAMA_BASE_URL": "http://b"}).ollama_base_url == "http://b"


@pytest.mark.parametrize("url", ["ws://127.0.0.1:4500", "wss://letta.example.com", "https://letta.example.com/base"])
def test_app_server_may_be_named_by_its_socket(url: str) -> None:
    assert load({"LETTA_BASE_URL": url}).letta_base_url == url


# What is wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENVIRONMENT", "staging"),
        ("LOG_LEVEL", "debug"),
        ("LETTA_GATEWAY_PORT", "http"),
        ("LETTA_GATEWAY_PORT", "65536"),
        ("LETTA_GATEWAY_PORT", "-1"),
        ("LETTA_GATEWAY_METRICS_PORT", "1.5"),
        ("LETTA_GATEWAY_TRUSTED_NETWORKS", "10.0.0.1/8"),
        ("LETTA_GATEWAY_TRUSTED_NETWORKS", "127.0.0.1,letta"),
        ("LETTA_GATEWAY_CORS_ORIGINS", "app.example.com"),
        ("LETTA_GATEWAY_CORS_ORIGINS", "https://app.example.com/"),
        ("LETTA_GATEWAY_CORS_ORIGINS", "null"),
        ("LETTA_GATEWAY_CORS_ORIGINS", "*"),
        ("LETTA_GATEWAY_RATE_LIMIT", "many"),
        ("LETTA_GATEWAY_RATE_LIMIT", "600"),
        ("LETTA_GATEWAY_MAX_BODY", "1"),
        ("LETTA_GATEWAY_BODY_TIMEOUT", "0"),
        ("LETTA_GATEWAY_CONNECT_TIMEOUT", "-1"),
        ("LETTA_GATEWAY_FIRST_BYTE_WAIT", "soon"),
        ("LETTA_GATEWAY_FIRST_EVENT_TIMEOUT", "inf"),
        ("LETTA_GATEWAY_SILENCE_TIMEOUT", "nan"),
        ("LETTA_GATEWAY_TURN_TIMEOUT", "1e9"),
        ("LETTA_GATEWAY_GRACE", "-1"),
        ("LETTA_GATEWAY_GRACE", "nan"),
        ("LETTA_GATEWAY_ON_DISCONNECT", "ignore"),
        ("LETTA_GATEWAY_QUEUE_DEPTH", "-1"),
        ("LETTA_GATEWAY_MAX_TURNS", "some"),
        ("LETTA_GATEWAY_MODELS_TTL", "3601"),
        ("LETTA_GATEWAY_MIDDLEWARE_CONFIG", "{"),
        ("LETTA_GATEWAY_MIDDLEWARE_CONFIG", "[]"),
        ("LETTA_GATEWAY_MIDDLEWARE_CONFIG", '{"a":1}'),
        ("LETTA_GATEWAY_SERVER_TOOLS", "Bash"),
        ("LETTA_GATEWAY_SERVER_TOOLS", '["Bash"]'),
        ("LETTA_GATEWAY_SERVER_TOOLS", '{"Milo": "Bash"}'),
        ("LETTA_GATEWAY_SERVER_TOOLS", '{"Milo": [1]}'),
        ("SECRET_KEY", "short"),
        ("SECRET_KEY", SECRET[:-1]),
        ("LETTA_GATEWAY_REGISTRATION", "yes"),
        ("LETTA_GATEWAY_IDENTITY", "ldap"),
        ("LETTA_GATEWAY_BILLING", "none"),
        ("LETTA_GATEWAY_PRICES", "2.5"),
        ("LETTA_GATEWAY_PRICES", '{"*":2.5}'),
        ("LETTA_GATEWAY_PRICES", '{"*":{"prompt":2.5}}'),
        ("LETTA_GATEWAY_PRICES", '{"*":{"prompt":-1,"completion":10}}'),
        ("LETTA_GATEWAY_PRICES", '{"*":{"prompt":1e9,"completion":10}}'),
        ("LETTA_GATEWAY_PRICES", '{"*":{"prompt":1,"completion":1,"cache":1}}'),
        ("LETTA_GATEWAY_USER_BUDGET", "5"),
        ("LETTA_GATEWAY_USER_BUDGET", "-5/month"),
        ("LETTA_GATEWAY_USER_BUDGET", "5/year"),
        ("LETTA_GATEWAY_USER_BUDGET", "5 / month"),
        ("LETTA_GATEWAY_USER_BUDGET", "1e3/month"),
        ("LETTA_GATEWAY_USER_BUDGET", "0.0000001/month"),
        ("LETTA_GATEWAY_USER_BUDGET", "nan/month"),
        ("LETTA_GATEWAY_USER_BUDGET", "99999999999/month"),
        ("LETTA_BASE_URL", "letta:8283"),
        ("LETTA_BASE_URL", "ws://"),
        ("LETTA_BASE_URL", "ws://letta/?x=1"),
        ("LETTA_BASE_URL", "WS:letta"),
        ("LETTA_BASE_URL", "ftp://letta"),
        ("LETTA_BASE_URL", "http://"),
        ("LETTA_BASE_URL", "http://letta:port"),
        ("LETTA_BASE_URL", "http://[::1"),
        ("LETTA_BASE_URL", "http://letta/?x=1"),
        ("LETTA_BASE_URL", "http://letta/#x"),
    ],
)
def test_wrong_value_is_named(name: str, value: str, tmp_path: Path) -> None:
    assert wrong({name: value}).startswith(name)
    (tmp_path / "value").write_text(value)
    if name != "LETTA_BASE_URL":
        assert wrong({f"{name}_FILE": "value"}).startswith(name)


def test_wrong_value_in_toml_is_named(tmp_path: Path) -> None:
    config = toml(tmp_path, TOML_LETTA + 'port = "http"\n')
    assert wrong({}, config) == "letta-gateway.toml: port is wrong: Expected int, got str (it is 'http')."


@pytest.mark.parametrize("text", ["port = ", 'x = "\n', "\xff", "[a]\n[a]\n"])
def test_toml_that_is_none(text: str, tmp_path: Path) -> None:
    config = tmp_path / "letta-gateway.toml"
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingError, match=r"^letta-gateway\.toml cannot be read: ") as raised:
        load(LETTA)
    assert "\n" not in str(raised.value)


def test_toml_that_is_named_and_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^other\.toml cannot be read: "):
        load(LETTA, tmp_path / "other.toml")


def test_toml_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "letta-gateway.toml").mkdir()
    with pytest.raises(SettingError, match="cannot be read"):
        load(LETTA)


@pytest.mark.parametrize(
    "name", ["LETTA_GATEWAY_PROT", "LETTA_GATEWAY_", "LETTA_GATEWAY_PORT_FILES", "LETTA_GATEWAY_FILE"]
)
def test_unknown_setting_of_ours(name: str) -> None:
    assert wrong({name: "1"}).startswith(f"{name} is not a setting.")


def test_unknown_setting_in_toml(tmp_path: Path) -> None:
    assert wrong({}, toml(tmp_path, "prot = 1\n")).startswith("letta-gateway.toml: prot is not a setting.")
    assert wrong({}, toml(tmp_path, "LETTA_GATEWAY_PORT = 1\n")).startswith("letta-gateway.toml: LETTA_GATEWAY_PORT is")


def test_variables_of_others_are_none_of_our_business() -> None:
    assert load({**LETTA, "LETTA_PG_URI": "x", "GATEWAY_PORT": "y", "PORT": "z"}).port == 8080


def test_value_and_its_file_are_both_set(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("1")
    assert wrong({"LETTA_GATEWAY_PORT": "1", "LETTA_GATEWAY_PORT_FILE": "port"}) == (
        "LETTA_GATEWAY_PORT and LETTA_GATEWAY_PORT_FILE are both set: keep one."
    )


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary", "."):
        with pytest.raises(SettingError, match=r"^LETTA_GATEWAY_PORT_FILE cannot be read: "):
            load({**LETTA, "LETTA_GATEWAY_PORT_FILE": name})


# Secrets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LETTA_API_KEY", f"{CANARY} x"),
        ("LETTA_API_KEY", f"{CANARY}é"),
        ("LETTA_API_KEY", f"{CANARY}\nx"),
        ("LETTA_API_TOKEN", f"{CANARY}\x00"),
        ("LETTA_GATEWAY_API_KEYS", f"good,{CANARY} x"),
        ("LETTA_GATEWAY_API_KEYS", f"{CANARY}\tx"),
        ("LETTA_GATEWAY_OPERATOR_KEY", f"{CANARY}\u202e"),
        ("SUPABASE_ANON_KEY", f"{CANARY} x"),
        ("SUPABASE_SERVICE_KEY", f"{CANARY}\nx"),
        ("LITELLM_MASTER_KEY", f"{CANARY}é"),
        ("SECRET_KEY", CANARY),
        ("LETTA_BASE_URL", f"http://user:{CANARY}@letta:8283"),
        ("LETTA_BASE_URL", f"http://{CANARY}@letta:8283"),
        ("LETTA_BASE_URL", f"http://letta:8283/?key={CANARY}"),
    ],
)
def test_secret_that_is_wrong_is_not_shown(name: str, value: str) -> None:
    line = wrong({name: value})
    assert CANARY not in line
    assert line.startswith(name.replace("LETTA_API_TOKEN", "LETTA_API_KEY"))


@pytest.mark.parametrize(
    "line", [f'api_keys = "{CANARY}"', f'api_keys = [1, "{CANARY}"]', f'letta_api_key = ["{CANARY}"]']
)
def test_secret_that_is_wrong_in_toml_is_not_shown(line: str, tmp_path: Path) -> None:
    assert CANARY not in wrong({}, toml(tmp_path, line))


def test_settings_show_no_secret(tmp_path: Path) -> None:
    loaded = load(
        {
            **LETTA,
            "LETTA_API_KEY": CANARY,
            "LETTA_GATEWAY_API_KEYS": f"{CANARY},{CANARY}-2",
            "LETTA_GATEWAY_OPERATOR_KEY": CANARY,
            "OPENAI_API_KEY": CANARY,
            "ANTHROPIC_API_KEY": CANARY,
            "OPENROUTER_API_KEY": CANARY,
            "SECRET_KEY": CANARY * 3,
            "SUPABASE_ANON_KEY": CANARY,
            "SUPABASE_SERVICE_KEY": CANARY,
            "SUPABASE_JWT_SECRET": CANARY,
            "LITELLM_MASTER_KEY": CANARY,
        }
    )
    for shown in (repr(loaded), str(loaded), f"{loaded}", repr([loaded]), repr({"settings": loaded})):
        assert CANARY not in shown
        assert "api_keys='***'" in shown
        assert "port=8080" in shown


def test_every_setting_that_names_a_key_is_a_secret() -> None:
    named = {s.field for s in SETTINGS if re.search(r"(key|keys|token|password|secret)$", s.field)}
    # A plug-in's configuration may hold anything.
    assert {s.field for s in SETTINGS if s.row.secret} == named | {"database_url", "redis_url", "middleware_config"}


# Replicas ------------------------------------------------------------------------------------------------------------


def test_redis_without_a_database_that_is_shared() -> None:
    assert "set LETTA_GATEWAY_DATABASE_URL too" in wrong({"REDIS_URL": "redis://cache"})


@pytest.mark.parametrize("where", [{"LETTA_GATEWAY_PORT": "0"}, {"LETTA_GATEWAY_HOST": "0.0.0.0"}])  # noqa: S104
def test_gateway_that_others_could_not_reach(where: dict[str, str]) -> None:
    environ = {**LETTA, **POSTGRES, "REDIS_URL": "redis://cache", "LETTA_GATEWAY_API_KEYS": "k", **where}
    with pytest.raises(SettingError, match="LETTA_GATEWAY_ADVERTISE is needed"):
        check_reachable(load(environ))
    check_reachable(load({**environ, "LETTA_GATEWAY_ADVERTISE": "http://10.0.0.7:8080"}))


def test_gateway_of_this_machine_alone_and_a_redis_elsewhere() -> None:
    """On two machines both would be at one address, and each take the other for what it was before."""
    environ = {**LETTA, **POSTGRES, "REDIS_URL": "rediss://:secret@cache:6379/0"}
    with pytest.raises(SettingError, match="as LETTA_GATEWAY_HOST is this machine alone") as refused:
        check_reachable(load(environ))
    assert "secret" not in str(refused.value)
    for told in (
        {"LETTA_GATEWAY_ADVERTISE": "http://127.0.0.1:8081"},
        {"LETTA_GATEWAY_SHARED_PORT": "8080", "LETTA_GATEWAY_PORT": "8081"},
        {"LETTA_GATEWAY_HOST": "10.0.0.7", "LETTA_GATEWAY_API_KEYS": "k"},
    ):
        check_reachable(load({**environ, **told}))
    for here in ("redis://127.0.0.1:6379/0", "redis://[::1]/0", "redis://localhost", "unix:///run/redis.sock"):
        check_reachable(load({**LETTA, **POSTGRES, "REDIS_URL": here}))


@pytest.mark.parametrize("url", ["http://cache:6379", "cache:6379", "postgresql://cache"])
def test_url_that_is_not_of_a_redis(url: str) -> None:
    line = wrong({**POSTGRES, "REDIS_URL": url})
    assert "redis://host:6379/0" in line
    assert url not in line.replace("redis://host:6379/0", "")


@pytest.mark.parametrize("there", [{}, POSTGRES])
def test_port_is_shared_by_those_that_share_everything(there: dict[str, str]) -> None:
    line = wrong({"LETTA_GATEWAY_SHARED_PORT": "9092", **there})
    assert line.startswith("LETTA_GATEWAY_SHARED_PORT ")
    assert "LETTA_GATEWAY_DATABASE_URL (PostgreSQL) and LETTA_GATEWAY_REDIS_URL" in line


def test_address_that_is_no_url() -> None:
    assert "LETTA_GATEWAY_ADVERTISE is wrong" in wrong({"LETTA_GATEWAY_ADVERTISE": "10.0.0.7:8080"})


@pytest.mark.parametrize("there", [{}, POSTGRES])
def test_gateway_that_tells_others_where_it_is_and_shares_nothing(there: dict[str, str]) -> None:
    """As where a Secret was not filled in: it would serve on a file of its own."""
    line = wrong({"LETTA_GATEWAY_ADVERTISE": "http://10.0.0.7:8080", **there})
    assert line.startswith("LETTA_GATEWAY_ADVERTISE ")
    assert "set LETTA_GATEWAY_REDIS_URL" in line


# Accounts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "project.supabase.co", "ftp://x", "https://", "https://x/?a=1", "https://u:p@x"])
def test_services_of_accounts_have_addresses(url: str) -> None:
    supabase = {**SUPABASE, "LETTA_GATEWAY_IDENTITY": "supabase", "SUPABASE_URL": url}
    assert wrong(supabase).startswith("SUPABASE_URL is wrong: ")
    litellm = {**LITELLM, "LETTA_GATEWAY_BILLING": "litellm", "LITELLM_BASE_URL": url}
    assert wrong(litellm).startswith("LITELLM_BASE_URL is wrong: ")
    assert load({**LETTA, "SUPABASE_URL": url, "LITELLM_BASE_URL": url}).identity == "local", "which nobody asks"


def test_services_of_accounts_have_keys() -> None:
    supabase = {**SUPABASE, "LETTA_GATEWAY_IDENTITY": "supabase", "SUPABASE_ANON_KEY": ""}
    assert wrong(supabase).startswith("SUPABASE_ANON_KEY is needed")
    for name in ("LITELLM_MASTER_KEY", "LETTA_GATEWAY_USER_MODEL"):
        litellm = {**LITELLM, "LETTA_GATEWAY_BILLING": "litellm", name: ""}
        assert wrong(litellm).startswith("LITELLM_MASTER_KEY and LETTA_GATEWAY_USER_MODEL are needed")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5/month", Budget(5_000_000, "month")),
        ("0.5/day", Budget(500_000, "day")),
        ("20/total", Budget(20_000_000, "total")),
        ("0/day", Budget(0, "day")),
        ("0.000001/day", Budget(1, "day")),
        ("0.1/day", Budget(100_000, "day")),
        ("999999999.999999/total", Budget(999_999_999_999_999, "total")),
    ],
)
def test_budget_is_exact(text: str, budget: Budget) -> None:
    assert budget_of(text) == budget
    assert load({**LETTA, "LETTA_GATEWAY_USER_BUDGET": text}).user_budget == text


# Who may be served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gateway.example.com", "localhost.example.com"])  # noqa: S104
def test_other_machines_are_served_with_keys_alone(host: str) -> None:
    assert wrong({"LETTA_GATEWAY_HOST": host}).startswith("LETTA_GATEWAY_HOST is ")
    assert load({**LETTA, "LETTA_GATEWAY_HOST": host, "LETTA_GATEWAY_API_KEYS": "key"}).host == host


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback(*, host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        load(LETTA).port = 1  # type: ignore[misc]


def test_prefix_is_that_of_the_names() -> None:
    ours = [setting.row.env for setting in SETTINGS if setting.row.env.startswith("LETTA_GATEWAY")]
    assert all(name.startswith(module.PREFIX) for name in ours)


# Where the file is ---------------------------------------------------------------------------------------------------


def test_file_in_the_gateways_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letta-gateway.toml").write_text('letta_base_url = "http://127.0.0.1:1"\nport = 9001\n')
    environment = {"LETTA_GATEWAY_HOME": str(home)}
    assert load(environment).port == 9001
    (tmp_path / "letta-gateway.toml").write_text('letta_base_url = "http://127.0.0.1:2"\n')
    assert load(environment).letta_base_url == "http://127.0.0.1:2"
    assert load(environment).port == 8080


def test_home_named_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letta-gateway.toml").write_text('letta_base_url = "http://127.0.0.1:3"\n')
    (tmp_path / "name").write_text(str(home))
    assert load({"LETTA_GATEWAY_HOME_FILE": str(tmp_path / "name")}).letta_base_url == "http://127.0.0.1:3"


# What a cluster puts there -------------------------------------------------------------------------------------------


def test_names_that_a_kubernetes_service_puts_into_every_pod() -> None:
    links = {
        "LETTA_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "LETTA_GATEWAY_SERVICE_PORT": "8080",
        "LETTA_GATEWAY_PORT": "tcp://10.0.0.1:8080",
        "LETTA_GATEWAY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "LETTA_GATEWAY_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert load({"LETTA_BASE_URL": "http://127.0.0.1:1", **links}).port == 8080


def test_list_that_is_none() -> None:
    settings = load({"LETTA_BASE_URL": "http://127.0.0.1:1", "LETTA_GATEWAY_TRUSTED_NETWORKS": "none"})
    assert settings.trusted_networks == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("LETTA_GATEWAY_RATE_LIMIT", "0/minute"), ("LETTA_GATEWAY_CORS_ORIGINS", "https://a.example?x")],
)
def test_notation_that_makes_no_sense(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=name):
        load({"LETTA_BASE_URL": "http://127.0.0.1:1", name: value})


# What can change -----------------------------------------------------------------------------------------------------


def test_origins_tell_where_values_were_found(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "SECRET_KEY").write_text(SECRET)
    (credentials / "LOG_LEVEL").write_text("DEBUG")
    config = toml(tmp_path, TOML_LETTA + 'port = 1\nrate_limit = "5/minute"\n')
    environ = {"CREDENTIALS_DIRECTORY": str(credentials), "LETTA_GATEWAY_PORT": "2", "OLLAMA_HOST": "http://o"}
    loaded = load_with_origins(environ, config)
    assert loaded.settings == load(environ, config)
    assert loaded.origins == {
        "letta_base_url": Origin("file", config.name),
        "log_level": Origin("credential", "LOG_LEVEL"),
        "ollama_base_url": Origin("environment", "OLLAMA_HOST"),
        "port": Origin("environment", "LETTA_GATEWAY_PORT"),
        "rate_limit": Origin("file", config.name),
        "secret_key": Origin("credential", "SECRET_KEY"),
    }


def by_field(field: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.field == field)


@every_setting
def test_change_is_read_as_the_environment_is(setting: Setting) -> None:
    raw, value = OTHER[setting.field]
    settings = load({**LETTA, **NEEDS.get(setting.field, {})})
    assert getattr(with_change(settings, setting, f" {raw} "), setting.field) == value
    if setting.row.live:
        changed = with_change(settings, setting, raw)
        assert with_change(changed, setting, show_value(setting.default)) == settings
        assert with_change(changed, setting, "") == settings


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("rate_limit", "often"),
        ("queue_depth", "-1"),
        ("queue_depth", "1.5"),
        ("log_level", "x"),
        ("server_tools", "[]"),
    ],
)
def test_change_that_is_none(field: str, text: str) -> None:
    with pytest.raises(SettingError, match=by_field(field).row.env):
        with_change(load(LETTA), by_field(field), text)


def test_holder_of_a_key_has_a_name_that_does_not_tell_it() -> None:
    assert key_owner("sk-1") == key_owner("sk-1") != key_owner("sk-2")
    assert re.fullmatch(r"key_[0-9a-f]{12}", key_owner("sk-1"))
