"""What replicas share, in Redis, put together."""

import contextlib
from typing import Final

from gateway.errors import SharedStateUnavailable
from gateway.handlers.forwarding import Forwarder
from gateway.metrics import Metrics
from gateway.server.shared import SharedState
from gateway.server.witnesses import Witnesses
from gateway.settings import Settings
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_limits import RedisLimits
from gateway.shared_state.redis_locks import RedisLocks
from gateway.shared_state.redis_places import RedisPlaces
from gateway.shared_state.redis_tally import RedisTally
from gateway.shared_state.replicas import Replicas
from gateway.tasks import TaskSet

MARGIN: Final = 60.0
"""Seconds for which a forwarded answer may be silent beyond a turn's time."""


class RedisCompany:
    """``Company`` by way of Redis."""

    def __init__(
        self, server: RedisServer, replicas: Replicas, locks: RedisLocks, places: RedisPlaces, forwarder: Forwarder
    ) -> None:
        self._server = server
        self._locks = locks
        self._places = places
        self._replicas = replicas
        self._forwarder = forwarder

    async def ping(self) -> None:
        """Raise ``SharedStateUnavailable`` unless Redis answers."""
        await self._server.ping()

    async def run(self) -> None:
        """Say now and then that this gateway is there, until cancelled."""
        await self._replicas.run(self._tell_again)

    async def _tell_again(self) -> None:
        await self._places.tell_again()
        await self._locks.renew()

    def stop(self) -> None:
        """End what goes on in the background: no turn is held any longer."""
        self._locks.stop()

    async def close(self) -> None:
        """Say that it is no more, and close the connections."""
        await self._forwarder.close()
        with contextlib.suppress(SharedStateUnavailable):  # then it is forgotten after a while
            await self._replicas.leave()
        await self._server.close()


def replicated(
    settings: Settings, metrics: Metrics, tasks: TaskSet, local: MemoryLocks, *, instance: str, forwarding_key: bytes
) -> SharedState:
    """Return what a gateway shares with others; ``instance`` is this process's name."""
    here = place_of(_address(settings), instance)
    server = RedisServer(settings.redis_url)
    replicas, places = Replicas(server, here), RedisPlaces(server, here)
    forwarder = Forwarder(here, forwarding_key, places, replicas, answer=settings.turn_timeout + MARGIN)
    witnesses = Witnesses(replicas.others, forwarder.redis_of)
    locks = RedisLocks(server, local, tasks, here=here, wait=settings.queue_wait, is_cut_off=witnesses.is_cut_off)
    return SharedState(
        locks=locks,
        limits=RedisLimits(server, metrics, replicas.count),
        places=places,
        tally=RedisTally(server, metrics),
        company=RedisCompany(server, replicas, locks, places, forwarder),
        forwarder=forwarder,
    )


def _address(settings: Settings) -> str:
    if settings.advertise:
        return settings.advertise.rstrip("/")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"
