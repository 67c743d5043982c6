"""A turn's batches, one at a time: deliveries that end after the first."""

from collections.abc import AsyncIterator

from gateway.letta.backend import RunningTurn, always_ready
from gateway.translation.agent_events import AgentEvent, Batch


class _Enough(Exception):
    pass


async def next_batch(running: RunningTurn) -> Batch | None:
    """Return the next batch; None at the end. The turn stands there until it is asked again."""
    taken: list[Batch] = []

    def take(batch: Batch) -> bool:
        taken.append(batch)
        raise _Enough

    try:
        await running.deliver(take, always_ready)
    except _Enough:
        return taken[0]
    return None


async def batches(running: RunningTurn) -> AsyncIterator[Batch]:
    """Iterate the batches from where the stream stands."""
    while (batch := await next_batch(running)) is not None:
        yield batch


async def heard(running: RunningTurn) -> list[AgentEvent]:
    """Return the events of the rest of the stream."""
    events: list[AgentEvent] = []

    def take(batch: Batch) -> bool:
        events.extend(batch)
        return True

    await running.deliver(take, always_ready)
    return events
