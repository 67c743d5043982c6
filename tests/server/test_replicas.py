"""What several gateways share, put together; ``tests/handlers/test_forwarding.py`` asks it."""

import msgspec
import pytest

from gateway.metrics import Metrics
from gateway.server.replicas import replicated
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.replicas import Replicas
from gateway.tasks import TaskSet
from tests.server.running import JSON, settings
from tests.server.two_gateways import two_gateways
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"advertise": "http://10.0.0.7:8080/"}, "http://10.0.0.7:8080 me"),
        ({"host": "10.0.0.8", "port": 8081}, "http://10.0.0.8:8081 me"),
        ({"host": "::1", "port": 8081}, "http://[::1]:8081 me"),
    ],
)
async def test_gateway_tells_where_it_is_until_it_goes(
    redis: RedisProcess, changes: dict[str, object], place: str
) -> None:
    metrics, tasks = Metrics(), TaskSet()
    local = MemoryLocks(depth=lambda: 8, wait=30.0, metrics=metrics)
    chosen = settings(redis_url=redis.url, **changes)
    shared = replicated(chosen, metrics, tasks, local, instance="me", forwarding_key=b"k" * 32)
    assert shared.company is not None
    assert (await shared.probes(tasks)["redis"].health()).failure is None
    telling = tasks.spawn(shared.company.run(), "tell replicas")
    server = RedisServer(redis.url)
    others = Replicas(server, "http://10.0.0.9:8080 other")
    while not await others.is_there(place):
        pass
    telling.cancel()
    shared.company.stop()
    await shared.company.close()
    assert not await others.is_there(place)
    await server.close()


async def test_failed_logins_are_counted_for_all_together(redis: RedisProcess) -> None:
    body = msgspec.json.encode({"email": "ann@example.com", "password": "a guess of somebody"})
    async with two_gateways(redis) as (one, other):
        answers = [
            await gateway.ask("POST", "/api/v1/auth/login", JSON, body)
            for gateway in (one, other, one, other, one, other)
        ]
    assert [answer.status for answer in answers] == [401] * 5 + [429]
    assert answers[-1].code == "too_many_attempts"
