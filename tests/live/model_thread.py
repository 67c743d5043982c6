"""The demo model in a thread with an event loop of its own, so that it goes on while a test blocks or ends."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from gateway.letta.demo_model import Recorder, RunningDemoModel, running_demo_model

_PATIENCE = 10.0


@contextlib.contextmanager
def demo_model_in_thread(port: int = 0, recorder: Recorder | None = None) -> Iterator[RunningDemoModel]:
    """Serve a demo model while the context is open; a recorder of its own remembers as much as it was made for."""
    started: Future[tuple[RunningDemoModel, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        try:
            async with running_demo_model(port=port, recorder=recorder) as model:
                stop = asyncio.Event()
                started.set_result((model, asyncio.get_running_loop(), stop))
                await stop.wait()
        except Exception as problem:
            if started.done():
                raise
            started.set_exception(problem)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="demo model", daemon=True)
    thread.start()
    model, loop, stop = started.result(_PATIENCE)
    try:
        yield model
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(_PATIENCE)
