from gateway.storage import connections
from gateway.storage.address import PostgresServer, SqliteFile
from gateway.storage.postgres_driver import PostgresDriver
from gateway.storage.sqlite_driver import SqliteDriver
from tests.storage.databases import empty_file  # noqa: F401 - a fixture


async def test_each_kind_has_its_driver(empty_file: SqliteFile) -> None:  # noqa: F811
    for address, kind, name in (
        (empty_file, SqliteDriver, "sqlite"),
        (PostgresServer("postgresql://somebody@127.0.0.1:9/nothing"), PostgresDriver, "postgresql"),
    ):
        driver = connections.connect(address, connections=1, patience=1.0)
        assert isinstance(driver, kind)
        assert driver.dialect.name == name
        await driver.close()
    assert not empty_file.path.exists(), "nothing is connected to before it is used"
