import pytest
from sqlalchemy import select

from gateway.accounts.instances import SILENT, Instances
from gateway.storage.address import PostgresServer, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.tables import instances
from tests.accounts.ledgers import Clock
from tests.storage.databases import opened


class Gateway:
    """A gateway with clocks of its own: ``ticks`` only go on, ``clock`` may be set to anything."""

    def __init__(self, database: Database, name: str, at: float = 1_000.0) -> None:
        self.ticks = Clock(0.0)
        self.clock = Clock(at)
        self.instances = Instances(database, name, clock=self.ticks, now=self.clock)

    async def wait(self, seconds: float) -> None:
        self.ticks.at += seconds
        self.clock.at += seconds


async def names(database: Database) -> set[str]:
    async with database.read() as connection:
        return set((await connection.execute(select(instances.c.id))).scalars())


async def test_sign_of_life(database: Database) -> None:
    one = Gateway(database, "one")
    await one.instances.beat()
    await one.instances.beat()
    assert await names(database) == {"one"}
    assert await one.instances.gone(["one"]) == set()
    await one.instances.leave()
    await one.instances.leave()
    assert await names(database) == set()
    assert await one.instances.gone(["one"]) == set(), "it asks, so it lives"


async def test_where_the_database_is_one_gateways_alone_all_others_are_gone(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        for name in ("one", "two"):
            await Gateway(database, name).instances.beat()
        three = Gateway(database, "three")
        await three.instances.beat()
        assert await three.instances.gone(["one", "two", "three", "four"]) == {"one", "two", "four"}
        await three.instances.bury()
        assert await names(database) == {"three"}


@pytest.mark.live
async def test_gateways_that_share_a_database(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        one, two = Gateway(database, "one"), Gateway(database, "two", at=-5_000.0)
        for gateway in (one, two):
            await gateway.instances.beat()
        asked = ["one", "two", "three"]
        assert await one.instances.gone(asked) == {"three"}, "who never was, or left"
        await one.wait(SILENT - 1)
        assert await one.instances.gone(asked) == {"three"}
        await one.wait(1)
        assert await one.instances.gone(asked) == {"two", "three"}
        await two.wait(1)
        await two.instances.beat()
        assert await one.instances.gone(asked) == {"three"}, "it lives again"
        await two.instances.leave()
        assert await one.instances.gone(asked) == {"two", "three"}


@pytest.mark.live
async def test_clocks_that_jump_bury_nobody(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        one, two = Gateway(database, "one"), Gateway(database, "two")
        await two.instances.beat()
        assert await one.instances.gone(["two"]) == set()
        one.clock.at += 1e6
        assert await one.instances.gone(["two"]) == set()
        await one.wait(SILENT)
        two.clock.at -= 1e6
        await two.instances.beat()
        assert await one.instances.gone(["two"]) == set()
        await one.instances.bury()
        assert await names(database) == {"two"}


@pytest.mark.live
async def test_gateway_that_is_silent_is_buried_and_may_come_back(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        one, two = Gateway(database, "one"), Gateway(database, "two")
        for gateway in (one, two):
            await gateway.instances.beat()
        await one.instances.bury()
        await one.wait(SILENT)
        await one.instances.bury()
        assert await names(database) == {"one"}
        assert await one.instances.gone(["two"]) == {"two"}
        await two.wait(SILENT)
        await two.instances.beat()
        assert await one.instances.gone(["two"]) == set()
