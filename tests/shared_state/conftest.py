from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.shared_state.redis import RedisServer
from tests.shared_state.redis_process import RedisProcess


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisProcess]:
    with RedisProcess() as process:
        yield process


@pytest.fixture
def redis(redis_process: RedisProcess) -> RedisProcess:
    with redis_process.client() as client:
        client.flushall()
    return redis_process


@pytest.fixture
async def server(redis: RedisProcess) -> AsyncIterator[RedisServer]:
    opened = RedisServer(redis.url)
    yield opened
    await opened.close()
