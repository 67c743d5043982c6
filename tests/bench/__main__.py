"""`python -m tests.bench`: starts everything, alternates the targets, prints the tables, writes the JSON."""

import argparse
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import msgspec
import uvloop

from tests.bench import measure, targets
from tests.bench.plan import QUICK, Plan
from tests.bench.processes import DiedError, NotReadyError, raise_file_limit
from tests.bench.report import hardware, markdown
from tests.bench.samples import Findings, StartSample
from tests.bench.targets import Target

RESULT = targets.CACHE / "bench" / "result.json"
_STARTERS = {
    "pass-through": targets.passthrough,
    "gateway": targets.gateway,
    "nginx": targets.nginx,
    "litellm": targets.litellm,
}
_SLOW = frozenset({"litellm"})
"""Cannot carry the crowds of these measurements."""
_SPARE_FILES = 300
_S = TypeVar("_S")


class Bench:
    """One run: its plan, who takes part, and what has been found so far."""

    def __init__(self, plan: Plan, names: list[str], open_files: int) -> None:
        self.plan = plan
        self.findings = Findings(hardware())
        self._names = names
        self._open_files = open_files

    def streaming(self) -> None:
        """Measure CPU and latency per event at a steady beat."""
        with self._started(self.plan.streams) as (upstream, others):
            for target in self._alternating([upstream, *others]):
                for streams, rate in self._loads(target):
                    _say(target, f"streaming, {streams} x {rate:g}/s")
                    sample = measure.streaming(target, upstream.process, self.plan, streams, rate)
                    self.findings.streaming.append(_run(sample))

    def ttft(self) -> None:
        """Measure the time to first token among live streams."""
        with self._started(measure.agents_needed(self.plan), without=_SLOW) as (upstream, others):
            for target in self._alternating([upstream, *others]):
                for streams, rate in self.plan.crowds:
                    _say(target, f"first token among {streams}")
                    self.findings.first_token.append(_run(measure.first_token(target, streams, rate, self.plan)))

    def held(self) -> None:
        """Hold many slow streams."""
        streams = min(self.plan.held, (self._open_files - _SPARE_FILES) // 2)
        if streams < self.plan.held:
            limit = f"the limit of {self._open_files} open files"
            self.findings.notes.append(f"Held {streams} instead of {self.plan.held} streams: {limit}.")
        with self._started(streams, without=_SLOW) as (_, others):
            for target in others:
                _say(target, f"{streams} streams held")
                self.findings.held.append(_run(measure.held(target, streams, self.plan)))

    def requests(self) -> None:
        """Measure non-streaming requests, one at a time and many."""
        with self._started(self.plan.workers) as (upstream, others):
            for target in self._alternating([upstream, *others]):
                for workers in (1, self.plan.workers):
                    _say(target, f"requests, c={workers}")
                    self.findings.requests.append(_run(measure.requests(target, workers, self.plan)))

    def _loads(self, target: Target) -> list[tuple[int, float]]:
        """LiteLLM gets a load that it sustains, and whoever it is compared with gets that one too."""
        full = (self.plan.streams, self.plan.rate)
        small = (self.plan.litellm_streams, self.plan.litellm_rate)
        if target.name == "litellm":
            return [small]
        return [full, small] if "litellm" in self._names and target.name != "nginx" else [full]

    def _alternating(self, of: list[Target]) -> Iterator[Target]:
        for _ in range(self.plan.repeats):
            yield from of

    @contextmanager
    def _started(self, agents: int, *, without: frozenset[str] = frozenset()) -> Iterator[tuple[Target, list[Target]]]:
        """Start the upstream and all who take part, afresh; who does not come up is noted and left out."""
        with ExitStack() as stack:
            upstream = stack.enter_context(targets.upstream(agents))
            others = []
            for name in [name for name in self._names if name not in without]:
                try:
                    target = stack.enter_context(_STARTERS[name](upstream.port))
                except (NotReadyError, OSError, subprocess.CalledProcessError) as error:
                    self._leave_out(name, str(error))
                    continue
                others.append(target)
            for target in tuple(others):
                if faults := _run(measure.warm_up(target, agents)):
                    self._leave_out(target.name, faults[0])
                    others.remove(target)
                    continue
                start = StartSample(target.name, target.process.seconds_to_ready, target.process.rss())
                self.findings.starts.append(start)
            yield upstream, others

    def _leave_out(self, name: str, reason: str) -> None:
        self._names.remove(name)
        self.findings.unmeasured.append(f"{name}: {reason}")


def _run(measurement: Coroutine[None, None, _S]) -> _S:
    """Run one measurement in a loop of its own, with the collector quiet."""
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(measurement)
    finally:
        gc.enable()


def _say(target: Target, what: str) -> None:
    print(f"  {target.name}: {what}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    kinds = ("streaming", "ttft", "held", "requests")
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--only", action="append", choices=kinds, help="measure just this; may be repeated")
    parser.add_argument("--targets", help="comma-separated, of pass-through, gateway, nginx, litellm")
    parser.add_argument("--peers", action="store_true", default=os.environ.get("PEERS") == "1", help="or PEERS=1")
    for name in ("repeats", "streams", "held"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("rate", "window", "hold"):
        parser.add_argument(f"--{name}", type=float)
    options = parser.parse_args()
    options.only = options.only or kinds
    default = "pass-through,gateway,nginx,litellm" if options.peers else "pass-through,gateway"
    options.targets = (options.targets or default).split(",")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    sizes = ("repeats", "streams", "held", "rate", "window", "hold")
    asked = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    return msgspec.structs.replace(QUICK if options.quick else Plan(), **asked)


def _stop(*_: object) -> None:
    """Turn a SIGTERM into an exit that ends the children on its way out."""
    sys.exit("stopped")


def main() -> None:
    """Measure what is asked for; the exit status tells whether every stream and request was answered."""
    signal.signal(signal.SIGTERM, _stop)
    options = _options()
    bench = Bench(_plan(options), options.targets, raise_file_limit())
    try:
        for kind in options.only:
            getattr(bench, kind)()
    except DiedError as error:
        sys.exit(str(error))
    print(markdown(bench.findings, bench.plan))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_bytes(msgspec.json.format(msgspec.json.encode(bench.findings)) + b"\n")
    sys.exit(1 if bench.findings.errors() or bench.findings.unmeasured else 0)


if __name__ == "__main__":
    main()
