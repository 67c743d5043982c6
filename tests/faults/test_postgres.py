"""A gateway whose PostgreSQL is killed, stopped, paused, locked or full: what is answered, and what the ledger says."""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
from sqlalchemy.pool import AsyncAdaptedQueuePool

from gateway import keys
from gateway.accounts.instances import SILENT
from gateway.accounts.ledger import STORED, WRITTEN
from gateway.accounts.passwords import Passwords
from gateway.accounts.profiles import Budget
from gateway.letta.scripted import Hold, Script, ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.storage.address import PostgresServer
from gateway.storage.engine import Database, StorageLimits
from gateway.storage.postgres_driver import PostgresDriver
from gateway.storage.tables import turns, usage_metrics
from gateway.translation.agent_events import Stop, TextDelta, Usage
from tests.accounts.identities import CHEAP
from tests.accounts.ledgers import House, assert_balanced, rows_of
from tests.faults.gateways import nothing_left, until
from tests.faults.killed_ledger import TURNS
from tests.faults.mortal_postgres import MortalPostgres, mortal_postgres
from tests.live import processes
from tests.server.people import API_KEY, OPERATOR_KEY, Town, bearer
from tests.server.recorded_logs import RecordedLogs, recorded_logs
from tests.server.running import FRIEND, chat_request, settings
from tests.server.subprocesses import gateway_process
from tests.server.upstream import Upstream
from tests.server.wire import Answer, ask
from tests.storage.databases import new_database, opened

pytestmark = [pytest.mark.live, pytest.mark.services]

ROOT: Final = Path(__file__).parents[2]
LIMITS: Final = StorageLimits(step=1.0, queue=1.0, lock=0.5, connections=3)
PATIENT: Final = StorageLimits(connections=3)
RECONNECTED: Final = 15.0
"""Seconds within which a gateway is to find a server that is back."""
STOOD_STILL: Final = 0.5
"""Seconds for which an event loop does not stand still on a busy machine."""


@pytest.fixture(scope="module")
def mortal() -> Iterator[MortalPostgres]:
    with mortal_postgres() as server:
        yield server


@pytest.fixture
def server(mortal: MortalPostgres) -> Iterator[MortalPostgres]:
    mortal.start()
    yield mortal
    mortal.start()


@pytest.fixture
def address(server: MortalPostgres) -> PostgresServer:
    return new_database(server.now)


class PostgresTown(Town):
    """A gateway that serves Ann, on a database that may go away."""

    database: Database

    async def say(self, credential: str, **more: Any) -> Answer:
        """Ask for one chat completion."""
        return await self.chat(headers=bearer(credential), **{"model": self.ann.agent_id, **more})

    async def is_ready(self) -> bool:
        """Ask whether it is ready."""
        return (await self.ask("GET", "/ready")).status == 200

    async def balanced(self) -> list[dict[str, Any]]:
        """Wait until every turn is settled, and return the ledger's rows, of which all sums are right."""
        found: list[dict[str, Any]] = []

        async def settled() -> bool:
            found[:] = await rows_of(self.database, turns)
            return all(row["status"] != "running" for row in found)

        await comes_true(settled)
        await assert_balanced(self.database)
        return sorted(found, key=lambda row: row["started_at"])


@contextlib.asynccontextmanager
async def town_on(
    address: PostgresServer, limits: StorageLimits = LIMITS, **chosen: Any
) -> AsyncIterator[PostgresTown]:
    """Serve for as long as the context; no task, no descriptor and no connection of the pool is left after it."""
    usual = {
        "api_keys": (API_KEY,),
        "operator_key": OPERATOR_KEY,
        "trusted_networks": (),
        "registration": "open",
        "rate_limit": "100000/minute",
        "database_url": address.url,  # what is held in memory alone would hide an outage
    }
    async with nothing_left(), opened(address, limits) as database:
        app = build_app(settings(**{**usual, **chosen}), database, backend=ScriptedBackend([FRIEND]))
        backend = app[keys.BACKEND]
        assert isinstance(backend, ScriptedBackend)
        listener = Listener(app, "127.0.0.1", 0)
        await listener.start()
        gateway = PostgresTown(app, backend, listener, "127.0.0.1")
        gateway.database = database
        gateway.identity._hashes = Passwords(CHEAP)
        try:
            gateway.ann = await gateway.settle_down("ann")
            yield gateway
            assert isinstance(database._driver, PostgresDriver)
            pool = database._driver.engine.pool
            assert isinstance(pool, AsyncAdaptedQueuePool)
            await until(lambda: pool.checkedout() == 0)
            assert database._free._value == limits.connections
        finally:
            await listener.stop()


