"""What HTTP does not show of it: who listens, who is waited for, what is kept. The rest: handlers/test_answering.py."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from gateway.conversations import attempts as module
from gateway.conversations.attempts import Attempt, Attempts, Identity
from gateway.conversations.outcomes import Outcome, Outcomes
from gateway.errors import (
    BudgetExceeded,
    ConversationBusy,
    GatewayError,
    IdempotencyConflict,
    ModelNotFound,
    OutcomeUnknown,
    SharedStateUnavailable,
    StorageUnavailable,
    TurnFailed,
    UpstreamUnavailable,
)
from gateway.shared_state.places import Alone
from gateway.tasks import TaskSet
from tests.storage.late import LateDatabase

EVENTS, JSON = "text/event-stream", "application/json"


def named(key: str = "k", digest: bytes = b"d", owner: str = "anna") -> Identity:
    return Identity(owner, key, digest, is_explicit=True)


def sdk(retries: int = 0) -> Identity:
    return Identity("anna", "sdk 1", b"d", is_explicit=False, retries=retries)


class Client:
    """A listener that may be slow, or gone."""

    def __init__(self, *, is_quick: bool = True) -> None:
        self.heard: list[bytes] = []
        self.is_quick = is_quick
        self.is_gone = False
        self.waits = 0

    def offer(self, data: bytes) -> bool:
        if self.is_gone:
            raise ConnectionResetError
        self.heard.append(data)
        return self.is_quick

    async def ready(self) -> None:
        self.waits += 1
        if self.is_gone:
            raise ConnectionResetError


class Producer:
    """Says what the test tells it to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.was_cancelled = False

    async def __call__(self, attempt: Attempt) -> None:
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        attempt.is_complete = True


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    made = TaskSet()
    yield made
    await made.close(1.0)
    assert len(made) == 0


@pytest.fixture
async def database() -> AsyncIterator[LateDatabase]:
    made = LateDatabase()
    yield made
    await made.close()


@pytest.fixture
def attempts(database: LateDatabase, tasks: TaskSet) -> Attempts:
    return restarted(database, tasks)


def restarted(database: LateDatabase, tasks: TaskSet) -> Attempts:
    """Return what a gateway that has just started knows."""
    return Attempts(Outcomes(database, tasks), tasks, Alone())


async def until(so: Callable[[], object]) -> None:
    async with asyncio.timeout(2):
        while not so():  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.005)


async def ended(attempts: Attempts, identity: Identity, finish: Callable[[Attempt], object]) -> Attempt:
    """Have an answer come to its end."""
    attempt = Attempt(JSON, identity)
    assert await attempts.begin(attempt) is None
    finish(attempt)
    attempt.is_complete = True
    attempt.over.set()
    await attempts.end(attempt)
    return attempt


@pytest.mark.parametrize(
    ("error", "is_begun", "may_be"),
    [
        (UpstreamUnavailable(should_retry=True), False, True),
        (UpstreamUnavailable(), False, True),
        (UpstreamUnavailable(should_retry=True), True, False),
        (TurnFailed(should_retry=False), False, False),
        (BudgetExceeded(), False, True),
        (BudgetExceeded(), True, False),
        (ModelNotFound("friend"), False, True),
    ],
)
def test_failure_after_which_the_same_request_is_a_new_one(
    error: GatewayError, *, is_begun: bool, may_be: bool
) -> None:
    attempt = Attempt(EVENTS, named())
    if is_begun:
        attempt.push(b"Hel")
    assert attempt.may_be_repeated(error) is may_be


async def test_answer_to_nobody_that_is_heard_out(tasks: TaskSet) -> None:
    attempt, client, producer = Attempt(EVENTS, is_heard_out=True), Client(), Producer()
    attempt.start(tasks, producer)
    attempt.join(client)
    await asyncio.sleep(0)
    attempt.leave(client)
    assert attempt.push(b"unheard"), "nobody is waited for"
    await asyncio.sleep(0.01)
    producer.go_on.set()
    await until(attempt.over.is_set)
    assert not producer.was_cancelled


# Listeners -----------------------------------------------------------------------------------------------------------


async def test_every_listener_is_told_everything() -> None:
    attempt, first, late = Attempt(EVENTS, named()), Client(), Client()
    assert attempt.join(first) == b""
    assert attempt.push(b"one ")
    assert attempt.join(late) == b"one "
    assert attempt.push(b"two")
    assert first.heard == [b"one ", b"two"]
    assert late.heard == [b"two"]


