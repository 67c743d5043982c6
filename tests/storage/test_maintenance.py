from pathlib import Path

import pytest

from gateway.storage import schema
from gateway.storage.address import PostgresServer
from gateway.storage.maintenance import described, upgraded


async def test_file_that_is_not_there_yet(tmp_path: Path) -> None:
    newest = schema.newest()
    assert await described("", tmp_path / "home") == f"schema none, newest {newest}"
    assert not (tmp_path / "home").exists(), "looking makes nothing"
    assert await upgraded("", tmp_path / "home") == f"schema {newest}, from none"
    assert await upgraded("", tmp_path / "home") == f"schema {newest}, as it was"
    assert await described("", tmp_path / "home") == f"schema {newest}, newest {newest}"


@pytest.mark.live
async def test_server(postgres_address: PostgresServer, tmp_path: Path) -> None:
    newest = schema.newest()
    assert await described(postgres_address.url, tmp_path) == f"schema none, newest {newest}"
    assert await upgraded(postgres_address.url, tmp_path) == f"schema {newest}, from none"
    assert await described(postgres_address.url, tmp_path) == f"schema {newest}, newest {newest}"
