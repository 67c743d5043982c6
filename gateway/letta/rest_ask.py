"""How the control plane is asked: a question of letta-client's, undecoded, through the backend's breaker and errors."""

from collections.abc import Callable, Coroutine
from typing import Protocol, TypeVar

T = TypeVar("T")


class Raw(Protocol):
    """An undecoded answer of letta-client's, read whole."""

    async def read(self) -> bytes:
        """Return the body."""
        ...


class Ask(Protocol):
    """Asks through the breaker, within a deadline; raises only the tree of ``gateway/errors.py``."""

    async def __call__(self, question: Coroutine[object, object, Raw], decode: Callable[[bytes], T]) -> T:
        """Return the decoded answer."""
        ...


def anything(body: bytes) -> bytes:
    """Take an answer whatever it says."""
    return body
