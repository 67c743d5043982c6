"""A way to a Redis on which every answer takes a while."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.shared_state.redis_process import RedisProcess


@contextlib.asynccontextmanager
async def slow_redis(redis: RedisProcess, seconds: float) -> AsyncIterator[str]:
    """Give the URL of a Redis whose answers come so much later."""
    loop, under_way = asyncio.get_running_loop(), set[asyncio.Task[None] | None]()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                loop.call_later(delay, writer.write, data)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        under_way.add(asyncio.current_task())
        answers, questions = await asyncio.open_connection("127.0.0.1", redis.port)
        answering = loop.create_task(relay(answers, writer, seconds))
        await relay(reader, questions, 0.0)
        answering.cancel()
        for end in (questions, writer):
            end.close()
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    await asyncio.gather(*(task for task in under_way if task is not None))
