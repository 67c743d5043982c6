"""`python -m tests.bench.loads`: the loads that the gateway is to carry, each beside the same without it.

Each load is a function that starts what it needs and yields rows; `--only storm` runs one of them. The seconds of the
long ones are `--hold` (held streams) and `--soak`.
"""

import argparse
import asyncio
import itertools
import json
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import uvloop

from tests.bench import measure, targets
from tests.bench.driver import Tally, ask_in_a_loop, open_streams
from tests.bench.plan import Plan
from tests.bench.processes import DiedError, raise_file_limit
from tests.bench.report import hardware
from tests.bench.samples import HeldSample, Quantiles, quantiles
from tests.bench.targets import Asking, Target
from tests.live.postgres import running_postgres
from tests.live.setup_v1 import state_folder
from tests.shared_state.redis_process import RedisProcess

_PATIENCE: Final = 30.0
_KIB: Final = 1024
_MIB: Final = 1 << 20
_BODY: Final = 10_000_000
_CHATS: Final = 8
_USERS: Final = 64
_WORDS: Final = 10
"""What a round of the soak asks for."""
_FILES_MEANWHILE: Final = 24
"""Open files by which two moments of a soak may differ: connections of requests under way."""
_BRIEFLY: Final = 30.0
"""Seconds that the ways beside the gateway's are held."""
_serial = itertools.count()


class Row(NamedTuple):
    """One line of the table."""

    load: str
    promised: str
    gateway: str
    direct: str
    kept: bool


# Streams -------------------------------------------------------------------------------------------------------------


def held(options: argparse.Namespace) -> Iterator[Row]:
    """Hold 5,000 streams."""
    plan = Plan(hold=options.hold, held_ramp=40.0)
    with _both(5_000) as (direct, gateway):
        ours = uvloop.run(measure.held(gateway, 5_000, plan))
    # As long is not needed of what drops nothing by itself, nor of what it weighs.
    briefly = Plan(hold=min(plan.hold, _BRIEFLY), held_ramp=plan.held_ramp)
    with targets.upstream(5_000) as direct, targets.passthrough(direct.port) as relay:
        theirs, bare = (uvloop.run(measure.held(target, 5_000, briefly)) for target in (direct, relay))
    dropped = f"{len(ours.errors)} dropped, p99 {ours.latency.p99:.1f} ms, {ours.cpu_share:.0%} of a core"
    plain = f"{len(theirs.errors)} dropped in {briefly.hold:g} s, p99 {theirs.latency.p99:.1f} ms"
    yield Row(f"5,000 streams of 1 event/s for {options.hold:g} s", "0 dropped", dropped, plain, not ours.errors)
    each = _each(ours)
    peak = f"{ours.peak_rss / _MIB:.0f} MiB in all"
    alone = f"pass-through: {_each(bare):.1f} KiB"
    yield Row("memory of each of these", "<= 64 KiB", f"{each:.1f} KiB ({peak})", alone, each <= 64)


def jitter(_options: argparse.Namespace) -> Iterator[Row]:
    """Let 3,000 streams run at two events a second: when each comes, and whether all do, in order."""
    plan = Plan(ramp=20.0, window=10.0, settle=3.0)
    with _both(3_000) as (direct, gateway):
        theirs, ours = (
            uvloop.run(measure.streaming(target, direct.process, plan, 3_000, 2.0)) for target in (direct, gateway)
        )
    added = ours.latency.p99 - theirs.latency.p50
    yield Row(
        "3,000 streams of 2 events/s: what is added to an event's way, p99",
        "<= 20 ms, all in order",
        f"{added:.1f} ms, {len(ours.errors)} streams with a fault",
        f"{theirs.latency.p99:.1f} ms",
        added <= 20 and not ours.errors,
    )


def events(_options: argparse.Namespace) -> Iterator[Row]:
    """Relay 16,000 events a second."""
    plan = Plan(ramp=3.0, window=8.0)
    with _both(400) as (direct, gateway), targets.passthrough(direct.port) as relay:
        bare, ours = (
            uvloop.run(measure.streaming(target, direct.process, plan, 400, 40.0)) for target in (relay, gateway)
        )
    per_core = 1e6 / ours.cpu_us
    yield Row(
        "400 streams of 40 events/s: events per second of a core",
        ">= 5,000",
        f"{per_core:,.0f} ({ours.kept_up:.0%} of the pace kept, {ours.events_per_read:.2f} events per read)",
        f"pass-through: {1e6 / bare.cpu_us:,.0f}",
        per_core >= 5_000 and ours.kept_up > 0.97 and not ours.errors,
    )


