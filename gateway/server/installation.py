"""Which gateway's data a command works on: whoever types it in a shell may have other settings than the service has."""

import os
from pathlib import Path

from gateway.settings import Settings
from gateway.storage.address import SqliteFile, address_of
from gateway.storage.failures import StorageFailed


def described(settings: Settings) -> str:
    """Say which database and which Letta the settings lead to; raises ``StorageFailed`` where they name no database."""
    address = address_of(settings.database_url, Path(settings.home))
    return f"database {address.shown}; Letta {settings.letta_base_url or 'of its own'}"


def check_there(settings: Settings) -> None:
    """Raise ``StorageFailed`` where the database is a file that no gateway has made."""
    address = address_of(settings.database_url, Path(settings.home))
    if isinstance(address, SqliteFile) and not os.path.lexists(address.path):
        raise StorageFailed(
            f"there is no database {address.path}: give the command the settings of the gateway that you mean "
            "(LETTA_GATEWAY_HOME, LETTA_GATEWAY_DATABASE_URL). Under systemd letta-gateway-run does."
        )
