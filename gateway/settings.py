"""Every setting as one row: field, type with its bounds, environment name, default, help.

Values come from the environment over ``letta-gateway.toml`` over systemd's credentials over the default; ``NAME_FILE``
names a file that holds the value. They are read once, into a frozen Struct; what is wrong or unknown stops the start
with one line that names it.
"""

import hashlib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

import limits
import msgspec
from msgspec import Meta, Struct

PREFIX: Final = "LETTA_GATEWAY_"
CONFIG_FILE: Final = "letta-gateway.toml"
DEFAULT_HOME: Final = "~/.letta-gateway"
LETTA_CLOUD: Final = "https://api.letta.com"

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Port = Annotated[int, Meta(ge=0, le=65_535)]


class SettingError(Exception):
    """A setting is wrong: the message is one line that names it."""


class Row(Struct, frozen=True):
    """What the table says of one setting."""

    env: str
    help: str
    aliases: tuple[str, ...] = ()
    secret: bool = False
    live: bool = False
    """Whether it can be changed while the gateway serves."""


class Setting(Struct, frozen=True):
    """One line of the table, complete."""

    field: str
    row: Row
    type: Any
    default: Any


def _row(
    env: str,
    help: str,  # noqa: A002 - the table's own column
    *aliases: str,
    secret: bool = False,
    live: bool = False,
) -> Meta:
    return Meta(extra={"row": Row(env, help, aliases, secret, live)})


class Origin(Struct, frozen=True):
    """Where a value was found: in a variable, a systemd credential or a file, by its ``name``."""

    kind: Literal["environment", "credential", "file"]
    name: str


class Price(Struct, frozen=True, forbid_unknown_fields=True):
    """What a model's tokens cost, in US dollars per million; ``cached`` of the prompt, None: as the rest of it."""

    prompt: Annotated[float, Meta(ge=0, le=1_000_000)]
    completion: Annotated[float, Meta(ge=0, le=1_000_000)]
    cached: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None


class Budget(Struct, frozen=True):
    """What may be spent in a period of UTC's calendar, in millionths of a US dollar."""

    micros: int
    period: Literal["day", "month", "total"]


