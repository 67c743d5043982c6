import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.server.notify import ServiceManager
from tests.server.recorded_logs import recorded_logs
from tests.server.service_manager import Told, told

BEAT = {"WATCHDOG": "1"}


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Told]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@letta-gateway/{tmp_path}"
    with told(name) as listening:
        yield listening


def started_by(systemd: Told, **environ: str) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": systemd.name, **environ})


async def test_nobody_is_told_where_nobody_asks() -> None:
    with recorded_logs() as logs:
        manager = ServiceManager({"WATCHDOG_USEC": "1000"})
        manager.ready("Serving")
        manager.stopping(1.0, "Draining")
        await asyncio.sleep(0.01)
        manager.close()
    assert not logs.lines


async def test_ready_and_stopping(systemd: Told) -> None:
    manager = started_by(systemd)
    assert systemd.so_far() == []
    manager.ready("Serving 127.0.0.1, port 8080")
    assert systemd.so_far() == [{"READY": "1", "STATUS": "Serving 127.0.0.1, port 8080"}]
    manager.stopping(50.5, "Draining")
    assert systemd.so_far() == [{"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "50500000", "STATUS": "Draining"}]
    manager.close()
    manager.ready("Serving")
    assert systemd.so_far() == [], "nothing after the end"


async def test_start_that_waits_is_not_ready(systemd: Told) -> None:
    manager = started_by(systemd)
    manager.starting("Waiting for the database")
    manager.close()
    assert systemd.so_far() == [{"STATUS": "Waiting for the database"}]


# The heart-beat ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [{}, {"WATCHDOG_PID": ""}, {"WATCHDOG_PID": str(os.getpid())}])
async def test_beats_twice_in_the_time_that_systemd_waits(systemd: Told, process: dict[str, str]) -> None:
    manager = started_by(systemd, WATCHDOG_USEC="400000", **process)
    await asyncio.sleep(0.25)
    assert systemd.so_far() == [], "systemd begins to wait with READY"
    manager.ready("Serving")
    assert "READY" in (await systemd.next())
    assert await systemd.next() == BEAT
    at = time.monotonic()
    for _ in range(3):
        assert await systemd.next() == BEAT
    assert 0.5 < time.monotonic() - at < 1.2
    manager.close()
    await asyncio.sleep(0.25)
    assert systemd.so_far() == []


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-10000"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "10000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "10000", "WATCHDOG_PID": "none"},
    ],
)
async def test_no_beat_where_none_is_expected(systemd: Told, environ: dict[str, str]) -> None:
    manager = started_by(systemd, **environ)
    manager.ready("Serving")
    await asyncio.sleep(0.05)
    manager.close()
    assert [list(message) for message in systemd.so_far()] == [["READY", "STATUS"]]


async def test_loop_that_stands_still_beats_no_more(systemd: Told) -> None:
    manager = started_by(systemd, WATCHDOG_USEC="40000")
    manager.ready("Serving")
    await asyncio.sleep(0.1)
    assert BEAT in systemd.so_far()
    time.sleep(0.3)  # noqa: ASYNC251 - that is the point
    assert systemd.so_far() == []
    await asyncio.sleep(0.1)
    assert BEAT in systemd.so_far(), "it turns again"
    manager.close()


async def test_beats_while_no_descriptor_is_left(systemd: Told) -> None:
    manager = started_by(systemd, WATCHDOG_USEC="40000")
    manager.ready("Serving")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[socket.socket] = []
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, and no path among them
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            taken.extend(iter(socket.socket, None))
        await asyncio.sleep(0.1)
        beats = systemd.so_far()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in taken:
            each.close()
        manager.close()
    assert beats[-1] == BEAT
    assert len(beats) > 2


# A manager that does not listen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/notify", "@letta-gateway/nobody", "vsock:2:1", "/" + "x" * 200])
async def test_manager_that_is_not_there_stops_nothing(name: str) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": name})
    with recorded_logs() as logs:
        manager.ready("Serving")
        manager.stopping(1.0, "Draining")
    manager.close()
    assert [line["message"] for line in logs.lines] == ["READY", "STOPPING"]
    assert {line["event"] for line in logs.lines} == {"the service manager cannot be told"}


async def test_manager_that_has_no_room_is_told_later(systemd: Told) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)  # noqa: FBT003
        address = systemd.listening.getsockname()
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"X=1", address)
        manager = started_by(systemd)
        at = time.monotonic()
        manager.ready("Serving")
        assert time.monotonic() - at < 0.05, "the loop goes on"
        assert systemd.so_far()[-1] == {"X": "1"}
        assert "READY" in await systemd.next()
    manager.close()
