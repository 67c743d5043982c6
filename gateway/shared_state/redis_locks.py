"""``ThreadLocks`` of replicas: within this gateway by memory, between gateways by leases in Redis.

A lease is renewed while its turn goes on, and ends by itself when its gateway is gone. It has a number that grows from
one lease of a thread to the next: what is written down in the end carries it, so that a gateway which was held up and
lost its lease cannot write over what came after.

A thread is free when its holder gave it back, or did not renew its lease in time though it could have: a lease that
ended while Redis stood still, and one that Redis forgot, may be told again by its holder before anybody else gets the
thread (``redis_memory`` says for how long). No Redis, no new lease: two turns of one conversation at once are worse
than a 503. Turns that have a lease go on without it while nobody else can get one either. Where Redis answers others,
and not this gateway, its turns end before their leases do.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog
from redis.asyncio import Redis

from gateway.errors import ConversationBusy, GatewayError, HeldElsewhere, SharedStateUnavailable, ThreadLost
from gateway.shared_state.locks import Lease
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import is_past
from gateway.shared_state.redis import RedisServer, key_of
from gateway.shared_state.redis_memory import LOOKING, MEMORY
from gateway.shared_state.redis_places import place_key
from gateway.tasks import TaskSet

LEASE: Final = 10.0
"""Seconds after which the threads of a gateway that is gone are free."""
RENEWED: Final = 0.3
"""After which part of its time a lease is renewed."""
TRIED_AGAIN: Final = 0.1
"""After which part of its time that is tried again where Redis did not answer: soon after it is back."""
DOUBTED: Final = 0.4
"""After which part of its time a lease that was not renewed is in doubt: two answers of others are waited for then."""
AT_ONCE: Final = 500
"""Leases that are renewed with one question."""
FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.25
REMEMBER: Final = 3_600
"""Seconds for which it is known who had a thread last."""

# KEYS: thread, place, memory. ARGV: token, milliseconds, here, seconds to remember, mark.
_ACQUIRE: Final = (
    LOOKING
    + """
local place = redis.call('GET', KEYS[2])
if place and place ~= ARGV[3] then return {'place', place} end
local memory = look(KEYS[3], ARGV[5])
if memory.forgot then return {'busy'} end
local held = redis.call('HMGET', KEYS[1], 'holder', 'until', 'fence', 'place')
if held[1] then
  local left = tonumber(held[2]) - memory.now
  if left > 0 and left <= tonumber(ARGV[2]) or memory.stood_still then return {'busy'} end
end
local time = redis.call('TIME')
local fence = time[1] * 1000000 + time[2]
if held[3] and tonumber(held[3]) >= fence then fence = tonumber(held[3]) + 1 end
fence = string.format('%.0f', fence)
local ends = string.format('%.0f', memory.now + ARGV[2])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', ends, 'fence', fence, 'place', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'mine', fence, held[4] or ''}
"""
)
# KEYS: thread. ARGV: token, milliseconds, here, seconds to remember, fence. What Redis forgot is told it again.
_RENEW: Final = """
local held = redis.call('HMGET', KEYS[1], 'holder', 'fence')
local fence, mine = tonumber(held[2] or '0'), tonumber(ARGV[5])
if fence > mine or (fence == mine and held[1] ~= ARGV[1]) then return 0 end
local time = redis.call('TIME')
local ends = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', ends, 'fence', ARGV[5], 'place', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""
# KEYS: thread. ARGV: token.
_RELEASE: Final = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('HDEL', KEYS[1], 'holder', 'until') end
return 0
"""
# KEYS: thread.
_IS_TAKEN: Final = """
local held = redis.call('HMGET', KEYS[1], 'holder', 'until')
local time = redis.call('TIME')
return held[1] and tonumber(held[2]) > time[1] * 1000 + math.floor(time[2] / 1000) and 1 or 0
"""


class _Held(msgspec.Struct):
    """A lease that is this gateway's: by which token, and when Redis was last asked for it with success."""

    token: str
    renewed_at: float


_log: Final = structlog.get_logger("gateway.shared_state")


