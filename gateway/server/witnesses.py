"""What other gateways say of Redis, where it does not answer this one: whether it is gone, or this one cut off."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from gateway.handlers.forwarding import RedisThere


class Witnesses:
    """The other gateways: ``others`` tells where they are, ``redis_of`` what one of them says of Redis."""

    def __init__(self, others: Callable[[], Sequence[str]], redis_of: Callable[[str], Awaitable[RedisThere]]) -> None:
        self._others = others
        self._redis_of = redis_of

    async def is_cut_off(self) -> bool:
        """Tell whether another gateway may be given what this one has.

        It may where Redis answers one of them, and where none of them can be asked though they are there.
        """
        said = set(await asyncio.gather(*map(self._redis_of, self._others())))
        return "answers" in said or ("unknown" in said and "silent" not in said)