class Settings(Struct, frozen=True, kw_only=True):
    """All settings of one gateway."""

    letta_base_url: Annotated[
        str,
        _row(
            "LETTA_BASE_URL",
            "URL of the Letta server, V1 or App Server; with only a key set: Letta Cloud; with neither: a local one.",
        ),
    ] = ""
    letta_api_key: Annotated[
        str, _row("LETTA_API_KEY", "Letta's API key or server password.", "LETTA_API_TOKEN", secret=True)
    ] = ""
    letta_project: Annotated[str, _row("LETTA_PROJECT", "Slug of the Letta Cloud project, sent as X-Project.")] = ""
    server_tools: Annotated[
        dict[str, tuple[str, ...]],
        _row(
            "LETTA_GATEWAY_SERVER_TOOLS",
            'Tools of the App Server\'s machine an agent may use, by its name or id or \'*\': {"Milo": ["Bash"]}.',
            live=True,
        ),
    ] = {}
    model: Annotated[
        str, _row("LETTA_GATEWAY_MODEL", "Model of the local Letta's agent, as provider/name; none: the provider's.")
    ] = ""
    openai_api_key: Annotated[
        str, _row("OPENAI_API_KEY", "Local Letta: answers come from OpenAI's models.", secret=True)
    ] = ""
    anthropic_api_key: Annotated[
        str, _row("ANTHROPIC_API_KEY", "Local Letta: answers come from Anthropic's models.", secret=True)
    ] = ""
    openrouter_api_key: Annotated[
        str, _row("OPENROUTER_API_KEY", "Local Letta: answers come from OpenRouter's models.", secret=True)
    ] = ""
    ollama_base_url: Annotated[
        str, _row("OLLAMA_BASE_URL", "Local Letta: answers come from this Ollama's models.", "OLLAMA_HOST")
    ] = ""
    lmstudio_base_url: Annotated[
        str, _row("LMSTUDIO_BASE_URL", "Local Letta: answers come from this LM Studio's models.")
    ] = ""
    environment: Annotated[
        Literal["development", "production"],
        _row("ENVIRONMENT", "development: readable logs; production: JSON logs."),
    ] = "development"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        _row("LOG_LEVEL", "The least severe log line that is written.", live=True),
    ] = "INFO"
    host: Annotated[
        str, _row("LETTA_GATEWAY_HOST", "Address to listen on; other than loopback only with API keys.")
    ] = "127.0.0.1"
    port: Annotated[Port, _row("LETTA_GATEWAY_PORT", "Port to listen on; 0: any free one.")] = 8080
    shared_port: Annotated[
        Port,
        _row(
            "LETTA_GATEWAY_SHARED_PORT",
            "A second port, which gateways of one PostgreSQL and Redis on this machine listen on together; 0: none.",
        ),
    ] = 0
    metrics_port: Annotated[
        Port,
        _row(
            "LETTA_GATEWAY_METRICS_PORT",
            "A port for /metrics, /ready, /health, open to all who reach it; 0: none.",
        ),
    ] = 0
    home: Annotated[
        str,
        _row("LETTA_GATEWAY_HOME", "The gateway's own folder: its letta-gateway.toml counts where ./ has none."),
    ] = DEFAULT_HOME
    database_url: Annotated[
        str,
        _row(
            "LETTA_GATEWAY_DATABASE_URL",
            "The gateway's database, as postgresql://user@host/database; none: gateway.db in its folder.",
            secret=True,
        ),
    ] = ""
    database_connections: Annotated[
        int,
        Meta(ge=1, le=1_000),
        _row(
            "LETTA_GATEWAY_DATABASE_CONNECTIONS",
            "Connections to PostgreSQL at most; of all gateways together fewer than its max_connections.",
        ),
    ] = 10
    redis_url: Annotated[
        str,
        _row(
            "LETTA_GATEWAY_REDIS_URL",
            "Redis that several gateways of one PostgreSQL share, as redis://host:6379/0; none: one gateway alone.",
            "REDIS_URL",
            secret=True,
        ),
    ] = ""
    advertise: Annotated[
        str,
        _row(
            "LETTA_GATEWAY_ADVERTISE",
            "URL at which the other gateways reach this one, as http://10.0.0.7:8080; none: its host and port.",
        ),
    ] = ""
    secret_key: Annotated[
        str,
        _row(
            "SECRET_KEY",
            "At least 32 characters from which tokens and stored secrets get their keys; none: made at first start.",
            secret=True,
        ),
    ] = ""
    api_keys: Annotated[
        tuple[str, ...],
        _row("LETTA_GATEWAY_API_KEYS", "API keys of clients, comma-separated; none: loopback only.", secret=True),
    ] = ()
    operator_key: Annotated[
        str,
        _row(
            "LETTA_GATEWAY_OPERATOR_KEY",
            "Key for /ui, /api/v1/admin, /metrics and the details of /ready.",
            secret=True,
        ),
    ] = ""
    trusted_networks: Annotated[
        tuple[str, ...],
        _row(
            "LETTA_GATEWAY_TRUSTED_NETWORKS",
            "Networks of proxies and scrapers, or none: their forwarded headers are believed, and they see /metrics.",
        ),
    ] = ("127.0.0.0/8", "::1/128")
    cors_origins: Annotated[
        tuple[str, ...],
        _row("LETTA_GATEWAY_CORS_ORIGINS", "Web origins that may call the API, exactly; none: no CORS."),
    ] = ()
    rate_limit: Annotated[
        str,
        _row(
            "LETTA_GATEWAY_RATE_LIMIT",
            "Requests per key and per client address, as 600/minute; several by ';'.",
            live=True,
        ),
    ] = "600/minute"
    max_body: Annotated[
        int, Meta(ge=1_024, le=1_073_741_824), _row("LETTA_GATEWAY_MAX_BODY", "Largest request body in bytes.")
    ] = 20_971_520
    body_timeout: Annotated[Seconds, _row("LETTA_GATEWAY_BODY_TIMEOUT", "Seconds for a request's body to arrive.")] = (
        30.0
    )
    connect_timeout: Annotated[Seconds, _row("LETTA_GATEWAY_CONNECT_TIMEOUT", "Seconds to connect to Letta.")] = 5.0
    first_byte_wait: Annotated[
        Seconds,
        _row(
            "LETTA_GATEWAY_FIRST_BYTE_WAIT",
            "Seconds a stream's headers wait for the first event, so errors keep their status.",
        ),
    ] = 5.0
    first_event_timeout: Annotated[
        Seconds, _row("LETTA_GATEWAY_FIRST_EVENT_TIMEOUT", "Seconds for the agent to begin to answer.")
    ] = 120.0
    silence_timeout: Annotated[
        Seconds, _row("LETTA_GATEWAY_SILENCE_TIMEOUT", "Seconds without any frame of Letta's, pings included.")
    ] = 60.0
    turn_timeout: Annotated[Seconds, _row("LETTA_GATEWAY_TURN_TIMEOUT", "Seconds for a whole turn.")] = 900.0
    write_timeout: Annotated[
        Seconds, _row("LETTA_GATEWAY_WRITE_TIMEOUT", "Seconds a client may take nothing of its stream.")
    ] = 60.0
    grace: Annotated[
        Annotated[float, Meta(ge=0, le=3_600)],
        _row("LETTA_GATEWAY_GRACE", "Seconds that open turns may go on after SIGTERM."),
    ] = 30.0
    on_disconnect: Annotated[
        Literal["cancel", "finish"],
        _row("LETTA_GATEWAY_ON_DISCONNECT", "What becomes of a turn whose client went away."),
    ] = "cancel"
    conversation: Annotated[
        Literal["agent", "stateless"],
        _row(
            "LETTA_GATEWAY_CONVERSATION",
            "Requests that name no chat: agent: the newest message, to its own thread; stateless: all, to a new one.",
            live=True,
        ),
    ] = "agent"
    system_prompts: Annotated[
        Literal["overlay", "message", "ignore"],
        _row(
            "LETTA_GATEWAY_SYSTEM_PROMPTS",
            "System messages on an agent's own thread: beside its prompt for the turn, a message, or nothing.",
        ),
    ] = "overlay"
    tool_activity: Annotated[
        Literal["hidden", "reasoning"],
        _row(
            "LETTA_GATEWAY_TOOL_ACTIVITY", "The agent's own tools: not shown, or as lines of its reasoning.", live=True
        ),
    ] = "hidden"
    tool_wait: Annotated[
        Seconds, _row("LETTA_GATEWAY_TOOL_WAIT", "Seconds that a tool call waits for the client's result.")
    ] = 900.0
    queue_depth: Annotated[
        int,
        Meta(ge=0, le=1_000),
        _row("LETTA_GATEWAY_QUEUE_DEPTH", "Turns that may wait for one agent's thread.", live=True),
    ] = 8
    queue_wait: Annotated[
        Seconds, _row("LETTA_GATEWAY_QUEUE_WAIT", "Seconds a turn waits for the one before it, then 409.")
    ] = 30.0
    max_turns: Annotated[
        int,
        Meta(ge=0),
        _row(
            "LETTA_GATEWAY_MAX_TURNS", "Turns held at once, then 503; 0: as many as file descriptors allow.", live=True
        ),
    ] = 0
    models_ttl: Annotated[
        Annotated[float, Meta(ge=0, le=3_600)],
        _row("LETTA_GATEWAY_MODELS_TTL", "Seconds the list of agents is kept."),
    ] = 10.0
    registration: Annotated[
        Literal["auto", "open", "closed"],
        _row(
            "LETTA_GATEWAY_REGISTRATION", "Whether users may register themselves; auto: on loopback alone.", live=True
        ),
    ] = "auto"
    registrations: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)],
        _row("LETTA_GATEWAY_REGISTRATIONS", "Users one address may register before further ones must wait; 0: any."),
    ] = 100
    identity: Annotated[
        Literal["local", "supabase"],
        _row("LETTA_GATEWAY_IDENTITY", "Who knows the users' passwords: the gateway, or Supabase Auth."),
    ] = "local"
    supabase_url: Annotated[
        str, _row("SUPABASE_URL", "The Supabase project, as https://project.supabase.co; its Auth is below it.")
    ] = ""
    supabase_anon_key: Annotated[
        str, _row("SUPABASE_ANON_KEY", "The project's anonymous (publishable) key.", secret=True)
    ] = ""
    supabase_service_key: Annotated[
        str,
        _row("SUPABASE_SERVICE_KEY", "The project's service (secret) key, to delete and block users.", secret=True),
    ] = ""
    supabase_jwt_secret: Annotated[
        str,
        _row("SUPABASE_JWT_SECRET", "The project's HS256 secret; none: its tokens are checked by JWKS.", secret=True),
    ] = ""
    supabase_jwt_issuer: Annotated[
        str, _row("SUPABASE_JWT_ISSUER", "The issuer that the project's tokens must name; none: not checked.")
    ] = ""
    billing: Annotated[
        Literal["local", "litellm"],
        _row("LETTA_GATEWAY_BILLING", "Who counts users' costs: the gateway by its prices, or a LiteLLM proxy."),
    ] = "local"
    litellm_base_url: Annotated[
        str, _row("LITELLM_BASE_URL", "The LiteLLM proxy, as the gateway and Letta reach it.")
    ] = ""
    litellm_master_key: Annotated[str, _row("LITELLM_MASTER_KEY", "The LiteLLM proxy's master key.", secret=True)] = ""
    prices: Annotated[
        dict[str, Price],
        _row(
            "LETTA_GATEWAY_PRICES",
            'US dollars per million tokens, by model or "*": {"openai/gpt-4o": {"prompt": 2.5, "completion": 10}}.',
        ),
    ] = {}
    user_budget: Annotated[
        str,
        _row("LETTA_GATEWAY_USER_BUDGET", "US dollars a user may spend, as 5/month, 0.5/day or 20/total; none: any."),
    ] = ""
    user_model: Annotated[
        str, _row("LETTA_GATEWAY_USER_MODEL", "Model handle of users' agents; none: Letta's own default.")
    ] = ""
    user_embedding: Annotated[
        str, _row("LETTA_GATEWAY_USER_EMBEDDING", "Embedding handle of users' agents (V1); none: Letta's own default.")
    ] = ""
    user_tools: Annotated[
        tuple[str, ...],
        _row("LETTA_GATEWAY_USER_TOOLS", "Tools of users' agents on Letta; what the server does not have is left out."),
    ] = ("core_memory_append", "core_memory_replace", "archival_memory_insert", "archival_memory_search")
    middleware: Annotated[
        tuple[str, ...],
        _row("LETTA_GATEWAY_MIDDLEWARE", "The middleware chain by name, outermost first; none: the default one."),
    ] = ()
    middleware_config: Annotated[
        dict[str, dict[str, Any]],
        _row(
            "LETTA_GATEWAY_MIDDLEWARE_CONFIG",
            "Configuration of middleware by name, as JSON (in TOML a table).",
            secret=True,
        ),
    ] = {}

    def __repr__(self) -> str:
        """Show no secret, wherever a log or a traceback prints the settings."""
        shown = {s.field: "***" if s.row.secret else getattr(self, s.field) for s in table()}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


