"""What the process is doing, told on standard error when it is asked by SIGUSR1: where each thread is, and each task.

The threads are told of at once, even by a process whose event loop stands still; the tasks as soon as it turns.
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Final

SIGNAL: Final = signal.SIGUSR1
_STANDARD_ERROR: Final = 2


@contextlib.contextmanager
def told_when_asked() -> Iterator[None]:
    """Listen for the signal for as long as the context."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(SIGNAL, _write_tasks)
    faulthandler.register(SIGNAL, file=_STANDARD_ERROR, all_threads=True, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(SIGNAL)
        loop.remove_signal_handler(SIGNAL)


def tasks_told() -> str:
    """Say where the tasks wait, and how many at each place."""
    places = Counter(_place(task) for task in asyncio.all_tasks())
    return "".join([f"{places.total()} tasks:\n", *(f"{count:6} {place}\n" for place, count in places.most_common())])


def _write_tasks() -> None:
    os.write(_STANDARD_ERROR, tasks_told().encode())


def _place(task: "asyncio.Task[object]") -> str:
    coroutine: object = task.get_coro()
    outermost, innermost = getattr(coroutine, "__qualname__", "?"), _frame(coroutine)
    while (awaited := _awaited(coroutine)) is not None:
        coroutine = awaited
        innermost = _frame(coroutine) or innermost
    if innermost is None:
        return str(outermost)
    code = innermost.f_code
    return f'{outermost}: File "{code.co_filename}", line {innermost.f_lineno} in {code.co_name}'


def _awaited(coroutine: object) -> object:
    return getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _frame(coroutine: object) -> FrameType | None:
    return getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
