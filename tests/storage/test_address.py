from pathlib import Path

import pytest

from gateway.storage.address import PostgresServer, SqliteFile, address_of
from gateway.storage.failures import StorageFailed

HOME = Path("/home/somebody/.letta-gateway")


def test_nothing_said_is_a_file_at_home() -> None:
    assert address_of("", HOME) == SqliteFile(HOME / "gateway.db")


def test_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert address_of("", Path("~/.letta-gateway")) == SqliteFile(tmp_path / ".letta-gateway/gateway.db")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_postgresql_as_it_is_written_elsewhere(scheme: str) -> None:
    url = "://me:pass%40word@db.example.com:5433/gateway?sslmode=require&application_name=gateway"
    assert address_of(scheme + url, HOME) == PostgresServer("postgresql" + url)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:////srv/gateway.db", "/srv/gateway.db"),
        ("sqlite+aiosqlite:////srv/a b/gateway.db", "/srv/a b/gateway.db"),
    ],
)
def test_file_elsewhere(url: str, path: str) -> None:
    assert address_of(url, HOME) == SqliteFile(Path(path))


def test_file_in_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert address_of("sqlite:///mine.db", HOME) == SqliteFile(tmp_path / "mine.db")


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:secret@db/gateway",
        "gateway.db",
        "postgresql",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite://secret@host/x.db",
        "sqlite://host:port/x.db",
    ],
)
def test_what_is_no_database_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(StorageFailed, match=r"^LETTA_GATEWAY_DATABASE_URL is wrong: expected") as failed:
        address_of(url, HOME)
    assert "secret" not in str(failed.value)


def test_password_does_not_show() -> None:
    assert "secret" not in repr(address_of("postgresql://me:secret@db/gateway", HOME))
