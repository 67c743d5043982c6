import pytest
from sqlalchemy import Connection, insert, select, text

from gateway.storage.address import PostgresServer
from gateway.storage.failures import NoPrimary
from gateway.storage.postgres_driver import PostgresDriver
from gateway.storage.tables import instances
from tests.storage.databases import opened


@pytest.mark.live
async def test_url_as_libpq_reads_it(postgres_address: PostgresServer) -> None:
    address = PostgresServer(f"{postgres_address.url}&application_name=gateway_test")
    async with opened(address) as database, database.read() as connection:
        assert (await connection.execute(text("SHOW application_name"))).scalar_one() == "gateway_test"


@pytest.mark.live
async def test_server_of_another_kind_than_the_url_asks_for(postgres_address: PostgresServer) -> None:
    driver = PostgresDriver(f"{postgres_address.url}&target_session_attrs=read-only", connections=1, patience=3.0)
    try:
        with pytest.raises(NoPrimary):
            await driver.transaction(writes=False).execute(text("SELECT 1"), None)
    finally:
        await driver.close()


@pytest.mark.live
async def test_work_is_one_transaction(postgres_address: PostgresServer) -> None:
    def write(connection: Connection) -> list[str]:
        connection.execute(insert(instances), [{"id": "a", "seen_at": 1.0}])
        return list(connection.execute(select(instances.c.id)).scalars())

    def fail(connection: Connection) -> None:
        connection.execute(insert(instances), [{"id": "b", "seen_at": 1.0}])
        raise KeyError

    async with opened(postgres_address) as database:
        assert await database.write_at_once(write) == ["a"]
        with pytest.raises(KeyError):
            await database.write_at_once(fail)
        async with database.read() as connection:
            assert list((await connection.execute(select(instances.c.id))).scalars()) == ["a"]


@pytest.mark.live
async def test_transaction_in_which_nothing_is_done_takes_no_connection(postgres_address: PostgresServer) -> None:
    driver = PostgresDriver(postgres_address.url, 1, 1.0)
    for _ in range(3):
        transaction = driver.transaction(writes=True)
        await transaction.commit()
        assert not transaction.is_open
        await transaction.end(is_spent=False)
    await driver.close()
