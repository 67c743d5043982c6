import datetime as dt
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest

from gateway.errors import UpstreamTimeout, UpstreamUnavailable
from gateway.letta import rest_runs
from gateway.letta.backend import SentTurn
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_runs import AFTER, BEFORE, PAGE, Runs
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from tests.letta.recording_server import AGENT, CONVERSATION, Answer, Exchange, RecordingServer, status

NOW = 1_795_219_200.0
SENT = SentTurn("mark-1", AGENT, None, NOW)
GONE = status(404, {"detail": "gone"})


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def backend(server: RecordingServer) -> AsyncIterator[RestBackend]:
    backend = RestBackend(RestConfig(server.url), Metrics(), TaskSet())
    yield backend
    await backend.close()


@pytest.fixture
def runs(backend: RestBackend, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setattr(rest_runs, "SETTLE", 0.2)
    monkeypatch.setattr(rest_runs, "LOOK", 0.01)
    return backend.runs


def run(run_id: str, state: str = "completed", after: float = 1.0, conversation: str | None = None) -> dict[str, Any]:
    created = dt.datetime.fromtimestamp(NOW + after, dt.UTC).isoformat()
    return {"id": run_id, "status": state, "created_at": created, "conversation_id": conversation}


def step(number: int, prompt: int, completion: int, mark: str | None = None, **fields: Any) -> dict[str, Any]:
    made = {"id": f"step-{number}", "status": "success", "request_id": mark, **fields}
    return {**made, "prompt_tokens": prompt, "completion_tokens": completion}


def by_run(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Answer:
    """Answer with what there is of the run that is asked for."""

    async def answer(exchange: Exchange) -> None:
        await status(200, of.get(exchange.request.path.split("/")[-2], []))(exchange)

    return answer


def names(server: RecordingServer, kind: Any, place: int) -> list[str]:
    return [request.path.split("/")[place] for request in server.asked(kind)]


# A run that is known --------------------------------------------------------------------------------------------------


async def test_steps_of_a_run_add_up(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1")))
    second = step(2, 30, 4, cached_input_tokens=20, reasoning_tokens=3)
    server.on("steps", status(200, [step(1, 10, 2), second]))
    assert await runs.usage("run-1") == Usage(40, 6, 20, 3)


async def test_steps_of_several_pages(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1")))
    server.on("steps", status(200, [step(n, 1, 1) for n in range(PAGE)]), status(200, [step(PAGE, 5, 5)]))
    assert await runs.usage("run-1") == Usage(PAGE + 5, PAGE + 5)
    assert server.asked("steps")[1].query["after"] == f"step-{PAGE - 1}"


async def test_cursor_that_starts_from_the_top_counts_no_step_twice(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1")))
    server.on("steps", status(200, [step(n, 1, 1) for n in range(PAGE)]))
    assert await runs.usage("run-1") == Usage(PAGE, PAGE)


async def test_step_that_was_cut_off_has_no_numbers(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1", "cancelled")))
    cut_off = {"id": "step-2", "status": "pending", "prompt_tokens": None, "completion_tokens": None}
    server.on("steps", status(200, [step(1, 10, 2), cut_off]))
    assert await runs.usage("run-1") == Usage(10, 2)


async def test_run_that_is_just_coming_to_its_end(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1", "running")), status(200, run("run-1", "failed")))
    server.on("steps", status(200, [step(1, 10, 2)]))
    assert await runs.usage("run-1") == Usage(10, 2)


async def test_run_that_goes_on(server: RecordingServer, runs: Runs) -> None:
    server.on("run", status(200, run("run-1", "running")))
    with pytest.raises(UpstreamTimeout):
        await runs.usage("run-1")
    assert server.asked("steps") == server.asked("cancel") == []


async def test_run_that_went_with_its_agent(runs: Runs) -> None:
    assert await runs.usage("run-1") is None


async def test_server_that_is_down_says_nothing_of_a_run(server: RecordingServer, runs: Runs) -> None:
    await server.stop()
    with pytest.raises(UpstreamUnavailable):
        await runs.usage("run-1")


# A run that a turn began ----------------------------------------------------------------------------------------------


async def test_run_is_found_by_the_mark_of_its_steps(server: RecordingServer, backend: RestBackend, runs: Runs) -> None:
    server.on("runs", status(200, [run("run-3", after=9), run("run-2", after=4), run("run-1", after=-5)]))
    marked = [step(2, 10, 2, "mark-1"), step(3, 20, 3, "mark-1")]
    server.on("steps", by_run({"run-3": [step(1, 1, 1, "mark-0")], "run-2": marked, "run-1": [step(4, 7, 7)]}))
    assert await runs.spent(SENT) == Usage(30, 5)
    assert await backend.spent(SENT) == Usage(30, 5)
    query = server.asked("runs")[0].query
    assert query == {"agent_id": AGENT, "limit": str(PAGE), "order": "desc"}
    assert names(server, "steps", -2)[:2] == ["run-2", "run-2"], "the nearest in time is looked at first"
    assert server.asked("cancel") == server.asked("messages of a run") == []


async def test_run_is_found_by_the_name_of_its_message(server: RecordingServer, runs: Runs) -> None:
    server.on("runs", status(200, [run("run-2"), run("run-1")]))
    server.on("steps", by_run({"run-1": [step(1, 10, 2, "log-1")], "run-2": [step(2, 1, 1, "log-2")]}))
    messages: dict[str, list[dict[str, Any]]] = {
        "run-1": [{"otid": None}, {"otid": "mark-1.2"}],
        "run-2": [{"otid": "mark-10.1"}],
    }
    server.on("messages of a run", by_run(messages))
    assert await runs.spent(SENT) == Usage(10, 2)


@pytest.mark.parametrize(
    ("thread", "others"),
    [(None, CONVERSATION), (CONVERSATION, "conv-other")],
)
async def test_runs_of_other_threads_are_not_looked_at(
    server: RecordingServer, runs: Runs, thread: str | None, others: str
) -> None:
    own = run("run-1", conversation=thread)
    server.on("runs", status(200, [run("run-2", conversation=others), own]))
    server.on("steps", by_run({"run-1": [step(1, 10, 2, "mark-1")]}))
    assert await runs.spent(SentTurn("mark-1", AGENT, thread, NOW)) == Usage(10, 2)
    assert set(names(server, "steps", -2)) == {"run-1"}
    assert server.asked("runs")[0].query.get("conversation_id") == thread


@pytest.mark.parametrize("after", [-BEFORE - 5, AFTER + 5])
async def test_runs_of_other_times_are_not_looked_at(server: RecordingServer, runs: Runs, after: float) -> None:
    server.on("runs", status(200, [run("run-1", after=after)]))
    assert await runs.spent(SENT) is None
    assert server.asked("steps") == []


async def test_pages_of_runs_are_turned_until_the_turns_time(server: RecordingServer, runs: Runs) -> None:
    late = [run(f"run-{number}", after=AFTER + 9) for number in range(PAGE)]
    early = [run("run-a"), *(run(f"run-b{number}", after=-BEFORE - 9) for number in range(PAGE - 1))]
    server.on("runs", status(200, late), status(200, early))
    server.on("steps", by_run({"run-a": [step(1, 10, 2, "mark-1")]}))
    assert await runs.spent(SENT) == Usage(10, 2)
    assert [request.query.get("after") for request in server.asked("runs")] == [None, f"run-{PAGE - 1}"]


async def test_run_that_goes_on_is_stopped_and_seen_to_its_end(server: RecordingServer, runs: Runs) -> None:
    server.on("runs", status(200, [run("run-1", "running")]))
    pending = step(2, 0, 0, "mark-1", status="pending")
    server.on(
        "steps",
        status(200, [step(1, 10, 2, "mark-1"), pending]),
        status(200, [step(1, 10, 2, "mark-1"), pending]),
        status(200, [step(1, 10, 2, "mark-1"), step(2, 5, 1, "mark-1")]),
    )
    assert await runs.spent(SENT) == Usage(15, 3)
    (cancel,) = server.asked("cancel")
    assert cancel.json() == {"run_ids": ["run-1"]}


async def test_stopped_step_that_never_comes_to_an_end(server: RecordingServer, runs: Runs) -> None:
    server.on("runs", status(200, [run("run-1", "running")]))
    server.on("steps", status(200, [step(1, 10, 2, "mark-1"), step(2, 0, 0, "mark-1", status="pending")]))
    assert await runs.spent(SENT) == Usage(10, 2)


async def test_turn_that_began_no_run(server: RecordingServer, runs: Runs) -> None:
    assert await runs.spent(SENT) is None
    server.on("runs", status(200, [run("run-1")]))
    assert await runs.spent(SENT) is None
    server.on("runs", GONE)
    assert await runs.spent(SENT) is None


@pytest.mark.parametrize("kind", ["runs", "steps"])
async def test_server_that_cannot_say_now(server: RecordingServer, runs: Runs, kind: Any) -> None:
    ask: Callable[[SentTurn], Any] = runs.spent
    server.on("runs", status(200, [run("run-1")]))
    server.on(kind, status(503))
    with pytest.raises(UpstreamUnavailable):
        await ask(SENT)
