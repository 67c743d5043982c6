"""A ledger that only remembers: for tests of whoever opens turns."""

import asyncio
from typing import NamedTuple

from gateway.conversations.metering import Payer, TurnOutcome
from gateway.errors import GatewayError
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn


class Settled(NamedTuple):
    """What was told of a turn at its end."""

    taken: Usage | None
    outcome: TurnOutcome


class RecordingMeter:
    """A ``Meter`` that remembers what it is told, and fails the test where a turn is settled twice.

    ``opened`` has every turn that was let through, by its name, ``settled`` those that were closed, ``left_open`` those
    that were left for later, ``characters`` how much came of each answer. ``refusal``, when set, is raised by ``open``;
    ``opening`` and ``closing``, when set, are waited for before ``open`` and ``close`` return.
    """

    def __init__(self) -> None:
        self.opened: dict[str, tuple[Payer, AgentTurn]] = {}
        self.settled: dict[str, Settled] = {}
        self.left_open: list[str] = []
        self.characters: dict[str, int] = {}
        self.refusal: GatewayError | None = None
        self.opening: asyncio.Event | None = None
        self.closing: asyncio.Event | None = None
        self._begun = 0

    async def open(self, payer: Payer, turn: AgentTurn) -> str:
        """Give the turn a name; who leaves meanwhile has none."""
        if self.opening is not None:
            await self.opening.wait()
        if self.refusal is not None:
            raise self.refusal
        self._begun += 1
        turn_id = f"turn-{self._begun}"
        self.opened[turn_id] = (payer, turn)
        return turn_id

    async def close(self, turn_id: str, taken: Usage | None, outcome: TurnOutcome, characters: int = 0) -> None:
        """Remember it: what is told counts at once, whoever waits for the rest."""
        self._check(turn_id)
        self.characters[turn_id] = characters
        self.settled[turn_id] = Settled(taken, outcome)
        if self.closing is not None:
            await self.closing.wait()

    def leave_open(self, turn_id: str) -> None:
        """Remember it."""
        self._check(turn_id)
        self.left_open.append(turn_id)

    @property
    def outcomes(self) -> list[TurnOutcome]:
        """Return how the turns went, in the order in which they were settled."""
        return [settled.outcome for settled in self.settled.values()]

    def assert_settled(self) -> None:
        """Fail where a turn that was opened has no end."""
        assert self.opened.keys() == self.settled.keys() | set(self.left_open)

    def _check(self, turn_id: str) -> None:
        assert turn_id in self.opened, "never opened"
        assert turn_id not in self.settled, "settled twice"
        assert turn_id not in self.left_open, "settled twice"
