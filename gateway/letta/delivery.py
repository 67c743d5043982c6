"""How a turn's batches reach whoever takes them: by a call from the transport's own callback, not by a wake-up.

A future and a step of a task for every network read would be a fifth of what a token costs.
"""

import asyncio
from collections.abc import Callable

from gateway.letta.backend import Ready, Take
from gateway.translation.agent_events import Batch


class Delivery:
    """Hands batches to a taker while it is ready, and waits while it is not."""

    def __init__(self) -> None:
        self._take: Take | None = None
        self._pause: asyncio.Future[bool] | None = None

    @property
    def takes(self) -> bool:
        """Tell whether somebody takes batches now."""
        return self._take is not None

    async def run(self, take: Take, ready: Ready, hand_on: Callable[[], None]) -> None:
        """Deliver until ``end`` or ``fail``; ``hand_on`` is called for what has come while nobody took it."""
        loop = asyncio.get_running_loop()
        while True:
            self._pause = loop.create_future()
            self._take = take
            try:
                hand_on()
                if await self._pause:
                    return
            finally:
                self._take = None
            await ready()

    def hand(self, batch: Batch) -> bool:
        """Hand over one batch; False when the next has to wait."""
        assert self._take is not None  # noqa: S101 - asked before
        try:
            if self._take(batch):
                return True
        except Exception as error:  # noqa: BLE001 - raised where the taker waits
            self.fail(error)
        else:
            self._stop(is_over=False)
        return False

    def end(self) -> None:
        """End the delivery: there is no more."""
        self._stop(is_over=True)

    def fail(self, error: Exception) -> None:
        """End the delivery with an error."""
        self._take = None
        if self._pause is not None and not self._pause.done():
            self._pause.set_exception(error)

    def _stop(self, *, is_over: bool) -> None:
        self._take = None
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(is_over)
