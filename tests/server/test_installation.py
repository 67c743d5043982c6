from pathlib import Path

import pytest

from gateway.server.installation import check_there, described
from gateway.storage.failures import StorageFailed
from tests.server.running import settings


def test_file_and_a_letta_elsewhere(tmp_path: Path) -> None:
    chosen = settings(home=str(tmp_path), letta_base_url="http://letta:8283")
    assert described(chosen) == f"database {tmp_path}/gateway.db; Letta http://letta:8283"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://gateway:canary@db.example.com/one", "one of PostgreSQL at db.example.com"),
        ("postgresql://gateway:canary@db:5433/one?sslmode=require", "one of PostgreSQL at db"),
        ("postgresql:///one?host=/run/postgresql&password=canary", "one of PostgreSQL at /run/postgresql"),
        ("postgresql:///one", "one of PostgreSQL at its socket"),
    ],
)
def test_server_is_told_without_its_password(url: str, place: str) -> None:
    assert described(settings(database_url=url, letta_base_url="")) == f"database {place}; Letta of its own"


def test_file_that_is_not_there(tmp_path: Path) -> None:
    chosen = settings(home=str(tmp_path))
    with pytest.raises(StorageFailed, match=f"there is no database {tmp_path}/gateway.db: "):
        check_there(chosen)
    (tmp_path / "gateway.db").touch()
    check_there(chosen)
    check_there(settings(home=str(tmp_path / "none"), database_url="postgresql://db/one"))
