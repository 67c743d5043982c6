"""Two gateways of one database and one Redis inside the test's own event loop, each with a scripted Letta of its own.

Which Letta is asked tells which gateway answered.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from gateway.letta.backend import Capabilities
from gateway.letta.scripted import ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.storage.engine import Database
from tests.live.processes import free_port
from tests.server.running import FRIEND, Running, settings
from tests.shared_state.cut_redis import Cable
from tests.shared_state.redis_process import RedisProcess
from tests.storage.late import late_database


@contextlib.asynccontextmanager
async def one_of_several(
    database: Database, redis: RedisProcess | Cable, *, port: int | None = None, **changes: Any
) -> AsyncIterator[Running]:
    """Serve as one of the gateways that share a database and a Redis."""
    port = port or free_port()
    backend = ScriptedBackend([FRIEND])
    backend.capabilities = Capabilities(providers=False, parks=True)
    chosen = settings(redis_url=redis.url, advertise=f"http://127.0.0.1:{port}", **changes)
    app = build_app(chosen, database, backend=backend)
    listener = Listener(app, "127.0.0.1", port)
    await listener.start()
    try:
        yield Running(app, backend, listener, "127.0.0.1")
    finally:
        await listener.stop()


@contextlib.asynccontextmanager
async def two_gateways(redis: RedisProcess, **changes: Any) -> AsyncIterator[tuple[Running, Running]]:
    """Serve twice."""
    async with (
        late_database() as database,
        one_of_several(database, redis, **changes) as one,
        one_of_several(database, redis, **changes) as other,
    ):
        yield one, other
