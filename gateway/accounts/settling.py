"""Turns that are over, until it is written down how they went: what cannot be written or priced now is tried again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import msgspec
import structlog

from gateway.accounts.agent_models import UNKNOWN, AgentModels
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.bookkeeping import Settled, Status
from gateway.errors import GatewayError
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage

TRY_AGAIN: Final = 1.0
"""Seconds until what could not be settled is tried again."""
MOST: Final = 10_000
"""Turns that are kept in memory; others are left to be reconciled."""
AT_ONCE: Final = 256
"""Turns that are tried again together."""
MOST_TOKENS: Final = 1_000_000_000
"""Tokens of each kind that a turn is believed to take."""
MOST_COST: Final = 1_000_000_000_000
"""What a turn is believed to cost, in millionths of a US dollar: with it, sums stay below 2^63."""

LETTERS: Final = 4
"""Characters of a token, about."""
LEAST_PROMPT: Final = 1_000
"""Tokens that an agent's prompt has at least, about: Letta's own instructions and the memory."""

Write: TypeAlias = Callable[[Settled], Awaitable[object]]
UsualPrompt: TypeAlias = Callable[[str], Awaitable[int | None]]
"""Returns the prompt tokens of the latest whole turn of a turn's owner; None for a turn that holds no budget."""

_log: Final = structlog.get_logger("gateway.ledger")


class Over(msgspec.Struct, frozen=True):
    """A turn that is over; None taken is nothing that Letta would know of, ``ended_at`` is in UTC seconds.

    ``characters`` is what came of an answer that was cut, None of any other.
    """

    id: str
    agent_id: str
    taken: Usage | None
    status: Status
    ended_at: float
    characters: int | None = None


class Settling:
    """Settles turns, each until it is written.

    ``forsaken`` has the ids of turns that are to be reconciled instead, with what Letta says of them.
    """

    def __init__(
        self, write: Write, models: AgentModels, billing: Billing, tasks: TaskSet, *, usual_prompt: UsualPrompt
    ) -> None:
        self._write = write
        self._usual_prompt = usual_prompt
        self._models = models
        self._billing = billing
        self._tasks = tasks
        self._over: dict[str, Over] = {}
        self._late: set[str] = set()
        self._is_behind = False
        self._is_ending = False
        self.forsaken: set[str] = set()

    def __len__(self) -> int:
        return len(self._over)

    def __contains__(self, turn_id: object) -> bool:
        return turn_id in self._over

    @property
    def oldest(self) -> float | None:
        """Return when the turn ended that has waited longest, in UTC seconds; None where none waits."""
        return min((over.ended_at for over in self._over.values()), default=None)

    async def settle(self, over: Over) -> bool:
        """Write down how a turn went; False where that is to be tried again."""
        self._over[over.id] = over
        try:
            await self._write(await self._priced(over))
        except GatewayError as error:
            self.put_off(over, error.code)
            return False
        except asyncio.CancelledError:
            self._late.add(over.id)
            raise
        except BaseException:
            self._forsake(over)
            raise
        self._over.pop(over.id, None)
        return True

    def put_off(self, over: Over, reason: str | None) -> None:
        """Try to settle a turn in a while."""
        if len(self._late) >= MOST:
            self._forsake(over)
            return
        self._over[over.id] = over
        self._late.add(over.id)
        if not self._is_behind:
            self._is_behind = True
            _log.warning("ledger behind", reason=reason)
            self._tasks.spawn(self._catch_up(), "catch up with the ledger")

    async def end(self, seconds: float) -> None:
        """Settle what is left, for as long as this may take; the rest is for the next start to reconcile."""
        self._is_ending = True
        try:
            async with asyncio.timeout(seconds):
                while self._over:
                    await self._settle_late()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            _log.warning("ledger not written to its end", turns=len(self._over))

    async def _priced(self, over: Over) -> Settled:
        if over.status == "unsent":
            return Settled(id=over.id, status=over.status, ended_at=over.ended_at)
        usage = _believed(over)
        model = await self._model(over)
        cost = max(await self._billing.cost(model, usage), await self._likely_cost(over, model, usage))
        return Settled(
            id=over.id,
            status=over.status,
            model=model,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens or 0,
            reasoning_tokens=usage.reasoning_tokens or 0,
            cost_micros=_within(cost, MOST_COST, over),
            ended_at=over.ended_at,
        )

    async def _likely_cost(self, over: Over, model: str, usage: Usage) -> int:
        """Return what a turn cost that was cut: Letta counts no step that was, and who has a budget might cut them all.

        Only for money: the tokens in the ledger are those that Letta counts.
        """
        prompt = None if over.characters is None else await self._usual_prompt(over.id)
        if prompt is None or over.characters is None:
            return 0
        likely = Usage(
            max(usage.prompt_tokens, prompt or LEAST_PROMPT),
            max(usage.completion_tokens, over.characters // LETTERS),
            usage.cached_tokens,
        )
        return await self._billing.cost(model, likely)

    async def _model(self, over: Over) -> str:
        try:
            return await self._models.of(over.agent_id)
        except GatewayError:
            if (over.taken is not None or over.characters is not None) and not self._is_ending:
                raise
            return UNKNOWN  # there is nothing to price; or else what it took would be forgotten with this process

    def _forsake(self, over: Over) -> None:
        self._over.pop(over.id, None)
        self.forsaken.add(over.id)

    async def _catch_up(self) -> None:
        try:
            while self._late:
                await asyncio.sleep(TRY_AGAIN)
                await self._settle_late()
        finally:
            self._is_behind = False
        _log.info("ledger caught up")

    async def _settle_late(self) -> None:
        """Try again what could not be settled, some at a time, until nothing of these can be."""
        late = list(self._late)
        for start in range(0, len(late), AT_ONCE):
            some = late[start : start + AT_ONCE]
            self._late.difference_update(some)
            overs = [self._over[turn_id] for turn_id in some if turn_id in self._over]
            if not any(await asyncio.gather(*map(self.settle, overs))):
                return


def _believed(over: Over) -> Usage:
    taken = over.taken or Usage(0, 0)
    return Usage(
        _within(taken.prompt_tokens, MOST_TOKENS, over),
        _within(taken.completion_tokens, MOST_TOKENS, over),
        _within(taken.cached_tokens or 0, MOST_TOKENS, over),
        _within(taken.reasoning_tokens or 0, MOST_TOKENS, over),
    )


def _within(count: int, most: int, over: Over) -> int:
    believed = min(max(count, 0), most)
    if believed != count:
        _log.warning("figure of a turn is not to be believed", turn=over.id, count=str(count), taken_as=believed)
    return believed
