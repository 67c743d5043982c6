"""Log lines that are written whatever ``LOG_LEVEL`` says: who came in as the operator, and what was changed."""

import logging
from typing import Final

import structlog

NAME: Final = "gateway.audit"
LEVEL: Final = logging.INFO


def audit_log() -> structlog.typing.FilteringBoundLogger:
    """Return the logger for these lines."""
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        logging.getLogger(NAME), wrapper_class=structlog.make_filtering_bound_logger(LEVEL)
    )
    return logger
