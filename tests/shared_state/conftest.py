from collections.abc import AsyncIterator

import pytest

from gateway.shared_state.redis import RedisServer
from tests.shared_state.redis_process import RedisProcess


@pytest.fixture
async def server(redis: RedisProcess) -> AsyncIterator[RedisServer]:
    opened = RedisServer(redis.url)
    yield opened
    await opened.close()
