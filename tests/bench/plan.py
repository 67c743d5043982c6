"""How much is measured: the sizes of a full run and of a quick one."""

from msgspec import Struct


class Plan(Struct, frozen=True):
    """The sizes of one run; seconds where nothing else is said."""

    repeats: int = 5
    ramp: float = 1.5
    """What the streams take to open."""
    settle: float = 1.0
    """What is let pass before anything is measured."""
    window: float = 6.0
    """The steady part, the only one that is measured."""
    tail: float = 1.0
    """How long the streams outlast it."""
    streams: int = 200
    rate: float = 50.0
    """Deltas a second on each of these streams."""
    litellm_streams: int = 20
    litellm_rate: float = 20.0
    """What LiteLLM still sustains here, with the driver and the upstream on the same two cores."""
    crowds: tuple[tuple[int, float], ...] = ((200, 50.0), (500, 20.0))
    """Live streams, and their deltas a second, among which the time to first token is taken."""
    probe_rate: float = 50.0
    """New streams a second that are dated, at moments that do not wait for any answer."""
    held: int = 2000
    hold: float = 20.0
    held_ramp: float = 4.0
    workers: int = 64
    request_seconds: float = 3.0


QUICK = Plan(
    repeats=1,
    ramp=0.2,
    settle=0.3,
    window=1.0,
    tail=0.3,
    streams=20,
    litellm_streams=5,
    crowds=((20, 50.0),),
    held=100,
    hold=2.0,
    held_ramp=0.2,
    workers=16,
    request_seconds=0.5,
)
"""A smoke test of a few seconds: its figures mean little."""