def first_token(_options: argparse.Namespace) -> Iterator[Row]:
    """Send new streams into 500 live ones."""
    plan = Plan(ramp=5.0)
    with _both(600) as (direct, gateway), targets.passthrough(direct.port) as relay:
        plain, bare, ours = (
            uvloop.run(measure.first_token(target, 500, 2.0, plan)) for target in (direct, relay, gateway)
        )
    median, added = (each - plain.first_token.p50 for each in (ours.first_token.p50, ours.first_token.p99))
    bare_median, bare_added = (each - plain.first_token.p50 for each in (bare.first_token.p50, bare.first_token.p99))
    yield Row(
        "added to the time to the first token, among 500 streams of 2 events/s",
        "<= 3 / 15 ms p50 / p99",
        f"{median:.1f} / {added:.1f} ms of {ours.probes}",
        f"pass-through: {bare_median:.1f} / {bare_added:.1f} ms",
        median <= 3 and added <= 15 and not ours.errors,
    )


def storm(_options: argparse.Namespace) -> Iterator[Row]:
    """Connect 2,000 times within a second."""
    with _both(2_000) as (direct, gateway):
        found = [uvloop.run(_storm(target)) for target in (direct, gateway)]
    (theirs, plain), (ours, errors) = found
    yield Row(
        "2,000 new connections within a second, a chat with an agent never spoken to on each",
        "0 refused",
        f"{len(errors)} failed, first word p99 {ours.p99 / 1e3:.1f} s",
        f"{len(plain)} failed, p99 {theirs.p99:.0f} ms",
        not errors,
    )


async def _storm(target: Target) -> tuple[Quantiles, list[str]]:
    tally = Tally()
    requests = [target.request(Asking(number, _words(3, 0.02))) for number in range(2_000)]
    await open_streams(target.port, tally, requests, 3, lambda: 0.0005)
    await tally.all_gone(_PATIENCE)
    return quantiles(tally.first_tokens), tally.errors


def head_of_line(_options: argparse.Namespace) -> Iterator[Row]:
    """Send bodies of 10 MB beside 1,000 streams, then 500 logins at once."""
    for what, disturb in (("bodies of 10 MB", _send_bodies), ("500 logins with a wrong password at once", _log_in)):
        with _both(1_001) as (_, gateway):
            quiet, beside, done, errors = uvloop.run(_beside(gateway, disturb))
        yield Row(
            f"a word of 1,000 streams beside {what}, p99",
            "< 2 x that without them",
            f"{beside.p99:.1f} ms, {done} ({beside.p99 / quiet.p99:.2f} x)",
            f"{quiet.p99:.1f} ms without them",
            beside.p99 < 2 * quiet.p99 and not errors,
        )


Disturb: TypeAlias = Callable[[Target, threading.Event], str]
"""Does something to a gateway, until the event at the latest, and says what it came to."""


async def _beside(target: Target, disturb: Disturb) -> tuple[Quantiles, Quantiles, str, list[str]]:
    tally = Tally()
    requests = [target.request(Asking(number, _words(90, 0.5))) for number in range(1_000)]
    await open_streams(target.port, tally, requests, 90, lambda: 0.003)
    await asyncio.sleep(2)
    tally.latencies.clear()
    await asyncio.sleep(15)
    quiet = quantiles(tally.latencies)
    tally.latencies.clear()
    over = threading.Event()
    # In a thread: the driver's loop is what dates events.
    disturbing = asyncio.get_running_loop().run_in_executor(None, disturb, target, over)
    await asyncio.wait([disturbing], timeout=15)
    over.set()
    beside = quantiles(tally.latencies)
    done = await disturbing
    await tally.all_gone(60)
    return quiet, beside, done, tally.errors