class RedisLocks:
    """The locks of one gateway among several; ``here`` is its place, ``wait`` and ``lease`` are in seconds.

    ``is_cut_off`` is asked where Redis does not answer: whether others can reach it.
    """

    def __init__(
        self,
        server: RedisServer,
        local: MemoryLocks,
        tasks: TaskSet,
        *,
        here: str,
        wait: float,
        is_cut_off: Callable[[], Awaitable[bool]],
        lease: float = LEASE,
    ) -> None:
        self._server = server
        self._local = local
        self._tasks = tasks
        self._here = here
        self._wait = wait
        self._is_cut_off = is_cut_off
        self._lease_time = lease
        self._acquire = server.script(_ACQUIRE)
        self._renew = server.script(_RENEW)
        self._release = server.script(_RELEASE)
        self._is_taken = server.script(_IS_TAKEN)
        self._held: dict[Lease, _Held] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._refused: GatewayError | None = None

    async def acquire(self, thread: str) -> Lease:
        """Wait for a thread, here and then among the replicas."""
        give_up_at = time.monotonic() + self._wait
        local = await self._local.acquire(thread)
        try:
            return await self._lease(thread, give_up_at)
        except BaseException:
            self._local.release(local)
            raise

    async def check(self, lease: Lease) -> None:
        """See that a thread is still the lease's: Redis is asked where it was not for some time.

        Raises ``ThreadLost``, and ``SharedStateUnavailable``: this gateway, or Redis, may have stood still meanwhile.
        """
        held = self._held[lease]
        if not lease.is_lost and self._is_old(held):
            await self._renew_some([(lease, held)])
        if lease.is_lost:
            raise ThreadLost(should_retry=True)  # nothing was said yet

    def release(self, lease: Lease) -> None:
        """Give a thread to whoever waits first."""
        held = self._held.pop(lease)
        self._tasks.spawn(self._give_back(lease, held.token), "release thread")

    async def is_taken(self, thread: str) -> bool:
        """Tell whether a turn of any replica has a thread."""
        if await self._local.is_taken(thread):
            return True
        return bool(await self._server.run(lambda _: self._is_taken(keys=[_key(thread)])))

    def stop(self) -> None:
        """Renew leases no more: no turn is held any longer."""
        if self._renewing is not None:
            self._renewing.cancel()

    def refuse_waiting(self, error: GatewayError) -> None:
        """End every wait with this error."""
        self._refused = error
        self._local.refuse_waiting(error)

    async def _lease(self, thread: str, give_up_at: float) -> Lease:
        token, pause = uuid.uuid4().hex, FIRST_PAUSE
        while True:
            lease = await self._try(thread, token)
            if lease is not None:
                return lease
            if self._refused is not None:
                raise self._refused
            if time.monotonic() + pause > give_up_at:
                raise ConversationBusy
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that replicas do not ask as one
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _try(self, thread: str, token: str) -> Lease | None:
        names = [_key(thread), place_key(thread), MEMORY]
        args: list[str | int] = [token, int(self._lease_time * 1000), self._here, REMEMBER, self._server.mark]
        asked_at = time.monotonic()
        try:
            said, *more = await self._server.run(lambda _: self._acquire(keys=names, args=args))
        except BaseException:
            # It may have been given to us all the same; an answer that is late must not cost the thread.
            self._tasks.spawn(self._free(thread, token), "release thread")
            raise
        match said:
            case b"mine":
                fence, last = int(more[0]), more[1].decode()
                lease = Lease(thread, fence, is_news=last != self._here)
                self._keep(lease, _Held(token, asked_at))
                return lease
            case b"place":
                await self._look_at_place(thread, more[0].decode())
        return None

    async def _look_at_place(self, thread: str, place: str) -> None:
        """Raise ``HeldElsewhere``, unless whoever had it is no more: then it is forgotten."""
        if not is_past(place, self._here):
            raise HeldElsewhere(thread, place)
        await self._server.run(lambda client: client.delete(place_key(thread)))

    # What is held ----------------------------------------------------------------------------------------------------

    def _keep(self, lease: Lease, held: _Held) -> None:
        self._held[lease] = held
        if self._renewing is None or self._renewing.done():
            self._renewing = self._tasks.spawn(self._renew_all(), "renew threads")

    async def _renew_all(self) -> None:
        is_away = is_doubtful = False
        while self._held:
            await asyncio.sleep((TRIED_AGAIN if is_away else RENEWED) * self._lease_time)
            is_away = not await self._are_renewed()
            was_doubtful, is_doubtful = is_doubtful, is_away and await self._may_others_get_them()
            # Redis may just be coming back: others are asked twice, and it is asked once more.
            if is_doubtful and was_doubtful and not await self._are_renewed():
                self._lose_old_ones()

    async def _are_renewed(self) -> bool:
        try:
            await self.renew()
        except SharedStateUnavailable:
            return False
        return True

    async def renew(self) -> None:
        """Renew every lease now; raises ``SharedStateUnavailable``."""
        held = list(self._held.items())
        for start in range(0, len(held), AT_ONCE):
            await self._renew_some(held[start : start + AT_ONCE])

    async def _renew_some(self, some: list[tuple[Lease, _Held]]) -> None:
        asked_at = time.monotonic()
        answers = await self._server.run(lambda client: self._ask_to_renew(client, some))
        for (lease, held), is_mine in zip(some, answers, strict=True):
            if is_mine:
                held.renewed_at = asked_at
            elif lease in self._held and not lease.is_lost:
                _log.warning("thread lost to another gateway")
                lease.lose()

    async def _ask_to_renew(self, client: Redis, some: list[tuple[Lease, _Held]]) -> list[int]:
        async with client.pipeline(transaction=False) as pipeline:
            for lease, held in some:
                milliseconds, fence = int(self._lease_time * 1000), str(lease.fence)
                args: list[str | int] = [held.token, milliseconds, self._here, REMEMBER, fence]
                await self._renew(keys=[_key(lease.thread)], args=args, client=pipeline)
            answers: list[int] = await pipeline.execute()
        return answers

    async def _may_others_get_them(self) -> bool:
        return any(map(self._is_old, self._held.values())) and await self._is_cut_off()

    def _lose_old_ones(self) -> None:
        """End turns before their leases do."""
        for lease, held in list(self._held.items()):
            if self._is_old(held) and not lease.is_lost:
                _log.warning("thread given up: redis answers other gateways, and not this one")
                lease.lose()

    def _is_old(self, held: _Held) -> bool:
        return time.monotonic() - held.renewed_at > DOUBTED * self._lease_time

    async def _give_back(self, lease: Lease, token: str) -> None:
        try:
            await self._free(lease.thread, token)
        finally:
            self._local.release(lease)

    async def _free(self, thread: str, token: str) -> None:
        try:
            await self._server.run(lambda _: self._release(keys=[_key(thread)], args=[token]))
        except SharedStateUnavailable:
            return  # it ends by itself


def _key(thread: str) -> str:
    """Return under which key is written down who has a thread, and who had it last."""
    return key_of("thread", thread)