async def comes_true(so: Callable[[], Awaitable[bool]], within: float = RECONNECTED) -> float:
    """Wait until something is so, and return how many seconds that took."""
    began = time.monotonic()
    while not await so():
        assert time.monotonic() - began < within, "it never came true"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def never_standing_still() -> AsyncIterator[None]:
    """See that the event loop serves others all the time."""
    lags: list[float] = []

    async def measure() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - began)

    task = asyncio.get_running_loop().create_task(measure())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert max(lags) < STOOD_STILL


class HeldStream:
    """A stream under way: its first word was heard, and the others come when they are let go."""

    def __init__(self, pieces: AsyncIterator[bytes], gate: asyncio.Event) -> None:
        self._pieces = pieces
        self.gate = gate

    async def end(self) -> str:
        """Let it go on, and return what comes."""
        self.gate.set()
        return b"".join([piece async for piece in self._pieces]).decode()


@contextlib.asynccontextmanager
async def held_stream(gateway: PostgresTown) -> AsyncIterator[HeldStream]:
    """Have one that takes 100 and 20 tokens."""
    gate = asyncio.Event()
    gateway.backend.play(
        Script(steps=([TextDelta("Hel")], Hold(gate), [TextDelta("lo")], [Stop("end_turn"), Usage(100, 20)]))
    )
    async with gateway.connect() as client:
        await client.send(chat_request(headers=bearer(gateway.ann.key), model=gateway.ann.agent_id, stream=True))
        assert (await client.head()).status == 200
        pieces = client.pieces()
        while b"Hel" not in await anext(pieces):
            pass
        yield HeldStream(pieces, gate)


def is_unavailable(answer: Answer) -> bool:
    """Tell whether an answer sends the client away for a moment, and no further."""
    return answer.status == 503 and answer.code == "storage_unavailable" and answer.header("retry-after") == "2"


def tokens(row: dict[str, Any]) -> tuple[str, int, int]:
    """Return what the ledger says of a turn."""
    return row["status"], row["prompt_tokens"], row["completion_tokens"]


# The server goes away ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["killed", "stopped", "paused"])
async def test_server_that_goes_away_under_a_stream(
    server: MortalPostgres, address: PostgresServer, outage: str
) -> None:
    away = {"killed": server.kill, "stopped": server.stop, "paused": server.pause}[outage]
    back = server.resume if outage == "paused" else server.start
    async with town_on(address) as gateway, held_stream(gateway) as stream, never_standing_still():
        ann = gateway.ann
        gone_key = await gateway.settle_down("ben")
        revoked = await gateway.send("DELETE", f"/api/v1/user/keys/{gone_key.key_id}", gone_key.token)
        assert revoked.status == 204
        sent = len(gateway.backend.turns)
        await asyncio.to_thread(away)
        try:
            await assert_503_and_never_401(gateway, gone_key.key)
            assert all(turn.opened == 0 for turn in gateway.backend.turns[sent:]), "nothing was sent to Letta"
            rest = await stream.end()
            assert "lo" in rest
            assert rest.endswith("data: [DONE]\n\n")
        finally:
            await asyncio.to_thread(back)
        took = await comes_true(lambda: answers(gateway, ann.key))
        await comes_true(gateway.is_ready)
        sys.stdout.write(f"\n{outage}: {took:.2f} s from the server's return to the first 200\n")
        held, later = await gateway.balanced()
        assert tokens(held) == tokens(later) == ("complete", 100, 20)
        assert held["owner"] == ann.id
        await assert_in_bounds(server, address, LIMITS)