# The table -----------------------------------------------------------------------------------------------------------


def table() -> Iterator[Setting]:
    """Yield every setting, in the order of the class."""
    hints = msgspec.inspect.type_info(Settings)
    assert isinstance(hints, msgspec.inspect.StructType)  # noqa: S101 - what Settings is
    annotations = Settings.__annotations__
    for field in hints.fields:
        kind = annotations[field.name]
        row = next(meta.extra["row"] for meta in kind.__metadata__ if meta.extra)
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        yield Setting(field.name, row, kind, default)


def show_value(value: Any) -> str:
    """Write a value as the environment would hold it."""
    match value:
        case bool():
            return "true" if value else "false"
        case tuple():
            return ",".join(value)
        case dict():
            return msgspec.json.encode(value).decode() if value else ""
        case float():
            return f"{value:g}"
        case _:
            return str(value)


# Loading -------------------------------------------------------------------------------------------------------------

_LISTED: Final = " 'letta-gateway check --settings' lists them."


def load(environ: Mapping[str, str] | None = None, config_file: Path | None = None) -> Settings:
    """Read the settings; raises ``SettingError``.

    ``config_file`` defaults to ``letta-gateway.toml`` in the working directory or in the gateway's home, whichever is
    there first.
    """
    return load_with_origins(environ, config_file).settings


