import pytest
import structlog.testing
from sqlalchemy import select

from gateway.accounts.instances import SILENT, Instances
from gateway.errors import StorageUnavailable
from gateway.storage.address import PostgresServer, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.tables import instances
from tests.accounts.ledgers import Clock
from tests.storage.databases import opened


class Gateway:
    """A gateway with clocks of its own: ``ticks`` only go on, ``clock`` may be set to anything."""

    def __init__(self, database: Database, name: str, at: float = 1_000.0, **options: bool) -> None:
        self.ticks = Clock(0.0)
        self.clock = Clock(at)
        self.instances = Instances(database, name, clock=self.ticks, now=self.clock, **options)

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


@pytest.mark.live
@pytest.mark.parametrize("what", ["its sign of life", "its look at others"])
async def test_silence_while_the_database_is_away_is_no_death(postgres_address: PostgresServer, what: str) -> None:
    async with opened(postgres_address) as database, opened(postgres_address) as away:
        await away.close()
        one, two = Gateway(database, "one"), Gateway(database, "two")
        await two.instances.beat()
        assert await one.instances.gone(["two"]) == set()
        one.instances._database = away
        with pytest.raises(StorageUnavailable):
            await (one.instances.beat() if what == "its sign of life" else one.instances.bury())
        one.instances._database = database
        await one.wait(SILENT)
        assert await one.instances.gone(["two"]) == set(), "it had no time yet to give a sign"
        await one.wait(SILENT)
        assert await one.instances.gone(["two"]) == {"two"}


async def beats(*gateways: Gateway, times: int = 3) -> list[str]:
    """Have all give signs of life in turn; return of whom errors told."""
    with structlog.testing.capture_logs() as lines:
        for _ in range(times):
            for gateway in gateways:
                await gateway.wait(10)
                await gateway.instances.beat()
    assert all(line["log_level"] == "error" and "LETTA_GATEWAY_REDIS_URL" in line["event"] for line in lines)
    return [line["other"] for line in lines]


@pytest.mark.live
async def test_gateway_that_should_be_alone_and_is_not(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        one, two = (Gateway(database, name, should_be_alone=True) for name in ("one", "two"))
        assert sorted(await beats(one, two)) == ["one", "two"], "each tells of the other, once"
        assert sorted(await beats(one, two, Gateway(database, "three"))) == ["three", "three"]


@pytest.mark.live
async def test_gateway_that_was_killed_before_is_nobody(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        await Gateway(database, "killed").instances.beat()
        assert await beats(Gateway(database, "one", should_be_alone=True)) == []


@pytest.mark.live
async def test_gateways_that_share_a_redis_too_are_no_news(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database:
        assert await beats(Gateway(database, "one"), Gateway(database, "two")) == []


async def test_gateway_with_a_file_of_its_own_is_alone(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        assert await beats(*(Gateway(database, name, should_be_alone=True) for name in ("one", "two"))) == []