async def assert_503_and_never_401(gateway: PostgresTown, unknown_key: str) -> None:
    """See what is answered to whom; nobody waits for longer than the deadlines say."""
    ann = gateway.ann
    began = time.monotonic()
    message = {"message": "Hi", "stream": False}
    answered = list(await asyncio.gather(gateway.say(ann.key), gateway.api("POST", "/chat/message", ann, message)))
    gateway.app[keys.CREDENTIALS].forget(ann.id)
    answered += await asyncio.gather(
        gateway.say(ann.key),
        gateway.say(unknown_key),
        gateway.say(API_KEY, model="friend"),
        gateway.api("POST", "/chat/message", ann, message),
        gateway.api("GET", "/user/profile", ann),
        gateway.send("POST", "/api/v1/auth/refresh", None, {"refresh_token": ann.refresh_token}),
    )
    assert [answer.status for answer in answered] == [503] * len(answered), answered
    assert all(map(is_unavailable, answered)), answered
    assert (await gateway.ask("GET", "/health")).status == 200
    ready = await gateway.ask("GET", "/ready", bearer(OPERATOR_KEY))
    assert ready.status == 503
    assert ready.json()["dependencies"]["database"]["code"] == "storage_unavailable"
    assert (await gateway.ask("GET", "/v1/models", bearer(API_KEY))).status == 200, "what needs no database goes on"
    assert time.monotonic() - began < 8 * (LIMITS.queue + LIMITS.step + 2.0)


async def answers(gateway: PostgresTown, credential: str) -> bool:
    return (await gateway.say(credential)).status == 200


async def assert_in_bounds(server: MortalPostgres, address: PostgresServer, limits: StorageLimits) -> None:
    """See that the gateway has no more connections than it may have, now that the server can count them."""
    name = address.url.rpartition("/")[2].partition("?")[0]
    count = f"select count(*) from pg_stat_activity where datname = '{name}'"  # noqa: S608

    async def in_bounds() -> bool:
        return int(await asyncio.to_thread(server.now.run, count)) <= limits.connections

    await comes_true(in_bounds)


async def test_usual_deadlines_with_a_server_that_is_paused(server: MortalPostgres, address: PostgresServer) -> None:
    """A request waits for its statement and a try to stop that; the end of an answer waits for less."""
    async with town_on(address, PATIENT) as gateway, held_stream(gateway) as stream, never_standing_still():
        await asyncio.to_thread(server.pause)
        try:
            began = time.monotonic()
            answered = asyncio.gather(*(gateway.say(gateway.ann.key) for _ in range(4)))
            assert (await stream.end()).endswith("data: [DONE]\n\n")
            done = time.monotonic() - began
            assert all(map(is_unavailable, await answered)), answered
            took = time.monotonic() - began
            assert done < WRITTEN + STOOD_STILL
            assert took < PATIENT.step + 2.0 + PATIENT.queue
        finally:
            server.resume()
        back = await comes_true(lambda: answers(gateway, gateway.ann.key))
        sys.stdout.write(f"\npaused, usual deadlines: [DONE] after {done:.2f} s, 503 after {took:.2f} s, ")
        sys.stdout.write(f"200 {back:.2f} s after its return\n")
        assert list(map(tokens, await gateway.balanced())) == [("complete", 100, 20)] * 2


async def test_server_replaced_between_two_requests_is_nobodys_error(
    server: MortalPostgres, address: PostgresServer
) -> None:
    async with town_on(address) as gateway:
        await asyncio.gather(*(gateway.say(gateway.ann.key) for _ in range(6)))
        for away in (server.stop, server.kill):
            await asyncio.to_thread(away)
            await asyncio.to_thread(server.start)
            answered = await asyncio.gather(*(gateway.say(gateway.ann.key) for _ in range(6)))
            assert [answer.status for answer in answered] == [200] * 6, answered
        assert len(await gateway.balanced()) == 18


async def test_standby_that_takes_over(server: MortalPostgres, address: PostgresServer) -> None:
    """Both are named in the URL, and the one that may be written is taken."""
    with server.standby() as standby:
        port, other = server.now.port, standby.now.port
        url = address.url.replace(f":{port}/", f":{port},127.0.0.1:{other}/") + "&target_session_attrs=read-write"
        async with town_on(PostgresServer(url)) as gateway, held_stream(gateway) as stream, never_standing_still():
            await comes_true(lambda: has_followed(server))
            await asyncio.to_thread(server.kill)
            assert is_unavailable(await gateway.say(gateway.ann.key)), "the standby may not be written yet"
            assert (await stream.end()).endswith("data: [DONE]\n\n")
            await asyncio.to_thread(standby.now.run, "select pg_promote()")
            took = await comes_true(lambda: answers(gateway, gateway.ann.key))
            sys.stdout.write(f"\nfailover: {took:.2f} s from the standby's promotion to the first 200\n")
            assert list(map(tokens, await gateway.balanced())) == [("complete", 100, 20)] * 2