class Loaded(Struct, frozen=True):
    """The settings, and by their fields where those were found that are not at their default."""

    settings: Settings
    origins: dict[str, Origin] = {}


def load_with_origins(environ: Mapping[str, str] | None = None, config_file: Path | None = None) -> Loaded:
    """Read the settings as ``load`` does, and note where each was found; raises ``SettingError``."""
    environ = os.environ if environ is None else environ
    path = config_file or _found_config(environ)
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    credentials = _credentials(environ)
    file_values = _read_toml(path, must_exist=config_file is not None)
    for setting in table():
        for name in (*setting.row.aliases, setting.row.env):
            if name in credentials:
                values[setting.field] = _convert(setting, _split(setting, credentials[name], name), name)
                origins[setting.field] = Origin("credential", name)
        if setting.field in file_values:
            values[setting.field] = _convert(setting, file_values.pop(setting.field), f"{path.name}: {setting.field}")
            origins[setting.field] = Origin("file", path.name)
        for name in (*setting.row.aliases, setting.row.env):
            raw = _from_environment(environ, name)
            if raw is not None:
                values[setting.field] = _convert(setting, _split(setting, raw, name), name)
                origins[setting.field] = Origin("environment", name)
    for unknown in file_values:
        raise SettingError(f"{path.name}: {unknown} is not a setting.{_LISTED}")
    _refuse_unknown(environ)
    settings = Settings(**values)
    _check(settings)
    if settings.letta_api_key and not settings.letta_base_url:
        settings = msgspec.structs.replace(settings, letta_base_url=LETTA_CLOUD)
    return Loaded(settings, origins)


