"""Begins a turn and dies in it, as by `kill -9`.

`python -m tests.live.dying_turn KIND URL AGENT CONVERSATION MARK TEXT MOMENT`

MOMENT is `opened`, the number of the batch after which it dies, or `parked`. CONVERSATION is `-` for the own thread.
"""

import asyncio
import os
import signal
import sys

import msgspec

from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import AgentBackend, always_ready
from gateway.letta.rest import RestBackend, RestConfig
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Batch, Stop
from gateway.translation.agent_turn import AgentTurn, ClientTool, Text, UserSaid

SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}')
WEATHER = ClientTool("get_weather", "The weather.", SCHEMA)


def backend_of(kind: str, url: str, tasks: TaskSet) -> AgentBackend:
    """Return a backend for a server of either kind."""
    if kind == "v1":
        return RestBackend(RestConfig(url), Metrics(), tasks)
    return AppServerBackend(AppServerConfig(url), Metrics(), tasks)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def _begin(backend: AgentBackend, turn: AgentTurn, moment: str) -> None:
    running = backend.turn(turn)
    await running.open()
    if moment == "opened":
        _die()
    taken = 0

    def take(batch: Batch) -> bool:
        nonlocal taken
        taken += 1
        if moment == str(taken) or (moment == "parked" and Stop("requires_approval") in batch):
            _die()
        return True

    await running.deliver(take, always_ready)


def main() -> None:
    """Take the arguments."""
    kind, url, agent_id, conversation, mark, text, moment = sys.argv[1:]
    turn = AgentTurn(
        agent_id=agent_id,
        conversation_id=None if conversation == "-" else conversation,
        mark=mark,
        news=(UserSaid((Text(text),)),),
        tools=(WEATHER,) if "call" in text else (),
    )

    async def begin() -> None:
        await _begin(backend_of(kind, url, TaskSet()), turn, moment)

    asyncio.run(begin())
    sys.exit("the turn ended before that moment")


if __name__ == "__main__":
    main()
