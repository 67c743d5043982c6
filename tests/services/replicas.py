"""Three real gateways of one PostgreSQL, one Redis and one Letta, each of which may be killed, drained and started."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from tests.live.app_server import AppServer
from tests.live.postgres import Postgres
from tests.live.processes import free_port
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.shared_state.redis_process import RedisProcess
from tests.storage.databases import new_database

API_KEY: Final = "sk-behind-nginx"
HOW_MANY: Final = 3
DRAIN: Final = 60.0
"""Seconds within which a gateway that is asked to go is gone."""


class Replica:
    """One of the gateways, at a port that it keeps over restarts."""

    def __init__(self, letta: str, environment: dict[str, str]) -> None:
        self.port = free_port()
        self._letta = letta
        self._environment = {**environment, "LETTA_GATEWAY_PORT": str(self.port)}
        self._stack = contextlib.AsyncExitStack()
        self._gateway: GatewayProcess | None = None
        self._before = ""

    @property
    def log(self) -> str:
        """Return what it wrote to standard error, before it was started again too."""
        return self._before + (self._gateway.errors if self._gateway is not None else "")

    @property
    def gateway(self) -> GatewayProcess:
        """Return the process, which is there."""
        assert self._gateway is not None
        return self._gateway

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        self._gateway = await self._stack.enter_async_context(gateway_process(self._letta, env=self._environment))

    async def kill(self) -> None:
        """Kill it as ``kill -9`` does."""
        self.gateway.signal(signal.SIGKILL)
        await self.end()

    async def drain(self) -> int:
        """Ask it to go, wait until it has gone, and return its exit status."""
        process = self.gateway.process
        self.gateway.signal(signal.SIGTERM)
        async with asyncio.timeout(DRAIN):
            status = await process.wait()
        await self.end()
        return status

    async def end(self) -> None:
        """End it, if it is there."""
        await self._stack.aclose()
        self._before, self._gateway = self.log, None


class Company(msgspec.Struct, frozen=True):
    """The replicas, and what is behind them."""

    replicas: list[Replica]
    letta: AppServer
    postgres: Postgres
    database: str

    @property
    def ports(self) -> list[int]:
        """Return where the replicas listen."""
        return [replica.port for replica in self.replicas]

    async def read(self, sql: str) -> list[list[str]]:
        """Return the rows of a query to the gateways' database."""
        said = await asyncio.to_thread(self.postgres.run, sql, self.database)
        return [line.split("|") for line in said.splitlines()]


@contextlib.asynccontextmanager
async def company(
    letta: AppServer, postgres: Postgres, redis: RedisProcess, **environment: str
) -> AsyncIterator[Company]:
    """Start the replicas, the first on an empty database, and end them with the context."""
    address = new_database(postgres)
    shared = {
        "LETTA_GATEWAY_DATABASE_URL": address.url,
        "LETTA_GATEWAY_REDIS_URL": redis.url,
        "SECRET_KEY": "a secret that the replicas share, long enough",
        "LETTA_GATEWAY_API_KEYS": API_KEY,
        "LETTA_GATEWAY_RATE_LIMIT": "100000/minute",
        **environment,
    }
    replicas = [Replica(letta.base_url, shared) for _ in range(HOW_MANY)]
    try:
        for replica in replicas:
            await replica.start()
        yield Company(replicas, letta, postgres, address.url.rpartition("/")[2].partition("?")[0])
    finally:
        for replica in replicas:
            await replica.end()