def _log_in(target: Target, _over: threading.Event) -> str:
    flood = [sys.executable, "-m", "tests.faults.login_flood", str(target.port), "logins", "500"]
    statuses = json.loads(subprocess.run(flood, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    return ", ".join(f"{many} answered {status}" for status, many in sorted(statuses.items()))


def _send_bodies(target: Target, over: threading.Event) -> str:
    # Made once: what holds the driver up would look as if the gateway did.
    head, _, body = target.request(Asking(1_000, _words(3, 0) + "x" * _BODY, stream=False)).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
    sent = 0
    while not over.wait(0.5):
        connection = HTTPConnection("127.0.0.1", target.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        sent += answer.status == 200
    return f"with {sent} bodies in 15 s"


# Requests ------------------------------------------------------------------------------------------------------------


def requests(_options: argparse.Namespace) -> Iterator[Row]:
    """Ask for whole answers: one, sixteen, sixty-four at a time."""
    plan = Plan(request_seconds=5.0)
    with _both(64) as (direct, gateway), targets.passthrough(direct.port) as relay:
        for workers, p50, p99 in ((1, 1, 3), (16, None, 10), (64, None, 40)):
            theirs, bare, ours = (
                uvloop.run(measure.requests(target, workers, plan)) for target in (direct, relay, gateway)
            )
            added = ours.latency.p99 - theirs.latency.p50
            promise = f"<= {p50} / {p99} ms" if p50 else f"p99 <= {p99} ms"
            median = ours.latency.p50 - theirs.latency.p50
            kept = added <= p99 and (p50 is None or median <= p50) and not ours.errors
            bare_median, bare_added = (each - theirs.latency.p50 for each in (bare.latency.p50, bare.latency.p99))
            plain = f"pass-through: {bare_median:.2f} / {bare_added:.2f} ms"
            yield Row(f"added to a whole answer, c={workers}", promise, f"{median:.2f} / {added:.2f} ms", plain, kept)
            if workers == 64:
                rate = ours.per_second
                plain = f"{theirs.per_second:,.0f}/s; pass-through: {bare.per_second:,.0f}/s"
                yield Row("whole answers, c=64", ">= 800/s", f"{rate:,.0f}/s", plain, rate >= 800)


def replicas(_options: argparse.Namespace) -> Iterator[Row]:
    """Ask one gateway, then three, behind nginx as it is deployed, with PostgreSQL and Redis."""
    rates, refused = {}, 0
    with targets.upstream(_USERS) as direct:
        with targets.nginx(direct.port) as relay:
            bare = uvloop.run(measure.requests(relay, _USERS, Plan(request_seconds=6.0)))
        for count in (1, 3):
            with _company(direct.port, count) as front:
                uvloop.run(measure.warm_up(front, _USERS))
                sample = uvloop.run(measure.requests(front, _USERS, Plan(request_seconds=6.0)))
            rates[count] = sample.per_second
            refused += len(sample.errors)
    yield Row(
        "whole answers of 1 and of 3 gateways, which share these cores, with PostgreSQL, Redis and nginx as deployed, "
        f"each of {_USERS} users asking in a loop",
        "0 refused",
        f"{rates[1]:,.0f} and {rates[3]:,.0f}/s, {refused} refused",
        f"nginx alone: {bare.per_second:,.0f}/s",
        not refused,
    )


@contextmanager
def _company(upstream: int, count: int) -> Iterator[Target]:
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres(stack.enter_context(state_folder()), None))
        redis = stack.enter_context(RedisProcess())
        shared = {
            "LETTA_GATEWAY_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres?sslmode=disable",
            "LETTA_GATEWAY_REDIS_URL": redis.url,
            "SECRET_KEY": "bench-secret-of-thirty-two-letters",
            "LETTA_GATEWAY_API_KEYS": targets.keys_of_users(_USERS),
        }
        gateways = [stack.enter_context(targets.gateway(upstream, **shared)) for _ in range(count)]
        port, process = stack.enter_context(targets.balancer([gateway.port for gateway in gateways]))
        yield Target(f"{count} gateways", port, process, targets.ask_as_a_user)


GUESSES: Final = {
    "requests with keys that were made up": targets.guess_a_key,
    "requests with keys of the right shape": targets.guess_a_personal_key,
    "requests with forged access tokens": targets.forge_a_token,
}


def wrong_keys(_options: argparse.Namespace) -> Iterator[Row]:
    """Guess keys of each kind as fast as 64 connections can."""
    with _both(64, LETTA_GATEWAY_RATE_LIMIT="1000000/second") as (direct, gateway):
        with targets.passthrough(direct.port) as relay:
            bare, *_ = uvloop.run(_cost(relay, [relay.request(Asking(0, _words(3, 0), stream=False))] * _USERS, b"200"))
        for kind, guess in GUESSES.items():
            guesses = [guess(number) for number in range(_USERS)]
            each, rate, took, errors = uvloop.run(_cost(gateway, guesses, b"401"))
            yield Row(
                f"{kind}, 64 at a time: CPU of each",
                "< 1 ms",
                f"{each:.2f} ms ({rate:,.0f}/s, p99 {took.p99:.0f} ms)",
                f"pass-through, of a whole answer: {bare:.2f} ms",
                each < 1 and not errors,
            )


async def _cost(target: Target, requests: list[bytes], status: bytes) -> tuple[float, float, Quantiles, list[str]]:
    """Say what a request takes of the processor in milliseconds, how many come in a second, and when."""
    cpu = target.process.cpu_seconds()
    latencies, seconds, errors = await ask_in_a_loop(target.port, requests, 0, 5.0, status=b"HTTP/1.1 " + status)
    each = (target.process.cpu_seconds() - cpu) / len(latencies) * 1e3
    return each, len(latencies) / seconds, quantiles(latencies), errors


def overload(_options: argparse.Namespace) -> Iterator[Row]:
    """Offer three times what the gateway lets in, then what it can carry."""
    with _both(300, LETTA_GATEWAY_MAX_TURNS="25") as (_, gateway):
        peak, during, refusals, after = uvloop.run(_overload(gateway))
    good, others = during[200], during.total() - during[200] - during[503] - during[429]
    yield Row(
        "three times the turns that LETTA_GATEWAY_MAX_TURNS lets in: served, of what it serves at most",
        ">= 90 %",
        f"{good / 10 / peak:.0%} ({good / 10:.0f}/s), {others} other answers",
        "-",
        good / 10 >= 0.9 * peak and not others,
    )
    yield Row("the refusals among them, p99", "< 50 ms", f"{refusals.p99:.0f} ms", "-", refusals.p99 < 50)
    yield Row("served in the two seconds after", ">= 90 %", f"{after / peak:.0%}", "-", after >= 0.9 * peak)


async def _overload(target: Target) -> tuple[float, Counter[int], Quantiles, float]:
    def asking(number: int) -> bytes:
        return target.request(Asking(number, _words(5, 0.1), stream=False))

    await measure.warm_up(target, 64)
    latencies, seconds, _ = await ask_in_a_loop(target.port, [asking(number) for number in range(25)], 5, 6.0)
    peak = len(latencies) / seconds
    answers: list[tuple[int, float]] = []
    async with asyncio.TaskGroup() as group:
        due = time.monotonic()
        for number in range(round(10 * 3 * peak)):
            group.create_task(_once(target.port, asking(number % 300), answers))
            due += 1 / (3 * peak)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    refused = [seconds for status, seconds in answers if status in (429, 503)]
    after, seconds, _ = await ask_in_a_loop(target.port, [asking(number) for number in range(25)], 5, 2.0)
    return peak, Counter(status for status, _ in answers), quantiles(refused), len(after) / seconds


async def _once(port: int, request: bytes, answers: list[tuple[int, float]]) -> None:
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    answer = await reader.read()
    answers.append((int(answer.split(b" ", 2)[1]), time.monotonic() - started))
    writer.close()


# Life ----------------------------------------------------------------------------------------------------------------


def starts(_options: argparse.Namespace) -> Iterator[Row]:
    """Start five times, and go when idle."""
    ready, ends, sizes = [], [], []
    with targets.upstream(1) as direct, targets.passthrough(direct.port) as relay:
        bare_size, bare_start = relay.process.rss() / _MIB, relay.process.seconds_to_ready
    for _ in range(5):
        with suppress(DiedError), _both(1) as (_, gateway):
            ready.append(gateway.process.seconds_to_ready)
            sizes.append(gateway.process.rss() / _MIB)
            began = time.monotonic()
            _end(gateway.process.pid)
            ends.append(time.monotonic() - began)
    start, end, size = (statistics.median(each) for each in (ready, ends, sizes))
    yield Row("base memory", "<= 120 MiB", f"{size:.0f} MiB", f"pass-through: {bare_size:.0f} MiB", size <= 120)
    bare = f"pass-through: ready in {bare_start:.2f} s"
    yield Row("start to ready / idle to gone", "< 2 / 1 s", f"{start:.2f} / {end:.2f} s", bare, start < 2 and end < 1)


def _end(pid: int) -> None:
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415

    process = psutil.Process(pid)
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def soak(options: argparse.Namespace) -> Iterator[Row]:
    """Have everything happen that clients do, and watch what the process keeps, and what it wrote down."""
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as home:
        with _both(50, LETTA_GATEWAY_HOME=home) as (_, gateway):
            uvloop.run(measure.warm_up(gateway, 50))
            began = time.time()
            samples, rounds = uvloop.run(_soak(gateway, options.soak))
        booked = _ledger(home, began)
    settled = samples[len(samples) // 3 :]
    slope = statistics.linear_regression([at for at, _, _ in settled], [rss for _, rss, _ in settled]).slope * 3_600
    files = [files for _, _, files in settled]
    lasting = f"{options.soak / 60:.0f} minutes of chats, one in ten cut and one wrong"
    yield Row(
        f"{lasting}: memory gained",
        "< 1 MiB/h",
        f"{slope / _MIB:+.2f} MiB/h after {rounds * 10:,} requests; files {min(files)} to {max(files)}",
        "-",
        slope < _MIB and max(files) - min(files) <= _FILES_MEANWHILE,
    )
    chats, tokens = rounds * _CHATS, rounds * _CHATS * (100 + _WORDS)
    complete, still_open = booked["complete"], booked["open"].turns
    yield Row(
        "the same: answers and tokens in the ledger",
        "exact",
        f"{complete.turns:,} of {chats:,}; {complete.tokens:,} of {tokens:,}; {still_open} turns left open",
        "-",
        complete == Booked(chats, tokens) and not still_open,
    )


class Booked(NamedTuple):
    """What the ledger holds of one kind of end."""

    turns: int = 0
    tokens: int = 0


def _ledger(home: str, since: float) -> defaultdict[str, Booked]:
    """Read what a gateway that has gone wrote down of the turns since that time."""
    query = (
        "SELECT status, count(*), sum(prompt_tokens + completion_tokens) FROM turns WHERE started_at >= ? "
        "GROUP BY status"
    )
    with closing(sqlite3.connect(f"file:{home}/gateway.db?mode=ro", uri=True)) as database:
        return defaultdict(Booked, {status: Booked(*sums) for status, *sums in database.execute(query, (since,))})


async def _soak(target: Target, seconds: float) -> tuple[list[tuple[float, int, int]], int]:
    dice, samples, rounds = random.Random(1), [], 0
    began = time.monotonic()
    while (at := time.monotonic() - began) < seconds:
        samples.append((at, target.process.rss(), _files(target.process.pid)))
        until = time.monotonic() + 5
        while time.monotonic() < until:
            await _mixture(target, dice)
            rounds += 1
    return samples, rounds


async def _mixture(target: Target, dice: random.Random) -> None:
    """Have eight chats answered, one cut, and one wrong."""
    *agents, left = dice.sample(range(50), _CHATS + 1)
    chats = [target.request(Asking(number, _words(_WORDS, 0.02), stream=number % 2 == 0)) for number in agents]
    cut = target.request(Asking(left, _words(500, 0.02)))
    wrong = targets.guess_a_key(dice.randrange(1_000_000))
    answers: list[tuple[int, float]] = []
    async with asyncio.TaskGroup() as group:
        for each in (*chats, wrong):
            group.create_task(_once(target.port, each, answers))
        group.create_task(_cut(target.port, cut))
    if Counter(status for status, _ in answers) != {200: _CHATS, 401: 1}:
        raise AssertionError(answers)


async def _cut(port: int, request: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await reader.read(2_000)
    writer.transport.abort()


def _files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# -------------------------------------------------------------------------------------------------------------------


@contextmanager
def _both(agents: int, **settings: str) -> Iterator[tuple[Target, Target]]:
    with targets.upstream(agents) as direct, targets.gateway(direct.port, **settings) as gateway:
        yield direct, gateway


def _each(sample: HeldSample) -> float:
    return (sample.held_rss - sample.base_rss) / sample.streams / _KIB


def _words(events: int, interval: float) -> str:
    return f"load {next(_serial)}: events={events} interval={interval:.6f} "


LOADS: Final[Sequence[Callable[[argparse.Namespace], Iterator[Row]]]] = (
    held,
    jitter,
    events,
    first_token,
    storm,
    head_of_line,
    requests,
    replicas,
    wrong_keys,
    overload,
    starts,
    soak,
)


def main() -> None:
    """Carry what is asked for; the exit status tells whether all was kept."""
    names = [load.__name__ for load in LOADS]
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loads", description=__doc__)
    parser.add_argument("--only", action="append", choices=names)
    parser.add_argument("--hold", type=float, default=60.0)
    parser.add_argument("--soak", type=float, default=600.0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    raise_file_limit()
    print(f"Measured on {hardware()}; the driver, the upstream and the gateway share these cores.\n", flush=True)
    print("| load | promised | through the gateway | direct | kept |\n| --- | --- | --- | --- | --- |", flush=True)
    kept = True
    for load in LOADS:
        if load.__name__ in (options.only or names):
            for row in load(options):
                kept &= row.kept
                cells = (row.load, row.promised, row.gateway, row.direct, "yes" if row.kept else "**no**")
                print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