async def has_followed(server: MortalPostgres) -> bool:
    behind = "select count(*) from pg_stat_replication where replay_lsn = pg_current_wal_lsn()"
    return await asyncio.to_thread(server.now.run, behind) == "1\n"


async def test_primary_that_becomes_a_standby_keeps_no_connection(
    server: MortalPostgres, address: PostgresServer
) -> None:
    """Its connections stay open, and may write no more: each is refused once, and the next goes to who is primary."""
    with server.standby() as standby:
        port, other = server.now.port, standby.now.port
        url = address.url.replace(f":{port}/", f":{port},127.0.0.1:{other}/") + "&target_session_attrs=read-write"
        async with town_on(PostgresServer(url)) as gateway:
            await asyncio.gather(*(gateway.say(gateway.ann.key) for _ in range(6)))
            try:
                await asyncio.to_thread(server.now.run, "alter system set default_transaction_read_only = on")
                await comes_true(lambda: has_followed(server))
                await asyncio.to_thread(server.now.run, "select pg_reload_conf()")
                await asyncio.to_thread(standby.now.run, "select pg_promote()")
                await comes_true(lambda: answers(gateway, gateway.ann.key))
                answered = [(await gateway.say(gateway.ann.key)).status for _ in range(9)]
                assert answered.count(503) <= LIMITS.connections
                assert answered[-3:] == [200] * 3
                await gateway.balanced()
            finally:
                await asyncio.to_thread(server.now.run, "alter system reset default_transaction_read_only")
                await asyncio.to_thread(server.now.run, "select pg_reload_conf()")


# The start -----------------------------------------------------------------------------------------------------------


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


SECRET: Final = {"SECRET_KEY": "a secret of the tests, 32 characters"}


@pytest.mark.parametrize(("outage", "why"), [("stopped", "cannot be reached"), ("paused", "did not answer in time")])
async def test_start_without_a_server_waits_for_it(
    server: MortalPostgres, address: PostgresServer, outage: str, why: str
) -> None:
    env = {"LETTA_GATEWAY_DATABASE_URL": address.url, **SECRET, "LETTA_GATEWAY_PORT": str(processes.free_port())}
    port = int(env["LETTA_GATEWAY_PORT"])

    async def status(path: str) -> int:
        with contextlib.suppress(OSError):
            return (await ask(port, "GET", path)).status
        return 0

    async with Upstream() as letta:
        await asyncio.to_thread(server.stop if outage == "stopped" else server.pause)
        try:
            async with gateway_process(letta.url, serves=False, env=env) as gateway:
                await until(lambda: "waiting for the database" in gateway.errors, 45)
                assert why in gateway.errors
                await until(lambda: listens(port), 45)
                assert [await status(path) for path in ("/health", "/ready", "/v1/models")] == [200, 503, 503]
                await asyncio.to_thread(server.start if outage == "stopped" else server.resume)
                began = time.monotonic()
                heard = set()
                while await status("/ready") != 200:
                    heard.add(await status("/health"))
                    assert time.monotonic() - began < RECONNECTED, gateway.errors
                    await asyncio.sleep(0.05)
                assert heard <= {200}, "nobody is turned away while it begins to serve"
                assert await status("/v1/models") == 200
                sys.stdout.write(f"\n{outage} at the start: ready {time.monotonic() - began:.2f} s after its return\n")
                gateway.signal(signal.SIGTERM)
                assert await gateway.ended() == 0, gateway.errors
        finally:
            await asyncio.to_thread(server.start if outage == "stopped" else server.resume)


async def test_start_at_a_standby_waits_until_it_is_promoted(server: MortalPostgres, address: PostgresServer) -> None:
    with server.standby() as standby:
        await comes_true(lambda: has_followed(server))
        url = address.url.replace(f":{server.now.port}/", f":{standby.now.port}/")
        env = {"LETTA_GATEWAY_DATABASE_URL": f"{url}&target_session_attrs=read-write", **SECRET}
        async with gateway_process("http://127.0.0.1:9", serves=False, env=env) as gateway:
            await until(lambda: "waiting for the database" in gateway.errors, 45)
            assert "is read-only: name the primary" in gateway.errors
            await asyncio.to_thread(standby.now.run, "select pg_promote()")
            await gateway.serves()