def with_change(settings: Settings, setting: Setting, text: str) -> Settings:
    """Return the settings with another value, written as the environment would hold it; raises ``SettingError``."""
    raw = text.strip() or show_value(setting.default)
    value = {} if not raw and isinstance(setting.default, dict) else _split(setting, raw, setting.row.env)
    changed = msgspec.structs.replace(settings, **{setting.field: _convert(setting, value, setting.row.env)})
    _check(changed)
    return changed


def _found_config(environ: Mapping[str, str]) -> Path:
    here = Path(CONFIG_FILE)
    home = Path(_from_environment(environ, "LETTA_GATEWAY_HOME") or DEFAULT_HOME).expanduser()
    return here if here.exists() else home / CONFIG_FILE


def _read_toml(path: Path, *, must_exist: bool) -> dict[str, Any]:
    if not path.exists() and not must_exist:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path.name} cannot be read: {error}") from None


def _credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Read what systemd's LoadCredential= has put there: a file for each setting, by the setting's name."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return {}
    known, found = _names(), {}
    try:
        for file in sorted(Path(folder).iterdir()):
            if file.name in known:
                found[file.name] = file.read_text("utf-8").strip()
            elif file.name.startswith(PREFIX):
                raise SettingError(f"{file.name} is a credential and not a setting.{_LISTED}")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"CREDENTIALS_DIRECTORY cannot be read: {error}") from None
    return {name: value for name, value in found.items() if value}


def _from_environment(environ: Mapping[str, str], name: str) -> str | None:
    file = environ.get(f"{name}_FILE")
    if file:
        if environ.get(name):
            raise SettingError(f"{name} and {name}_FILE are both set: keep one.")
        try:
            return Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{name}_FILE cannot be read: {error}") from None
    value = environ.get(name)
    if not value:
        return None  # an empty variable is an unset one, as in compose files
    return None if name == "LETTA_GATEWAY_PORT" and value.startswith("tcp://") else value  # see _SERVICE_LINK


