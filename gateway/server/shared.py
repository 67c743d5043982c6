"""Settings -> what a gateway shares with its replicas, or keeps for itself where it is alone."""

from typing import Protocol

import msgspec

from gateway.handlers.forwarding import Forwarder
from gateway.letta.probe import Probe
from gateway.live_settings.current import LiveSettings
from gateway.metrics import Metrics
from gateway.shared_state.limits import MemoryLimits, RequestLimits
from gateway.shared_state.locks import ThreadLocks
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import Alone, Places
from gateway.shared_state.tally import Tally
from gateway.tasks import TaskSet


class Company(Protocol):
    """The other gateways, and what is shared with them."""

    async def ping(self) -> None:
        """Raise ``SharedStateUnavailable`` unless it can be asked."""
        ...

    async def run(self) -> None:
        """Say now and then that this gateway is there, until cancelled."""
        ...

    def stop(self) -> None:
        """End what goes on in the background: no turn is held any longer."""
        ...

    async def close(self) -> None:
        """Say that it is no more, and close the connections."""
        ...


class SharedState(msgspec.Struct, frozen=True):
    """The parts; a gateway that is alone has neither company nor anybody to forward to."""

    locks: ThreadLocks
    limits: RequestLimits
    places: Places
    tally: Tally | None = None
    """Where failed logins are counted; None: each part counts for itself, in memory."""
    company: Company | None = None
    forwarder: Forwarder | None = None

    def probes(self, tasks: TaskSet) -> dict[str, Probe]:
        """Return what readiness depends on."""
        return {} if self.company is None else {"redis": Probe(self.company.ping, tasks)}


def shared_state(
    live: LiveSettings, metrics: Metrics, tasks: TaskSet, *, instance: str, forwarding_key: bytes
) -> SharedState:
    """Return what the settings ask for; ``instance`` is this process's name."""
    settings = live.configured
    local = MemoryLocks(depth=lambda: live.current.queue_depth, wait=settings.queue_wait, metrics=metrics)
    if not settings.redis_url:
        return SharedState(local, MemoryLimits(), Alone())
    from gateway.server.replicas import replicated  # noqa: PLC0415 - a gateway that is alone does without the library

    return replicated(settings, metrics, tasks, local, instance=instance, forwarding_key=forwarding_key)
