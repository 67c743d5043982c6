"""What an operator does with the database by hand; each says in a line what it found or did."""

from pathlib import Path

from gateway.storage import stamp
from gateway.storage.address import address_of
from gateway.storage.engine import Database, revision


async def upgraded(url: str, home: Path) -> str:
    """Bring the schema up to date; raises ``StorageFailed``."""
    before = await _revision(url, home)
    database = await Database.open(address_of(url, home))
    await database.close()
    newest = stamp.NEWEST
    return f"schema {newest}, as it was" if before == newest else f"schema {newest}, from {before or 'none'}"


async def described(url: str, home: Path) -> str:
    """Tell the database's schema and the newest one; raises ``StorageFailed``."""
    return f"schema {await _revision(url, home) or 'none'}, newest {stamp.NEWEST}"


async def _revision(url: str, home: Path) -> str | None:
    return await revision(address_of(url, home))