def _split(setting: Setting, raw: str, name: str) -> Any:
    """Read the environment's notation: lists by comma, tables as JSON."""
    base = setting.type
    while get_origin(base) is Annotated:
        base = get_args(base)[0]
    if get_origin(base) is tuple:
        return [] if raw.strip() == "none" else [item.strip() for item in raw.split(",") if item.strip()]
    if get_origin(base) is dict:
        try:
            return msgspec.json.decode(raw.encode())
        except msgspec.DecodeError as error:
            raise SettingError(f"{name} is not JSON: {error}.") from None
    return raw


def _convert(setting: Setting, value: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, setting.type, strict=False)
    except msgspec.ValidationError as error:
        shown = "" if setting.row.secret else f" (it is {value!r})"
        raise SettingError(f"{name} is wrong: {str(error).replace('`', '')}{shown}.") from None


# A Kubernetes Service named letta-gateway puts such names into every pod of its namespace.
_SERVICE_LINK: Final = re.compile(r"LETTA_GATEWAY_(SERVICE_|PORT_[0-9]).*")


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = _names()
    for name in sorted(environ):
        if not name.startswith(PREFIX) or _SERVICE_LINK.fullmatch(name):
            continue
        if name not in known and name.removesuffix("_FILE") not in known:
            raise SettingError(f"{name} is not a setting.{_LISTED}")


def _names() -> frozenset[str]:
    return frozenset(name for setting in table() for name in (setting.row.env, *setting.row.aliases))


def _check(settings: Settings) -> None:
    """Check what no type can say."""
    if settings.letta_base_url:
        _check_url(settings.letta_base_url)
    _check_notations(settings)
    _check_accounts(settings)
    _check_replicas(settings)
    for name, keys in (
        ("LETTA_API_KEY", (settings.letta_api_key,)),
        ("LETTA_GATEWAY_API_KEYS", settings.api_keys),
        ("LETTA_GATEWAY_OPERATOR_KEY", (settings.operator_key,)),
        ("SUPABASE_ANON_KEY", (settings.supabase_anon_key,)),
        ("SUPABASE_SERVICE_KEY", (settings.supabase_service_key,)),
        ("LITELLM_MASTER_KEY", (settings.litellm_master_key,)),
    ):
        if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
            raise SettingError(f"{name} is wrong: a key is printable ASCII without spaces.")
    if not settings.api_keys and not is_loopback(settings.host):
        raise SettingError(
            f"LETTA_GATEWAY_HOST is {settings.host!r}: set LETTA_GATEWAY_API_KEYS before serving other machines."
        )


def _check_replicas(settings: Settings) -> None:
    if settings.redis_url:
        if not settings.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise SettingError("LETTA_GATEWAY_REDIS_URL is wrong: expected a URL like redis://host:6379/0.")
        if not settings.database_url:
            raise SettingError(
                "LETTA_GATEWAY_REDIS_URL is for gateways that share a database: set LETTA_GATEWAY_DATABASE_URL too."
            )
    if settings.advertise:
        _check_web_url("LETTA_GATEWAY_ADVERTISE", settings.advertise)
        if not settings.redis_url:
            raise SettingError(
                "LETTA_GATEWAY_ADVERTISE is for gateways that share everything: set LETTA_GATEWAY_REDIS_URL (and "
                "LETTA_GATEWAY_DATABASE_URL) too, or neither."
            )
    if settings.shared_port and not (settings.database_url and settings.redis_url):
        raise SettingError(
            "LETTA_GATEWAY_SHARED_PORT is for gateways that share everything: set LETTA_GATEWAY_DATABASE_URL "
            "(PostgreSQL) and LETTA_GATEWAY_REDIS_URL too."
        )


