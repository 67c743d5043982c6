"""How many turns and connections fit into the file descriptors of this process."""

import resource
from typing import Final

RESERVE: Final = 64
"""Descriptors for everything that is no turn: listeners, logs, the control plane, connections being refused."""
PER_TURN: Final = 2
"""The client's connection and Letta's."""
SPARE: Final = 32
"""Connections beyond those of turns: what is asked while all turns are taken, probes above all."""
SMALLEST: Final = 8


def raise_limit() -> int:
    """Raise the soft limit of descriptors to the hard one and return it: the default of 1,024 is 480 streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def turns_that_fit() -> int:
    """Return how many turns may be held before accepting connections would fail."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(SMALLEST, (soft - RESERVE - SPARE) // PER_TURN)


def connections_that_fit() -> int:
    """Return how many clients may be connected while all turns are taken."""
    return turns_that_fit() + SPARE
