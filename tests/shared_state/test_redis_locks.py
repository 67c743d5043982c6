"""One turn per thread among gateways: each ``RedisLocks`` here is one of them."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from gateway.errors import ConversationBusy, HeldElsewhere, SharedStateUnavailable, ShuttingDown, ThreadLost
from gateway.metrics import Metrics
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer, key_of
from gateway.shared_state.redis_locks import RedisLocks
from gateway.shared_state.redis_places import RedisPlaces
from gateway.tasks import TaskSet
from tests.shared_state.cut_redis import all_others, cable_to, nobody_else_either
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

LEASE = 1.0
Gateways = Callable[..., RedisLocks]


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    tasks = TaskSet()
    yield tasks
    await tasks.close(0)


@pytest.fixture
def gateways(server: RedisServer, tasks: TaskSet) -> Gateways:
    def gateway(
        name: str,
        *,
        wait: float = 20.0,
        depth: int = 8,
        is_cut_off: Callable[[], Awaitable[bool]] = nobody_else_either,
        server: RedisServer = server,
    ) -> RedisLocks:
        local = MemoryLocks(depth=lambda: depth, wait=wait, metrics=Metrics())
        here = place_of(f"http://{name}", name)
        return RedisLocks(server, local, tasks, here=here, wait=wait, is_cut_off=is_cut_off, lease=LEASE)

    return gateway


async def settled(tasks: TaskSet) -> None:
    """See what was given back arrive."""
    for task in list(tasks._tasks):
        if task.get_name() == "release thread":
            await task


# Whose turn it is ----------------------------------------------------------------------------------------------------


async def test_one_turn_at_a_time_among_all(gateways: Gateways, tasks: TaskSet) -> None:
    under_way, done, fences = 0, 0, list[int]()

    async def turns(locks: RedisLocks) -> None:
        nonlocal under_way, done
        for _ in range(10):
            lease = await locks.acquire("t")
            under_way += 1
            assert under_way == 1
            assert lease.fence is not None
            fences.append(lease.fence)
            await asyncio.sleep(0.002)
            under_way -= 1
            done += 1
            locks.release(lease)

    locks = [gateways(name) for name in "abc"]
    await asyncio.gather(*(turns(one) for one in (*locks, *locks)))
    assert done == 60
    assert fences == sorted(set(fences)), "each lease has a higher number than all before"
    await settled(tasks)
    assert not await locks[0].is_taken("t")


async def test_other_threads_do_not_wait(gateways: Gateways) -> None:
    one = gateways("a")
    await asyncio.gather(*(one.acquire(f"t{number}") for number in range(50)))


async def test_taken_is_seen_by_all(gateways: Gateways, tasks: TaskSet) -> None:
    one, other = gateways("a"), gateways("b")
    lease = await one.acquire("t")
    assert await one.is_taken("t")
    assert await other.is_taken("t")
    one.release(lease)
    await settled(tasks)
    assert not await other.is_taken("t")


async def test_whether_another_had_it_since(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b")
    news = []
    for locks in (one, one, other, one, one):
        lease = await locks.acquire("t")
        news.append(lease.is_news)
        locks.release(lease)
    assert news == [True, False, True, True, False]


async def test_wait_that_is_too_long(gateways: Gateways) -> None:
    lease = await gateways("a").acquire("t")
    other = gateways("b", wait=0.3)
    with pytest.raises(ConversationBusy):
        await other.acquire("t")
    assert not await other._local.is_taken("t")
    assert lease.fence


async def test_too_many_wait_here(gateways: Gateways) -> None:
    await gateways("a").acquire("t")
    other = gateways("b", depth=0)
    waiting = asyncio.get_running_loop().create_task(other.acquire("t"))
    await asyncio.sleep(0.1)
    with pytest.raises(ConversationBusy):
        await other.acquire("t")
    waiting.cancel()


async def test_whoever_gives_up_leaves_nothing_behind(gateways: Gateways, tasks: TaskSet) -> None:
    one, other = gateways("a"), gateways("b")
    lease = await one.acquire("t")
    waiting = asyncio.get_running_loop().create_task(other.acquire("t"))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    one.release(lease)
    await settled(tasks)
    one.release(await one.acquire("t"))


async def test_waits_are_refused_when_the_gateway_goes(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b")
    await one.acquire("t")
    first, second = (asyncio.get_running_loop().create_task(other.acquire("t")) for _ in range(2))
    await asyncio.sleep(0.1)
    other.refuse_waiting(ShuttingDown())
    for waiting in (first, second):
        with pytest.raises(ShuttingDown):
            await waiting


# Leases --------------------------------------------------------------------------------------------------------------


async def test_lease_is_renewed_as_long_as_its_turn_goes_on(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b", wait=3 * LEASE)
    lease = await one.acquire("t")
    lost: list[bool] = []
    lease.on_lost = lambda: lost.append(True)
    with pytest.raises(ConversationBusy):
        await other.acquire("t")
    assert not lost


async def test_thread_of_a_gateway_that_is_gone_is_free_after_a_while(
    gateways: Gateways, tasks: TaskSet, redis: RedisProcess
) -> None:
    one, other = gateways("a"), gateways("b", wait=20 * LEASE)
    before = await one.acquire("t")
    assert one._renewing is not None
    one._renewing.cancel()  # what is left of a gateway that was killed
    lease = await other.acquire("t")
    assert lease.is_news
    assert lease.fence is not None
    assert before.fence is not None
    assert lease.fence > before.fence


async def test_gateway_that_stood_still_is_told_that_it_lost_its_thread(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b", wait=20 * LEASE)
    before, told = await one.acquire("t"), asyncio.Event()
    before.on_lost = told.set
    assert one._renewing is not None
    one._renewing.cancel()
    lease = await other.acquire("t")
    await one.acquire("another")  # it goes on
    async with asyncio.timeout(5):
        await told.wait()
    one.release(before)
    assert await other.is_taken("t"), "what is another's is not given back"
    other.release(lease)


async def stood_still(one: RedisLocks) -> None:
    """Have a gateway renew nothing for longer than its leases are."""
    assert one._renewing is not None
    one._renewing.cancel()
    await asyncio.sleep(1.2 * LEASE)


async def test_thread_that_was_lost_is_seen_before_anything_is_said(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b")
    lease = await one.acquire("t")
    await one.check(lease)
    await stood_still(one)
    other.release(await other.acquire("t"))
    for _ in range(2):
        with pytest.raises(ThreadLost) as raised:
            await one.check(lease)
        assert raised.value.should_retry is True
    one.release(lease)


async def test_thread_that_nobody_took_is_held_again_before_anything_is_said(gateways: Gateways) -> None:
    one, other = gateways("a"), gateways("b", wait=0.2)
    lease = await one.acquire("t")
    await stood_still(one)
    await one.check(lease)
    with pytest.raises(ConversationBusy):
        await other.acquire("t")
    one.release(lease)


async def test_nothing_is_said_on_a_thread_that_may_be_lost_while_redis_is_away(
    gateways: Gateways, redis: RedisProcess
) -> None:
    one = gateways("a")
    lease = await one.acquire("t")
    with redis.paused():
        await one.check(lease)
        await stood_still(one)
        with pytest.raises(SharedStateUnavailable):
            await one.check(lease)
    one.release(lease)


async def test_what_redis_forgot_is_taken_again(gateways: Gateways, redis: RedisProcess) -> None:
    one, other = gateways("a"), gateways("b", wait=0.3)
    lease, lost = await one.acquire("t"), list[bool]()
    lease.on_lost = lambda: lost.append(True)
    with redis.client() as client:
        client.flushall()
    async with asyncio.timeout(5):
        while not await other.is_taken("t"):  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.02)
    with pytest.raises(ConversationBusy):
        await other.acquire("t")
    assert not lost


async def test_what_redis_forgot_and_another_has_is_lost(gateways: Gateways, redis: RedisProcess) -> None:
    one, other = gateways("a"), gateways("b")
    lease, told = await one.acquire("t"), asyncio.Event()
    lease.on_lost = told.set
    with redis.client() as client:
        client.flushall()
    after = await other.acquire("t")
    other.release(after)  # also where it is over by the time of the next renewal
    async with asyncio.timeout(5):
        await told.wait()
    assert lease.fence is not None
    assert after.fence is not None
    assert after.fence > lease.fence, "its clock goes on, whatever else it forgot"


# Redis is away -------------------------------------------------------------------------------------------------------


async def test_no_redis_no_new_turn_and_those_under_way_go_on(gateways: Gateways, redis: RedisProcess) -> None:
    one = gateways("a")
    lease, lost = await one.acquire("t"), list[bool]()
    lease.on_lost = lambda: lost.append(True)
    with redis.paused():
        with pytest.raises(SharedStateUnavailable):
            await one.acquire("another")
        assert not await one._local.is_taken("another")
        await asyncio.sleep(1.5 * LEASE)
    assert not lost
    one.release(lease)


async def test_gateway_that_alone_is_cut_off_ends_its_turn_before_another_one_begins(
    gateways: Gateways, redis: RedisProcess, tasks: TaskSet
) -> None:
    async with cable_to(redis) as cable:
        server = RedisServer(cable.url)
        one, other = gateways("a", server=server, is_cut_off=all_others), gateways("b", wait=20 * LEASE)
        lease, told = await one.acquire("t"), list[str]()
        lease.on_lost = lambda: told.append("lost")
        cable.cut()
        await other.acquire("t")
        assert told == ["lost"]
        assert lease.is_lost
        one.release(lease)
        await settled(tasks)
        await server.close()


async def test_redis_that_answers_another_gateway_a_moment_earlier_ends_no_turn(
    gateways: Gateways, redis: RedisProcess
) -> None:
    asked, said = 0, list[bool]()

    async def first_answer_alone() -> bool:
        nonlocal asked
        asked += 1
        return said.pop() if said else False

    one = gateways("a", is_cut_off=first_answer_alone, wait=20 * LEASE)
    lease = await one.acquire("t")
    for _ in range(2):
        said.append(True)
        before = asked
        with redis.paused():
            while asked < before + 2:  # noqa: ASYNC110 - it is seen from outside
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.5)
    assert not said
    assert not lease.is_lost
    one.release(lease)


async def test_turn_whose_lease_alone_cannot_be_renewed_ends_before_it(
    gateways: Gateways, redis: RedisProcess, server: RedisServer
) -> None:
    one, told = gateways("a", is_cut_off=all_others), asyncio.Event()
    lease = await one.acquire("t")
    lease.on_lost = told.set
    with redis.client() as client:
        client.set(key_of("thread", "t"), "of another kind")
    async with asyncio.timeout(LEASE):
        while not told.is_set():
            with contextlib.suppress(SharedStateUnavailable):
                await server.ping()
            await asyncio.sleep(0.05)
    one.release(lease)


async def test_turn_goes_on_while_redis_is_full_for_all(
    gateways: Gateways, redis: RedisProcess, server: RedisServer
) -> None:
    there = RedisServer(redis.url)

    async def takes_what_others_tell() -> bool:
        with contextlib.suppress(SharedStateUnavailable):
            await there.ping()
            return True
        return False

    one = gateways("a", is_cut_off=takes_what_others_tell)
    lease = await one.acquire("t")
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        try:
            await asyncio.sleep(2 * LEASE)
        finally:
            client.config_set("maxmemory", 0)
    assert not server.is_up
    assert not lease.is_lost
    await there.close()
    one.release(lease)


async def test_lease_that_cannot_be_renewed_leaves_no_pipeline_behind(gateways: Gateways, redis: RedisProcess) -> None:
    one, told = gateways("a"), list[str]()
    lease = await one.acquire("t")
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    with redis.paused():
        await asyncio.sleep(1.5 * LEASE)
    gc.collect()
    assert told == []
    one.release(lease)


async def test_given_back_while_redis_is_away(gateways: Gateways, redis: RedisProcess, tasks: TaskSet) -> None:
    one = gateways("a", wait=20 * LEASE)
    lease = await one.acquire("t")
    with redis.paused():
        one.release(lease)
        await settled(tasks)
        assert not await one._local.is_taken("t")
    await asyncio.sleep(1.1)
    one.release(await one.acquire("t"))


# Places --------------------------------------------------------------------------------------------------------------


async def test_turn_that_waits_in_another_gateway(gateways: Gateways, server: RedisServer, tasks: TaskSet) -> None:
    one, other = gateways("a"), gateways("b")
    place = place_of("http://a", "a")
    await RedisPlaces(server, place).take("t", 60)
    one.release(await one.acquire("t"))
    await settled(tasks)
    with pytest.raises(HeldElsewhere) as raised:
        await other.acquire("t")
    assert (raised.value.name, raised.value.place) == ("t", place)
    assert not await other.is_taken("t")


async def test_turn_that_waited_here_before_the_restart(gateways: Gateways, server: RedisServer) -> None:
    await RedisPlaces(server, place_of("http://a", "before")).take("t", 60)
    one = gateways("a")
    one.release(await one.acquire("t"))
