"""Requests that a client may send again: one turn for all of them, its answer handed to whoever asks for it.

The OpenAI SDKs repeat a request two times by default where no answer comes, with nothing but a count in a header; other
clients send an ``Idempotency-Key``. The first request starts the turn; one that repeats it listens to the same answer,
or is told what it came to. Each is written down before it starts: a gateway that is killed in the middle leaves that it
was asked.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import msgspec
import structlog

from gateway.conversations.outcomes import MAX_BODY, UNKNOWN, Outcome, Outcomes
from gateway.errors import (
    ClientError,
    ConversationBusy,
    GatewayError,
    IdempotencyConflict,
    OutcomeUnknown,
    SharedStateUnavailable,
    StorageUnavailable,
    dealt_with,
)
from gateway.shared_state.places import Places
from gateway.tasks import TaskSet

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds that the SDKs wait at most before their first try again, which double with each, and before any
(openai-python 3.52, ``INITIAL_RETRY_DELAY`` and ``MAX_RETRY_DELAY``)."""
SLACK: Final = 1.2
"""Times that for which a turn waits for the next try, when its client left before an answer began: one that is gone
for good ends within a second."""
REMEMBER: Final = 60.0
"""Seconds from its end for which an SDK's request is answered again from memory."""
MOST_KEPT: Final = 16_777_216
"""Bytes of an answer that is kept to be told again."""
MOST_BEGINNING: Final = 32_768
"""Bytes of a stream that are kept for an SDK, which does not ask again once it has the beginning."""
MOST_REMEMBERED: Final = 67_108_864
"""Bytes of all answers in memory."""
LONGEST: Final = 3_600.0
"""Seconds for which the replicas know in which of them an answer is under way, and what an SDK asked of one that died
may be what it asks again."""
KEEP: Final = 86_400.0
"""Seconds for which an idempotency key stands."""

_log: Final = structlog.get_logger("gateway.attempts")


class Listener(Protocol):
    """Whoever is handed an answer as it comes."""

    def offer(self, data: bytes) -> bool:
        """Take a piece; False while it is not ready for the next. Raises ``ConnectionResetError`` where it is gone."""
        ...

    async def ready(self) -> None:
        """Wait until it is ready again; raises ``ConnectionResetError`` where it is gone."""
        ...


class Identity(msgspec.Struct, frozen=True):
    """What makes two requests one: ``digest`` is that of what is asked; ``is_explicit`` where the client named it.

    ``retries`` is how often an SDK has sent it before.
    """

    owner: str
    key: str
    digest: bytes
    is_explicit: bool
    retries: int = 0