def check_reachable(settings: Settings) -> None:
    """Refuse a gateway that those it shares Redis with could not reach; raises ``SettingError``.

    Of who serves alone: nobody reaches a migration, or a command on users.
    """
    if not settings.redis_url or settings.advertise:
        return
    is_everywhere = settings.host in ("", "0.0.0.0", "::")  # noqa: S104 - it is told from others
    if is_everywhere or not settings.port:
        raise SettingError("LETTA_GATEWAY_ADVERTISE is needed: tell at which URL the other gateways reach this one.")
    if is_loopback(settings.host) and not settings.shared_port and not _is_here(settings.redis_url):
        raise SettingError(
            "LETTA_GATEWAY_ADVERTISE is needed, as LETTA_GATEWAY_HOST is this machine alone and the Redis is on "
            "another one: tell at which URL the other gateways reach this one."
        )


def _is_here(redis_url: str) -> bool:
    """Tell that a Redis is on this machine, and so are the gateways that share it, as far as anybody can tell."""
    return redis_url.startswith("unix://") or is_loopback(urlsplit(redis_url).hostname or "localhost")


def _check_notations(settings: Settings) -> None:
    for network in settings.trusted_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise SettingError(f"LETTA_GATEWAY_TRUSTED_NETWORKS is wrong: {error}.") from None
    try:
        if any(limit.amount < 1 for limit in limits.parse_many(settings.rate_limit)):
            raise ValueError  # noqa: TRY301 - as wrong as what cannot be parsed
    except ValueError:
        raise SettingError(
            f"LETTA_GATEWAY_RATE_LIMIT is wrong: {settings.rate_limit!r} is not like 600/minute."
        ) from None
    for origin in settings.cors_origins:
        parts = urlsplit(origin)
        if not parts.scheme or not parts.netloc or parts.path or parts.query or parts.fragment:
            raise SettingError(f"LETTA_GATEWAY_CORS_ORIGINS is wrong: {origin!r} is not like https://app.example.com.")


SHORTEST_SECRET: Final = 32
_BUDGET: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)/(day|month|total)")


def _check_accounts(settings: Settings) -> None:
    if settings.secret_key and len(settings.secret_key) < SHORTEST_SECRET:
        raise SettingError(f"SECRET_KEY is wrong: give it {SHORTEST_SECRET} characters at least, made at random.")
    if settings.user_budget:
        budget_of(settings.user_budget)
    if settings.identity == "supabase":
        _check_web_url("SUPABASE_URL", settings.supabase_url)
        if not settings.supabase_anon_key:
            raise SettingError("SUPABASE_ANON_KEY is needed with LETTA_GATEWAY_IDENTITY=supabase.")
    if settings.billing == "litellm":
        _check_web_url("LITELLM_BASE_URL", settings.litellm_base_url)
        if not settings.litellm_master_key or not settings.user_model:
            raise SettingError(
                "LITELLM_MASTER_KEY and LETTA_GATEWAY_USER_MODEL are needed with LETTA_GATEWAY_BILLING=litellm."
            )


def budget_of(text: str) -> Budget:
    """Read a budget as ``5/month``; raises ``SettingError``."""
    found = _BUDGET.fullmatch(text)
    if found is None:
        raise SettingError(f"LETTA_GATEWAY_USER_BUDGET is wrong: {text!r} is not like 5/month, 0.5/day or 20/total.")
    return msgspec.convert({"micros": int(Decimal(found[1]) * 1_000_000), "period": found[2]}, Budget)


def _check_web_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_fit = is_fit and not (parts.query or parts.fragment or parts.username or parts.password)
    except ValueError:
        is_fit = False
    if not is_fit:
        raise SettingError(f"{name} is wrong: expected a URL like https://host.example.com, without a password in it.")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SettingError(f"LETTA_BASE_URL is wrong: {error}.") from None
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname or parts.query or parts.fragment:
        raise SettingError("LETTA_BASE_URL is wrong: expected a URL like http://127.0.0.1:8283 or ws://127.0.0.1:4500.")
    if parts.username or parts.password:
        raise SettingError("LETTA_BASE_URL is wrong: put the password into LETTA_API_KEY, not into the URL.")


OWNER_DIGITS: Final = 12


def key_owner(key: str) -> str:
    """Name the holder of an API key without naming the key: in logs, in the ledger, on the operator's page."""
    return "key_" + hashlib.sha256(key.encode()).hexdigest()[:OWNER_DIGITS]


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
