"""Where log lines go and what they look like: readable in development, one JSON object each in production.

Lines of the standard library's loggers take the same way, so that there is one format; aiohttp's server logger is
silenced, as it prints what a malformed request contained.
"""

import logging
import sys
from typing import Any, Final, Literal

import msgspec
import structlog

from gateway import audit_log

MAX_VALUE: Final = 2_000
"""Characters of one value in a log line."""

_encode: Final = msgspec.json.Encoder(enc_hook=repr).encode


def configure(environment: Literal["development", "production"], level: str) -> None:
    """Set logging up for the process; all lines go to standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        clip,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(environment)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger(audit_log.NAME).setLevel(audit_log.LEVEL)
    logging.getLogger("aiohttp.server").disabled = True
    for noisy in ("httpx", "httpcore", "letta_client", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Write from now on what is as severe as this."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    logging.getLogger().setLevel(level)


def clip(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Cut values that a peer could make endless."""
    for name, value in event.items():
        if not isinstance(value, str) or name == "exception":
            continue
        short = value if len(value) <= MAX_VALUE else value[:MAX_VALUE] + "..."
        event[name] = short if short.isascii() else short.encode("utf-8", "backslashreplace").decode()
    return event


def escape(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Write control characters as escapes, as a terminal obeys them; JSON needs no such help."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name != "exception":
            event[name] = value.encode("unicode_escape").decode()
    return event


def _renderers(environment: Literal["development", "production"]) -> list[structlog.typing.Processor]:
    if environment == "production":
        return [structlog.processors.JSONRenderer(serializer=lambda event, **_: _encode(event).decode())]
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return [escape, console]