@pytest.mark.parametrize("what", ["user", "database", "schema"])
async def test_start_does_not_wait_for_what_does_not_pass(
    server: MortalPostgres, address: PostgresServer, what: str
) -> None:
    """The process ends, with one line that says what is to be done."""
    url = address.url
    if what == "schema":
        await (await Database.open(address)).close()
        name = url.rpartition("/")[2].partition("?")[0]
        await asyncio.to_thread(server.now.run, "update alembic_version set version_num = '9999'", name)
    url = url.replace("postgres@", "nobody:wrong@") if what == "user" else url
    url = url.replace("/gateway_", "/none_") if what == "database" else url
    env = {"LETTA_GATEWAY_DATABASE_URL": url, **SECRET}
    async with gateway_process("http://127.0.0.1:9", serves=False, env=env) as gateway:
        assert await gateway.ended() == 2
    (line,) = gateway.errors.splitlines()
    told = {"user": "refused the login", "database": "has no such database", "schema": "by a newer gateway"}
    assert line.startswith("letta-gateway: the database")
    assert told[what] in line


# What others do to the same rows -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def rival_on(address: PostgresServer) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Have a connection of somebody else's, within a transaction, which waits for longer than the gateway's."""
    rival = await asyncpg.connect(address.url)
    try:
        await rival.execute("SET deadlock_timeout = '30s'")
        await rival.execute("BEGIN")
        yield rival
    finally:
        await rival.close()


