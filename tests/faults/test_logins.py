"""S7: a crowd that logs in does not stop a chat, nor fill the memory."""

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults.chaos_upstream import BEGIN, END, BadLetta, Exchange, Step, envelope
from tests.server.running import chat_request
from tests.server.subprocesses import GatewayProcess, gateway_process

ROOT = Path(__file__).parents[2]
CROWD = 500
WORDS = 500
EVERY = 0.005
"""Seconds between two words of the agent's."""
MIB = 1_048_576
ROUNDS = 3
JITTER = 0.02
"""Seconds that a word may be late at p99 in any case: what is promised of many streams; a busy machine has as much."""


@pytest.mark.services
@pytest.mark.timeout(240)
async def test_five_hundred_logins_at_once_beside_a_chat(letta: BadLetta) -> None:
    """One in a hundred of an answer's words is late by no more than twice what it is when all is quiet."""
    # Logins come from other addresses of this machine, which count as one each.
    environment = {"LETTA_GATEWAY_API_KEYS": "sk-one", "PYTHONPATH": str(ROOT)}
    async with gateway_process(letta.url, env=environment) as gateway:
        process = psutil.Process(gateway.process.pid)
        quiet, probes, logins, grown = list[float](), list[float](), list[float](), 0
        for _ in range(ROUNDS):
            quiet.append(p99(await late_words(letta, gateway)))
            late, answers = await beside(letta, gateway, "probes")
            assert answers == {"200": CROWD}
            probes.append(p99(late))
            before = process.memory_info().rss
            late, answers = await beside(letta, gateway, "logins")
            logins.append(p99(late))
            grown = max(grown, process.memory_info().rss - before)
            assert set(answers) <= {"401", "429", "503"}
            assert sum(answers.values()) == CROWD
            assert answers["401"] >= 66 or answers["429"], "the threads were busy"
    told = {"quiet": quiet, "probes": probes, "logins": logins}
    print(
        {name: [f"{late * 1000:.1f} ms" for late in lates] for name, lates in told.items()}, f"+{grown / MIB:.0f} MiB"
    )
    assert grown < 512 * MIB
    for crowd in (probes, logins):
        assert statistics.median(crowd) < max(2 * statistics.median(quiet), JITTER)


async def beside(letta: BadLetta, gateway: GatewayProcess, kind: str) -> tuple[list[float], dict[str, int]]:
    """Let a crowd ask beside a chat; return how late the chat's words were, and what the crowd was answered."""
    flood = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.login_flood", str(gateway.port), kind, str(CROWD)),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert flood.stdout is not None
    assert await flood.stdout.readline() == b"begins\n"
    late = await late_words(letta, gateway)
    answers: dict[str, int] = json.loads(await flood.stdout.readline())
    assert await flood.wait() == 0
    return late, answers


async def late_words(letta: BadLetta, gateway: GatewayProcess) -> list[float]:
    """Return how long some words of the agent's take to a chat's client, in seconds."""
    sent: list[float] = []
    letta.plays(*BEGIN, tells_when(sent), *END)
    came: list[float] = []
    async with gateway.connect() as client:
        await client.send(chat_request(stream=True, headers={"Authorization": "Bearer sk-one"}))
        assert (await client.head()).status == 200
        async for piece in client.pieces():
            came += [time.perf_counter()] * piece.count(b'"content":"w"')
    assert len(came) == len(sent) == WORDS
    return [arrival - begin for begin, arrival in zip(sent, came, strict=True)]


def tells_when(sent: list[float]) -> Step:
    """Let the agent say a word now and then, and note when."""

    async def step(exchange: Exchange) -> None:
        for _ in range(WORDS):
            frame = envelope("assistant_message", exchange.run_id, id=exchange.message_id, content="w")
            sent.append(time.perf_counter())
            await exchange.frame(**frame)
            await asyncio.sleep(EVERY)

    return step


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]