async def test_slow_listener_is_waited_for() -> None:
    attempt, quick, slow = Attempt(EVENTS, named()), Client(), Client(is_quick=False)
    attempt.join(quick)
    attempt.join(slow)
    assert not attempt.push(b"one")
    await attempt.ready()
    assert slow.waits == 1


async def test_listener_that_is_gone_is_told_no_more() -> None:
    attempt, gone, stays = Attempt(EVENTS, named()), Client(), Client()
    attempt.join(gone)
    attempt.join(stays)
    gone.is_gone = True
    assert attempt.push(b"one")
    assert attempt.listeners == [stays]
    stays.is_gone = True
    await attempt.ready()
    assert attempt.listeners == []
    assert attempt.push(b"two"), "the key's answer goes on without them"


async def test_answer_without_a_name_ends_with_its_only_listener(tasks: TaskSet) -> None:
    attempt, client, producer = Attempt(EVENTS), Client(), Producer()
    attempt.start(tasks, producer)
    await asyncio.sleep(0)
    attempt.join(client)
    attempt.push(b"one")
    client.is_gone = True
    with pytest.raises(ConnectionResetError):
        attempt.push(b"two")
    await until(lambda: producer.was_cancelled)


async def test_answer_that_is_given_up_before_its_first_step_is_over(tasks: TaskSet) -> None:
    attempt, client, producer = Attempt(EVENTS), Client(), Producer()
    attempt.start(tasks, producer)
    attempt.join(client)
    attempt.leave(client)
    await asyncio.wait_for(attempt.over.wait(), 1)
    assert attempt.is_abandoned


async def test_listener_that_leaves_after_the_end_ends_nothing(tasks: TaskSet) -> None:
    attempt, client, producer = Attempt(EVENTS), Client(), Producer()
    attempt.start(tasks, producer)
    attempt.join(client)
    producer.go_on.set()
    await attempt.over.wait()
    attempt.leave(client)
    attempt.leave(client)
    assert not producer.was_cancelled


async def test_answer_that_has_not_begun_waits_for_the_sdk(tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.1)
    attempt, client, producer = Attempt(EVENTS, sdk()), Client(), Producer()
    attempt.start(tasks, producer)
    attempt.join(client)
    attempt.leave(client)
    await asyncio.sleep(0.03)
    attempt.join(Client())
    await asyncio.sleep(0.15)
    assert not producer.was_cancelled, "it has come back"
    attempt.leave(attempt.listeners[0])
    await until(lambda: producer.was_cancelled)


async def test_each_further_try_of_the_sdk_is_waited_for_longer(
    attempts: Attempts, tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.04)
    monkeypatch.setattr(module, "SLACK", 2.0)
    attempt, producer = Attempt(EVENTS, sdk()), Producer()
    await attempts.begin(attempt)
    attempt.start(tasks, producer)
    for retries in range(4):
        assert retries == 0 or await attempts.find(sdk(retries)) is attempt
        client = Client()
        attempt.join(client)
        attempt.leave(client)
        await asyncio.sleep(0.04 * 2**retries)
        assert not producer.was_cancelled
    await until(lambda: producer.was_cancelled)


@pytest.mark.parametrize(("retries", "seconds"), [(0, 0.6), (1, 1.2), (2, 2.4), (3, 4.8), (4, 9.6), (9_999, 9.6)])
def test_how_long_the_sdk_is_waited_for(retries: int, seconds: float) -> None:
    assert module._until_next(retries) == pytest.approx(seconds)


# What is kept --------------------------------------------------------------------------------------------------------


async def test_beginning_of_a_stream_is_kept_for_the_sdk_and_no_more() -> None:
    attempt = Attempt(EVENTS, sdk())
    attempt.push(b"x" * module.MOST_BEGINNING)
    assert len(attempt.pieces) == 1
    attempt.push(b"x")
    assert (attempt.is_kept, attempt.pieces) == (False, [])


async def test_stream_that_nobody_repeats_is_not_kept() -> None:
    attempt = Attempt(EVENTS)
    attempt.push(b"x")
    assert attempt.pieces == []