async def waits_for_a_lock(rival: "asyncpg.Connection[Any]") -> None:
    """Wait until somebody waits."""

    async def somebody() -> bool:
        return bool(await rival.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    await comes_true(somebody)


def conflicts(logs: RecordedLogs) -> int:
    """Count the outages that were conflicts."""
    return sum(line.get("reason") == "in conflict" for line in logs.lines)


async def test_deadlock_at_the_end_of_a_turn_is_written_all_the_same(address: PostgresServer) -> None:
    """The gateway is the victim: its rivals wait for longer before they look whether they are."""
    with recorded_logs() as logs:
        async with town_on(address, PATIENT, user_budget="100/month") as gateway, rival_on(address) as rival:
            async with held_stream(gateway) as stream:
                await rival.execute("SELECT 1 FROM spending FOR UPDATE")
                stream.gate.set()
                await waits_for_a_lock(rival)
                await rival.execute("SELECT 1 FROM turns FOR UPDATE")
                await rival.execute("COMMIT")
                assert (await stream.end()).endswith("data: [DONE]\n\n")
            (row,) = await gateway.balanced()
            assert tokens(row) == ("complete", 100, 20)
        assert conflicts(logs) == 1
        assert "ledger behind" not in logs.text, "it was tried again at once"


async def test_deadlock_before_a_turn_is_sent(address: PostgresServer) -> None:
    """Two users' turns go into one transaction, which takes their rows in one order, and the rival in the other."""
    with recorded_logs() as logs:
        async with opened(address, PATIENT) as database, rival_on(address) as rival:
            house = House(database, now=time.time())
            for name in ("anna", "ben"):
                await house.user(name, Budget(10**12, "month"))
                await house.take(name)
            await rival.execute("SELECT 1 FROM spending WHERE owner = 'ben' FOR UPDATE")
            opening = [asyncio.get_running_loop().create_task(house.open(name)) for name in ("anna", "ben")]
            await waits_for_a_lock(rival)
            await rival.execute("SELECT 1 FROM spending WHERE owner = 'anna' FOR UPDATE")
            await rival.execute("COMMIT")
            for turn_id in await asyncio.gather(*opening):
                await house.ledger.close(turn_id, Usage(100, 20), "complete")
            await house.idle()
            assert len(await house.rows(turns)) == 4
            await assert_balanced(database)
        assert conflicts(logs) == 1


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_stricter_isolation_of_the_operators_choice(
    server: MortalPostgres, address: PostgresServer, isolation: str
) -> None:
    """Gateways of one database then run into 40001: what is not opened is told, and what is opened is exact."""
    name = address.url.rpartition("/")[2].partition("?")[0]
    await asyncio.to_thread(server.now.run, f"alter database {name} set default_transaction_isolation = '{isolation}'")
    with recorded_logs() as logs:
        async with opened(address, PATIENT) as one, opened(address, PATIENT) as other:
            houses = [House(one, now=time.time()), House(other, name="two", now=time.time())]
            await houses[0].user("anna", Budget(10**12, "month"))

            async def take(house: House) -> bool:
                taken = await asyncio.gather(house.take(), return_exceptions=True)
                return isinstance(taken[0], str)

            done = [await asyncio.gather(*(take(house) for house in houses)) for _ in range(25)]
            for house in houses:
                await house.idle()
            rows = await houses[0].rows(turns)
            assert [tokens(row) for row in rows] == [("complete", 100, 20)] * sum(map(sum, done))
            assert sum(map(sum, done)) >= 45
            await assert_balanced(one)
        assert conflicts(logs) >= 1


# No connection is free -----------------------------------------------------------------------------------------------


async def test_pool_that_is_exhausted(address: PostgresServer) -> None:
    limits = StorageLimits(step=1.5, queue=0.4, lock=0.5, connections=2)
    with recorded_logs() as logs:
        async with town_on(address, limits) as gateway, rival_on(address) as rival, never_standing_still():
            await rival.execute("LOCK TABLE turns")
            opening = asyncio.get_running_loop().create_task(gateway.say(gateway.ann.key))
            await rival.execute("LOCK TABLE user_profiles")
            gateway.app[keys.CREDENTIALS].forget(gateway.ann.id)
            began = time.monotonic()
            answered = await asyncio.gather(*(gateway.say(gateway.ann.key) for _ in range(8)), opening)
            assert all(map(is_unavailable, answered)), answered
            assert time.monotonic() - began < limits.queue + limits.step + 2.0
            assert (await gateway.ask("GET", "/health")).status == 200
            await rival.execute("COMMIT")
            assert await comes_true(lambda: answers(gateway, gateway.ann.key)) < limits.step + 2.0
            await gateway.balanced()
    assert "busy" in {line.get("reason") for line in logs.lines}


async def test_server_that_takes_no_more_connections(server: MortalPostgres, address: PostgresServer) -> None:
    async with town_on(address) as gateway:
        crowd: list[asyncpg.Connection[Any]] = []
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                crowd.append(await asyncpg.connect(address.url))
        assert is_unavailable(await gateway.say(gateway.ann.key))
        for connection in crowd:
            await connection.close()
        await comes_true(lambda: answers(gateway, gateway.ann.key), within=3.0)
        assert len(await gateway.balanced()) == 1


# The gateway is killed meanwhile -------------------------------------------------------------------------------------


async def test_killed_while_turns_wait_for_the_database(server: MortalPostgres, address: PostgresServer) -> None:
    """What waits is in memory alone, and nothing of it is lost: its row was written before the turn was sent.

    The next gateway asks Letta what these turns took, and settles each once. A file beside the database, from which
    they would be replayed, could say no more than that, and would be one more thing that can be lost.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.killed_ledger",
        address.url,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        opened_turns = (await child.stdout.readline()).decode().split()
        assert len(opened_turns) == TURNS
        await asyncio.to_thread(server.kill)
        child.stdin.write(b"\n")
        assert int(await child.stdout.readline()) == TURNS, "all of them wait"
    finally:
        child.kill()
        await child.communicate()
    await asyncio.to_thread(server.start)
    async with opened(address, LIMITS) as database:
        house = House(database, name="next", now=time.time())
        house.letta.counts = {turn_id: Usage(number, 1) for number, turn_id in enumerate(opened_turns, 1)}
        await house.ledger.reconcile()
        assert set((await house.statuses()).values()) == {"running"}, "the other may live"
        house.clock.at += STORED
        house.ticks.at += SILENT
        for _ in range(2):
            await house.ledger.reconcile()
            await house.idle()
            rows = {row["id"]: row for row in await house.rows(turns)}
            assert {turn_id: tokens(row) for turn_id, row in rows.items()} == {
                turn_id: ("interrupted", number, 1) for number, turn_id in enumerate(opened_turns, 1)
            }
            assert sum(row["prompt_tokens"] for row in await house.rows(usage_metrics)) == TURNS * (TURNS + 1) // 2
            await assert_balanced(database)
