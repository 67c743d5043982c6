"""In which gateway something is: a turn that waits for the client's tools, an answer that is under way."""

from typing import Protocol


class Places(Protocol):
    """Knows which gateway has what; a place is an address and the name of the process behind it."""

    async def take(self, name: str, seconds: float) -> None:
        """Say that this gateway has something, for so long.

        Raises ``HeldElsewhere`` where another one has it, and ``SharedStateUnavailable``.
        """
        ...

    async def check(self, name: str) -> None:
        """Raise ``HeldElsewhere`` where another gateway has something; ``SharedStateUnavailable``."""
        ...

    async def leave(self, name: str) -> None:
        """Say that this gateway has something no more; raises ``SharedStateUnavailable``."""
        ...

    async def forget(self, name: str, place: str) -> None:
        """Forget a place that is no more; raises ``SharedStateUnavailable``."""
        ...


class Alone:
    """``Places`` of a gateway that shares nothing: everything is here."""

    async def take(self, name: str, seconds: float) -> None:
        """Do nothing: nobody else could have it."""

    async def check(self, name: str) -> None:
        """Do nothing: nobody else could have it."""

    async def leave(self, name: str) -> None:
        """Do nothing: nobody else asks."""

    async def forget(self, name: str, place: str) -> None:
        """Do nothing: there is no other place."""


class Place:
    """An address and the process there, written as one word each."""

    def __init__(self, text: str) -> None:
        self.address, _, self.instance = text.partition(" ")


def place_of(address: str, instance: str) -> str:
    """Write down where something is."""
    return f"{address} {instance}"


def is_past(place: str, here: str) -> bool:
    """Tell that whoever had something is no more: the gateway that is here listens at that address now."""
    return Place(place).address == Place(here).address
