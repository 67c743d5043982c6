"""The Redis that replicas share: asked with short deadlines, and left alone for a while when it does not answer."""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from gateway.errors import SharedStateUnavailable

PREFIX: Final = "letta-gateway"
ANSWER: Final = 0.25
"""Seconds for Redis to answer: it is asked before every turn, so that a slow one is worse than none."""
LATE: Final = 0.05
"""Seconds by which a deadline may fire late: later than that it is this process that was busy, not Redis."""
PATIENCE: Final = 4
"""How often a deadline is set at most."""
PAUSE: Final = 1.0
"""Seconds between two tries of one that does not answer."""
AT_ONCE: Final = 16
"""Questions under way: the others wait, and are spared one that does not answer."""

T = TypeVar("T")


def key_of(kind: str, name: str) -> str:
    """Return under which key something is written down: names hold owners and chats, which Redis need not know."""
    return f"{PREFIX}:{kind}:{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


_log: Final = structlog.get_logger("gateway.shared_state")


class _Connections(ConnectionPool):
    """The library's connections; ``made_at`` tells when one was made for a task, infinity while it is being made.

    That takes several answers of Redis, and says nothing of how long each takes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made_at: dict[asyncio.Task[Any] | None, float] = {}

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Make a connection, or see that it is still one."""
        if connection.is_connected:
            await super().ensure_connection(connection)
            return
        task = asyncio.current_task()
        self.made_at[task] = math.inf
        await super().ensure_connection(connection)
        self.made_at[task] = asyncio.get_running_loop().time()


class RedisServer:
    """One Redis: everything that is asked of it goes through ``run``."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = _Connections.from_url(
            url,
            max_connections=2 * AT_ONCE,  # one that was given up may take a moment to close
            socket_timeout=PATIENCE * ANSWER,
            socket_connect_timeout=PATIENCE * ANSWER,
            retry=Retry(NoBackoff(), 0),  # who waits for an answer is told that there is none
            client_name=PREFIX,
        )
        self._client: Redis = Redis(connection_pool=self.pool)
        self._clock = clock
        self._free = asyncio.Semaphore(AT_ONCE)
        self._given_up: set[asyncio.Task[Any]] = set()
        self._is_up = True
        self._try_again_at = 0.0
        self.mark = ""
        """By which this gateway knows that Redis has forgotten nothing: ``redis_memory``; none before it looked."""

    @property
    def is_up(self) -> bool:
        """Tell whether it answered when it was last asked."""
        return self._is_up

    def script(self, text: str) -> AsyncScript:
        """Return a script that Redis runs as one step."""
        script: AsyncScript = self._client.register_script(text)
        return script

    async def ping(self) -> None:
        """Raise ``SharedStateUnavailable`` unless it answers, and takes what it is told: not full, no mere copy."""
        await self.run(self._ping)

    async def run(self, ask: Callable[[Redis], Awaitable[T]]) -> T:
        """Ask something; raises ``SharedStateUnavailable`` at once while it is known not to answer."""
        async with self._free:
            self._check()
            try:
                answer = await self._in_time(ask)
            except (RedisError, OSError, TimeoutError) as error:
                self._failed(type(error).__name__)
                raise SharedStateUnavailable(type(error).__name__) from None
            self._answered()
            return answer

    async def close(self) -> None:
        """Close the connections."""
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=ANSWER)
        await self._client.aclose()
        await self.pool.disconnect()

    async def _in_time(self, ask: Callable[[Redis], Awaitable[T]]) -> T:
        """Return the answer; raises ``TimeoutError`` where Redis, not this process, lets it wait.

        What a connection takes to be made is not counted.
        """

        async def question() -> T:
            return await ask(self._client)

        asking, now = asyncio.get_running_loop().create_task(question()), asyncio.get_running_loop().time
        try:
            for _ in range(PATIENCE):
                begun = now()
                await asyncio.wait((asking,), timeout=ANSWER)
                if asking.done():
                    return asking.result()
                if now() < begun + ANSWER + LATE and self.pool.made_at.get(asking, 0.0) < begun:
                    break
            raise TimeoutError
        finally:
            self.pool.made_at.pop(asking, None)
            if not asking.done():
                self._give_up(asking)

    def _give_up(self, asking: asyncio.Task[Any]) -> None:
        """End a question whose answer nobody waits for; its connection is closed with it."""
        asking.cancel()
        self._given_up.add(asking)
        asking.add_done_callback(self._given_up.discard)

    async def _ping(self, client: Redis) -> Any:
        return await client.set(f"{PREFIX}:ping", "", ex=1)

    def _check(self) -> None:
        if self._is_up:
            return
        now = self._clock()
        if now < self._try_again_at:
            raise SharedStateUnavailable("down")
        self._try_again_at = now + PAUSE  # one asks, the others are refused meanwhile

    def _failed(self, reason: str) -> None:
        self._try_again_at = self._clock() + PAUSE
        if self._is_up:
            self._is_up = False
            _log.warning("redis unavailable", reason=reason)

    def _answered(self) -> None:
        if not self._is_up:
            self._is_up = True
            _log.info("redis available")
