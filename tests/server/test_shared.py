from gateway.live_settings.current import LiveSettings
from gateway.metrics import Metrics
from gateway.server.shared import shared_state
from gateway.shared_state.limits import MemoryLimits
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import Alone
from gateway.tasks import TaskSet
from tests.server.running import settings


async def test_gateway_that_is_alone_shares_nothing() -> None:
    metrics, tasks = Metrics(), TaskSet()
    shared = shared_state(
        LiveSettings(settings(queue_depth=2)), metrics, tasks, instance="me", forwarding_key=b"k" * 32
    )
    assert (type(shared.locks), type(shared.limits), type(shared.places)) == (MemoryLocks, MemoryLimits, Alone)
    assert (shared.company, shared.forwarder, shared.probes(tasks)) == (None, None, {})
