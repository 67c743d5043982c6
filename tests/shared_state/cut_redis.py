"""A way to a Redis that can be cut, for one gateway alone; and what a gateway hears that asks others for theirs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.shared_state.redis_process import RedisProcess


class Cable:
    """A way to a Redis, at ``url``, until it is ``cut``."""

    def __init__(self, redis: RedisProcess) -> None:
        self._redis = redis
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self.url = ""

    def cut(self) -> None:
        """End what goes over it, and take no more."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        if self._is_cut:
            writer.transport.abort()
            return
        answers, questions = await asyncio.open_connection("127.0.0.1", self._redis.port)
        self._writers |= {writer, questions}
        await asyncio.gather(_carry(reader, questions), _carry(answers, writer))
        self._writers -= {writer, questions}


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def cable_to(redis: RedisProcess) -> AsyncIterator[Cable]:
    """Lay one."""
    cable = Cable(redis)
    server = await asyncio.start_server(cable.connected, "127.0.0.1", 0)
    async with server:
        cable.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        yield cable
        cable.cut()


async def nobody_else_either() -> bool:
    """Hear that Redis answers no other gateway."""
    return False


async def all_others() -> bool:
    """Hear that Redis answers the others."""
    return True