class Attempt:
    """One answer as it comes to be.

    ``pieces`` are kept where somebody may ask for them again; ``error`` is how it failed, and ``ending`` what a client
    that has begun to read is told of that. ``content_type`` is the answer's; ``is_complete`` is set by its producer.
    One that ``is_heard_out`` goes on to its end though nobody listens.
    """

    def __init__(self, content_type: str, identity: Identity | None = None, *, is_heard_out: bool = False) -> None:
        self.content_type = content_type
        self.identity = identity
        self._retries = 0 if identity is None else identity.retries
        self._is_heard_out = is_heard_out
        self.pieces: list[bytes] = []
        self.size = 0
        self.error: GatewayError | None = None
        self.ending = b""
        self.is_complete = False
        is_whole = content_type == "application/json"
        self.is_kept = identity is not None or is_whole
        is_long = is_whole or (identity is not None and identity.is_explicit)
        self._most = MOST_KEPT if is_long else MOST_BEGINNING
        self.over = asyncio.Event()
        self.listeners: list[Listener] = []
        self._only: Callable[[bytes], bool] | None = None
        self._producer: asyncio.Task[None] | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._is_given_up = False
        self.is_cancelled = False
        self.is_forgotten = False
        """Whether its owner wants nothing of it kept any more."""

    @property
    def begun(self) -> bool:
        """Tell whether there is anything to hand over."""
        return self.size > 0

    @property
    def is_abandoned(self) -> bool:
        """Tell whether it ended without an outcome."""
        return self.over.is_set() and not self.is_complete

    def repeated_by(self, identity: Identity) -> None:
        """Note that it is asked for again."""
        self._retries = max(self._retries, identity.retries)

    def may_be_repeated(self, error: GatewayError) -> bool:
        """Tell whether the same request is a new one after this failure: nobody heard an answer, or the agent of it."""
        return not self.begun and (error.should_retry is not False or isinstance(error, ClientError))

    def start(self, tasks: TaskSet, produce: Callable[["Attempt"], Coroutine[Any, Any, None]]) -> None:
        """Let the answer come to be, whoever listens."""
        self._producer = tasks.spawn(self._run(produce), "answer")
        self._producer.add_done_callback(self._ended)  # it may be cancelled before its first step

    def never_was(self, error: BaseException) -> None:
        """Tell whoever has joined already that the answer does not come to be."""
        self.error = error if isinstance(error, GatewayError) else ConversationBusy()
        self.over.set()

    async def _run(self, produce: Callable[["Attempt"], Coroutine[Any, Any, None]]) -> None:
        try:
            await produce(self)
        except GatewayError as error:
            self.error = dealt_with(error)

    def _ended(self, _: "asyncio.Task[None]") -> None:
        self._producer = None
        self.over.set()

    # Producing -------------------------------------------------------------------------------------------------------

    def push(self, data: bytes) -> bool:
        """Hand over a piece; False where a listener needs time. Raises ``ConnectionResetError`` where none is left."""
        self.size += len(data)
        if self.is_kept:
            self.pieces.append(data)
            self._bound()
        if self._only is not None:
            try:
                return self._only(data)
            except ConnectionResetError:
                self.leave(self.listeners[0])
        return self._offer_all(data)

    def _offer_all(self, data: bytes) -> bool:
        is_ready = True
        for listener in list(self.listeners):
            try:
                is_ready &= listener.offer(data)
            except ConnectionResetError:
                self.leave(listener)
        self._raise_if_given_up()
        return is_ready

    async def ready(self) -> None:
        """Wait for every listener that needs time; raises ``ConnectionResetError`` where none is left."""
        for listener in list(self.listeners):
            try:
                await listener.ready()
            except ConnectionResetError:
                self.leave(listener)
        self._raise_if_given_up()

    def _raise_if_given_up(self) -> None:
        if self._is_given_up:
            raise ConnectionResetError("nobody listens any more")

    def _bound(self) -> None:
        if self.size > self._most:
            self.is_kept = False
            self.pieces.clear()

    # Listening -------------------------------------------------------------------------------------------------------

    def join(self, listener: Listener) -> bytes:
        """Hand the answer to one more listener from now on; return what came before."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self.listeners.append(listener)
        self._look_for_only()
        return b"".join(self.pieces)

    def leave(self, listener: Listener) -> None:
        """Hand it over no more; an answer that nobody listens to is given up, at once or after a while."""
        if listener not in self.listeners:
            return
        self.listeners.remove(listener)
        self._look_for_only()
        if self.listeners or self.over.is_set() or self._is_heard_out:
            return
        if self.identity is None or (self.begun and not self.identity.is_explicit):
            self._give_up()
        elif not self.identity.is_explicit:
            self._leaving = asyncio.get_running_loop().call_later(_until_next(self._retries), self._give_up)

    def _look_for_only(self) -> None:
        """Keep at hand what each piece is handed to, where one listens as nearly always."""
        self._only = self.listeners[0].offer if len(self.listeners) == 1 else None

    def cancel(self) -> None:
        """End it, whoever listens."""
        self.is_cancelled = True
        if self._producer is not None:
            self._producer.cancel()

    def _give_up(self) -> None:
        self._leaving = None
        if self._producer is not None and not self.listeners:
            self._is_given_up = True
            self._producer.cancel()


class _Named(msgspec.Struct, frozen=True):
    attempt: Attempt
    shown: Callable[[], bytes]


class Attempts:
    """All answers that somebody may ask for again."""

    def __init__(self, outcomes: Outcomes, tasks: TaskSet, places: Places) -> None:
        self._outcomes = outcomes
        self._tasks = tasks
        self._places = places
        self._known: OrderedDict[tuple[str, str], tuple[float, Attempt]] = OrderedDict()
        self._named: dict[tuple[str, str], _Named] = {}
        self._over: dict[tuple[str, str], None] = {}
        """The SDKs' requests that are written down and stand no more."""

    async def find(self, identity: Identity) -> Attempt | Outcome | None:
        """Return the answer that a request repeats; None where it is the first.

        Raises ``IdempotencyConflict`` where the key stands for another request, ``HeldElsewhere`` where another gateway
        answers it, ``OutcomeUnknown`` where a restart or the death of the one that answered came between, and
        ``StorageUnavailable``.
        """
        self._forget_old()
        known = self._known.get((identity.owner, identity.key))
        if known is not None and (identity.is_explicit or identity.retries) and not known[1].is_abandoned:
            return _same(identity, known[1])
        if not identity.is_explicit:
            if identity.retries:
                await self._check_unsaid(identity)
            return None
        outcome = await self._outcomes.find(identity.owner, identity.key)
        if outcome is None:
            return None
        _check(identity, outcome.request)
        if outcome.status == UNKNOWN:
            await self._places.check(_place(identity))
            raise OutcomeUnknown
        return outcome

    async def _check_unsaid(self, identity: Identity) -> None:
        """Raise what ``find`` raises where an earlier try may have come to the agent."""
        await self._places.check(_place(identity))
        if (identity.owner, identity.key) in self._over:
            return
        earlier = await self._outcomes.find(identity.owner, identity.key)
        if earlier is not None and time.time() < earlier.ended_at + LONGEST:
            raise OutcomeUnknown

    async def name(self, owner: str, name: str, attempt: Attempt, shown: Callable[[], bytes]) -> None:
        """Let an answer that is about to be produced be found by its name, from other gateways too.

        ``shown`` tells how far it has come.
        """
        await self._places.take(_place_of_name(owner, name), LONGEST)
        self._named[owner, name] = _Named(attempt, shown)
        self._tasks.spawn(self._forget_name(owner, name, attempt), "forget name")

    async def _forget_name(self, owner: str, name: str, attempt: Attempt) -> None:
        await attempt.over.wait()
        del self._named[owner, name]
        await self._places.leave(_place_of_name(owner, name))

    def so_far(self, owner: str, name: str) -> bytes | None:
        """Return how far an answer has come that is under way here; None where there is none of that name."""
        named = self._named.get((owner, name))
        return None if named is None else named.shown()

    async def check_elsewhere(self, owner: str, name: str) -> None:
        """Raise ``HeldElsewhere`` where another gateway has an answer of that name under way."""
        await self._places.check(_place_of_name(owner, name))

    async def cancel(self, owner: str, name: str) -> bool:
        """Cancel an answer that is under way, and see it end; False where there is none of that name.

        Raises ``HeldElsewhere`` where another gateway answers it.
        """
        named = self._named.get((owner, name))
        if named is None:
            await self.check_elsewhere(owner, name)
            return False
        named.attempt.cancel()
        await named.attempt.over.wait()
        return True

    async def begin(self, attempt: Attempt) -> Attempt | None:
        """Remember an answer that is about to be produced; return another one that was quicker with the same key.

        Raises ``HeldElsewhere`` where that one is in another gateway, and ``StorageUnavailable``.
        """
        identity = attempt.identity
        if identity is None:
            return None
        key = identity.owner, identity.key
        known = self._known.get(key)
        if known is not None and identity.is_explicit:
            return known[1]
        self._known[key] = time.monotonic(), attempt
        self._over.pop(key, None)
        try:
            await self._places.take(_place(identity), LONGEST)
            await self._write_down(attempt, identity)
        except BaseException as error:
            self._known.pop(key, None)
            attempt.never_was(error)
            raise
        return None

    async def _write_down(self, attempt: Attempt, identity: Identity) -> None:
        unknown = _outcome(attempt, UNKNOWN, b"")
        if identity.is_explicit:
            await self._outcomes.keep(unknown)
            return
        try:
            await self._outcomes.mark(unknown)
        except BaseException:
            self._over[identity.owner, identity.key] = None  # it may be written all the same
            raise

    async def end(self, attempt: Attempt) -> None:
        """Write down what an answer came to, or forget it where the message surely did not reach the agent."""
        identity = attempt.identity
        if identity is None:
            return
        error = attempt.error
        if not attempt.is_complete or (error is not None and attempt.may_be_repeated(error)):
            await self._forget(attempt, identity)
        else:
            if identity.is_explicit:
                await self._keep(attempt)
            await self._stay(identity)
            self._remember(identity, attempt)

    def _remember(self, identity: Identity, attempt: Attempt) -> None:
        """Count the time for which it is told again from now on, unless the same words were said anew since."""
        key = identity.owner, identity.key
        if key in self._known and self._known[key][1] is attempt:
            self._known[key] = time.monotonic(), attempt

    async def _stay(self, identity: Identity) -> None:
        """Let retries that reach another gateway be answered by this one, which remembers the answer for a while."""
        try:
            await self._places.take(_place(identity), REMEMBER)
        except SharedStateUnavailable as failure:
            _log.warning("place of an answer not written down", code=failure.code)

    async def _keep(self, attempt: Attempt) -> None:
        error = attempt.error
        if error is not None and not attempt.begun:
            outcome = _outcome(attempt, error.status, error.body())
        else:
            outcome = _outcome(attempt, 200, b"".join(attempt.pieces) + attempt.ending)
        if attempt.is_forgotten or not attempt.is_kept or len(outcome.body) > MAX_BODY:
            return  # not to be told again: what stands is that its outcome is not known
        try:
            await self._outcomes.replace(outcome)
        except StorageUnavailable as failure:
            _log.warning("outcome not written down", code=failure.code)

    async def forget_answers(self, owner: str) -> None:
        """Tell an owner's answers nobody again, those under way included; that they were given stays known.

        In other gateways they are remembered for another minute. Raises ``StorageUnavailable``.
        """
        for (of, _), (_, attempt) in self._known.items():
            if of == owner:
                attempt.is_forgotten = True
        await self._outcomes.blank(owner)

    async def sweep(self) -> None:
        """Forget the SDKs' requests that stand no more; raises ``StorageUnavailable``."""
        self._forget_old()
        over = list(self._over)
        await self._outcomes.forget_all(over, time.time())
        for key in over:
            self._over.pop(key, None)

    async def purge(self, now: float) -> None:
        """Forget the outcomes of keys that stand no more."""
        await self._outcomes.purge(now - KEEP)

    async def _forget(self, attempt: Attempt, identity: Identity) -> None:
        known = self._known.get((identity.owner, identity.key))
        if known is not None and known[1] is not attempt:
            return  # the same words were said anew since
        self._known.pop((identity.owner, identity.key), None)
        try:
            await self._outcomes.forget(identity.owner, identity.key)
        finally:
            await self._places.leave(_place(identity))

    def _forget_old(self) -> None:
        now, size = time.monotonic(), 0
        for key, (since, attempt) in list(self._known.items()):
            if attempt.over.is_set() and now - since > REMEMBER:
                del self._known[key]
                if attempt.identity is not None and not attempt.identity.is_explicit:
                    self._over[key] = None
            else:
                size += attempt.size if attempt.is_kept else 0
        while size > MOST_REMEMBERED and self._known:
            _, (_, attempt) = self._known.popitem(last=False)
            size -= attempt.size if attempt.is_kept else 0


def _place(identity: Identity) -> str:
    return f"answer\n{identity.owner}\n{identity.key}"


def _place_of_name(owner: str, name: str) -> str:
    return f"named answer\n{owner}\n{name}"


def _same(identity: Identity, attempt: Attempt) -> Attempt:
    _check(identity, attempt.identity.digest if attempt.identity is not None else b"")
    if attempt.is_forgotten or (attempt.begun and not attempt.is_kept):
        raise OutcomeUnknown
    attempt.repeated_by(identity)
    return attempt


def _until_next(retries: int) -> float:
    """Return the seconds within which an SDK sends a request again that it has sent so often before."""
    return min(FIRST_PAUSE * float(2 ** min(retries, 10)), LONGEST_PAUSE) * SLACK


def _check(identity: Identity, digest: bytes) -> None:
    if identity.digest != digest:
        raise IdempotencyConflict


def _outcome(attempt: Attempt, status: int, body: bytes) -> Outcome:
    assert attempt.identity is not None  # noqa: S101 - asked before
    return Outcome(
        owner=attempt.identity.owner,
        key=attempt.identity.key,
        request=attempt.identity.digest,
        status=status,
        content_type=attempt.content_type,
        body=body,
        ended_at=time.time(),
    )