async def test_failure_is_told_again_and_a_refusal_is_not(attempts: Attempts) -> None:
    def fail(attempt: Attempt) -> None:
        attempt.error = TurnFailed(should_retry=False)

    def refuse(attempt: Attempt) -> None:
        attempt.error = UpstreamUnavailable(should_retry=True)

    failed = await ended(attempts, named("failed"), fail)
    assert await attempts.find(named("failed")) is failed
    await ended(attempts, named("refused"), refuse)
    assert await attempts.find(named("refused")) is None
    attempts._known.clear()
    outcome = await attempts.find(named("failed"))
    assert isinstance(outcome, Outcome)
    assert (outcome.status, b"agent_run_failed" in outcome.body) == (502, True)
    assert await attempts.find(named("refused")) is None


async def test_answer_that_is_too_long_is_known_and_not_told(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BODY", 10)

    def say_much(attempt: Attempt) -> None:
        attempt.push(b"x" * 11)

    await ended(attempts, named(), say_much)
    attempts._known.clear()
    with pytest.raises(OutcomeUnknown):
        await attempts.find(named())


async def test_answer_that_was_cut_off_is_forgotten(attempts: Attempts) -> None:
    attempt = Attempt(EVENTS, named())
    await attempts.begin(attempt)
    attempt.over.set()
    await attempts.end(attempt)
    assert await attempts.find(named()) is None


async def test_owners_have_keys_of_their_own(attempts: Attempts) -> None:
    await ended(attempts, named(), lambda attempt: attempt.push(b"{}"))
    assert await attempts.find(named(owner="ben")) is None
    with pytest.raises(IdempotencyConflict):
        await attempts.find(named(digest=b"other"))


async def test_two_that_begin_at_once_share_the_first(attempts: Attempts) -> None:
    first, second = Attempt(JSON, named()), Attempt(JSON, named())
    assert await attempts.begin(first) is None
    assert await attempts.begin(second) is first


class Silent(Alone):
    """Places that cannot be asked, which takes a while to be known."""

    async def take(self, name: str, seconds: float) -> None:
        await asyncio.sleep(0.01)
        raise SharedStateUnavailable


async def test_who_has_joined_is_told_of_an_answer_that_cannot_begin(tasks: TaskSet) -> None:
    """Another request with the key came while it was asked whether the first one may be answered."""
    database = LateDatabase()
    attempts, first = Attempts(Outcomes(database, tasks), tasks, Silent()), Attempt(EVENTS, named())
    beginning = asyncio.get_running_loop().create_task(attempts.begin(first))
    await asyncio.sleep(0)
    assert await attempts.begin(Attempt(EVENTS, named())) is first
    with pytest.raises(SharedStateUnavailable):
        await beginning
    assert first.over.is_set()
    assert isinstance(first.error, SharedStateUnavailable)
    assert attempts._known == {}
    await database.close()


async def test_who_has_joined_is_told_of_a_client_that_left_before_its_answer_began(attempts: Attempts) -> None:
    first = Attempt(EVENTS, named())
    beginning = asyncio.get_running_loop().create_task(attempts.begin(first))
    await asyncio.sleep(0)
    assert await attempts.begin(Attempt(EVENTS, named())) is first
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    assert first.over.is_set()
    assert isinstance(first.error, ConversationBusy)


async def test_sdk_is_answered_again_for_a_while(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await ended(attempts, sdk(), lambda attempt: attempt.push(b"{}"))
    assert await attempts.find(sdk()) is None, "the first try of a request is a request of its own"
    assert await attempts.find(sdk(1)) is made
    monkeypatch.setattr(module, "REMEMBER", 0.0)
    assert await attempts.find(sdk(1)) is None


async def test_answer_that_took_long_is_told_again_from_its_end_on(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempt = Attempt(JSON, sdk())
    await attempts.begin(attempt)
    now += 10 * module.REMEMBER
    attempt.push(b"{}")
    attempt.is_complete = True
    attempt.over.set()
    await attempts.end(attempt)
    now += module.REMEMBER - 1
    assert await attempts.find(sdk(1)) is attempt
    now += 2
    assert await attempts.find(sdk(1)) is None


async def test_key_stands_for_a_day(attempts: Attempts) -> None:
    await ended(attempts, named(), lambda attempt: attempt.push(b"{}"))
    attempts._known.clear()
    outcome = await attempts.find(named())
    assert isinstance(outcome, Outcome)
    await attempts.purge(outcome.ended_at + module.KEEP - 1)
    assert await attempts.find(named()) is not None
    await attempts.purge(outcome.ended_at + module.KEEP + 1)
    assert await attempts.find(named()) is None


# The gateway is killed -----------------------------------------------------------------------------------------------


async def test_what_an_sdk_asked_of_a_gateway_that_was_killed_is_not_asked_again(
    attempts: Attempts, database: LateDatabase, tasks: TaskSet
) -> None:
    await attempts.begin(Attempt(EVENTS, sdk()))
    after = restarted(database, tasks)
    for retries in (1, 2):
        with pytest.raises(OutcomeUnknown):
            await after.find(sdk(retries))
    assert await after.find(sdk()) is None, "the first try of a request is a request of its own"
    again = Attempt(EVENTS, sdk())
    assert await after.begin(again) is None
    assert await after.find(sdk(1)) is again


async def test_answer_that_a_killed_gateway_gave_is_not_asked_for_again(
    attempts: Attempts, database: LateDatabase, tasks: TaskSet
) -> None:
    """Whether its client had all of it is not known."""
    await ended(attempts, sdk(), lambda attempt: attempt.push(b"{}"))
    with pytest.raises(OutcomeUnknown):
        await restarted(database, tasks).find(sdk(1))


async def test_what_an_sdk_asked_long_ago_is_not_what_it_asks_again(
    attempts: Attempts, database: LateDatabase, tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await attempts.begin(Attempt(EVENTS, sdk()))
    later = time.time() + module.LONGEST
    monkeypatch.setattr(time, "time", lambda: later)
    assert await restarted(database, tasks).find(sdk(1)) is None


async def test_refusal_before_a_gateway_was_killed_is_no_answer(
    attempts: Attempts, database: LateDatabase, tasks: TaskSet
) -> None:
    def refuse(attempt: Attempt) -> None:
        attempt.error = UpstreamUnavailable(should_retry=True)

    await ended(attempts, sdk(), refuse)
    assert await restarted(database, tasks).find(sdk(1)) is None


async def test_what_is_over_is_swept_out_of_the_database(
    attempts: Attempts, database: LateDatabase, tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ended(attempts, sdk(), lambda attempt: attempt.push(b"{}"))
    running = Attempt(EVENTS, msgspec.structs.replace(sdk(), key="sdk 2"))
    await attempts.begin(running)
    await attempts.sweep()
    with pytest.raises(OutcomeUnknown):
        await restarted(database, tasks).find(sdk(1))
    monkeypatch.setattr(module, "REMEMBER", 0.0)
    assert await attempts.find(sdk(1)) is None
    await attempts.sweep()
    after = restarted(database, tasks)
    assert await after.find(sdk(1)) is None
    with pytest.raises(OutcomeUnknown):
        await after.find(msgspec.structs.replace(sdk(1), key="sdk 2"))


async def test_words_that_are_said_anew_outlast_the_failure_of_the_first(attempts: Attempts) -> None:
    first, second = Attempt(JSON, sdk()), Attempt(JSON, sdk())
    for attempt in (first, second):
        assert await attempts.begin(attempt) is None
    first.over.set()
    await attempts.end(first)
    assert await attempts.find(sdk(1)) is second


async def test_mark_that_cannot_be_written_is_not_held_against_the_next_try(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Outcomes, outcome: Outcome) -> None:
        await mark(self, outcome)
        raise StorageUnavailable("late")

    mark = Outcomes.mark
    monkeypatch.setattr(Outcomes, "mark", fail)
    first = Attempt(JSON, sdk())
    with pytest.raises(StorageUnavailable):
        await attempts.begin(first)
    assert first.over.is_set()
    assert await attempts.find(sdk(1)) is None


# Names ---------------------------------------------------------------------------------------------------------------


async def test_answer_is_cancelled_by_its_name(attempts: Attempts, tasks: TaskSet) -> None:
    attempt, producer = Attempt(EVENTS), Producer()
    attempt.start(tasks, producer)
    await attempts.name("anna", "resp_1", attempt, lambda: b"{}")
    await asyncio.sleep(0)
    assert not await attempts.cancel("ben", "resp_1")
    assert (attempts.so_far("ben", "resp_1"), attempts.so_far("anna", "resp_1")) == (None, b"{}")
    assert await attempts.cancel("anna", "resp_1")
    assert producer.was_cancelled
    await until(lambda: not attempts._named)
    assert not await attempts.cancel("anna", "resp_1")
