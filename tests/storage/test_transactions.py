import pytest
from sqlalchemy import text

from gateway.storage import connections, database_file
from gateway.storage.address import Address, SqliteFile
from gateway.storage.transactions import Driver


@pytest.mark.parametrize("writes", [False, True])
async def test_any_driver_begins_with_the_first_statement_and_gives_the_connection_back(
    address: Address,
    writes: bool,  # noqa: FBT001
) -> None:
    if isinstance(address, SqliteFile):
        database_file.prepare(address.path)
    driver: Driver = connections.connect(address, connections=1, patience=1.0)
    for _ in range(2):
        transaction = driver.transaction(writes=writes)
        assert not transaction.is_open
        found = await transaction.execute(text("SELECT 1 AS one"), None)
        assert [row.one for row in found] == [1]
        await transaction.end(is_spent=False)
        assert not transaction.is_open
    await driver.close()
