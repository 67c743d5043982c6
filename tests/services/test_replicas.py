"""Three gateway processes, nginx, Redis, PostgreSQL and one Letta: what is said is heard once, whoever dies."""

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import openai
import pytest
import pytest_asyncio

from gateway.letta.demo_model import Recorder
from tests.live.app_server import AppServer, running_app_server
from tests.live.gateways import sdk
from tests.live.letta_server import Agent
from tests.live.model_thread import demo_model_in_thread
from tests.live.postgres import Postgres
from tests.live.test_chats import TOOLS, ask, message_of, result, said, text_of, user
from tests.services.nginx import Nginx, nginx
from tests.services.replicas import API_KEY, Company, company
from tests.services.replicas_chats import Chat, Record, Refused, folded
from tests.services.replicas_heard import asked_of, heard_by
from tests.shared_state.redis_process import RedisProcess
from tests.storage.databases import postgres

__all__ = ["postgres"]  # a fixture that is asked for by name

pytestmark = [pytest.mark.services, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(2_700)]

CHATS: Final = int(os.environ.get("CHATS", "500"))
"""They take five minutes on two cores that have nothing else to do, and were seen to take thirteen. CHATS=50 is a quick
look."""
AT_ONCE: Final = 20
TURNS: Final = "select coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) from turns"
USAGE: Final = "select coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) from usage_metrics"
FAILOVER: Final = 20.0
"""Seconds until a chat goes on whose gateway was killed: a lease lasts ten."""
BREAK: Final = 300.0 + 3.0 * CHATS
"""Seconds for the chats to come so far that something is broken."""
REMEMBERED: Final = 1_000 + 20 * CHATS
"""Requests that the model remembers."""
RECONCILED: Final = 180.0
"""Seconds until another gateway has settled what a dead one left: it is taken for dead after 90, and looked for every
30."""
CUT: Final = {
    "409 outcome_unknown",
    "502 gateway_failed",
    "APIConnectionError",
    "ConnectionError",
    "in-band conversation_lost",
}
"""What a client may be told of a message that was on its way when a gateway ended."""
DRAINED: Final = {*CUT, "503 shutting_down", "in-band shutting_down"}
"""What it may be told when the time of a gateway that was asked to go is up."""
NO_REDIS: Final = {"503 shared_state_unavailable", "in-band shared_state_unavailable"}
"""What it may be told where Redis was too slow: a machine that is busy with all this may let it wait."""


@pytest.fixture(scope="module")
def letta() -> Iterator[AppServer]:
    with demo_model_in_thread(recorder=Recorder(REMEMBERED)) as model, running_app_server(model) as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisProcess]:
    with RedisProcess() as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(letta: AppServer, postgres: Postgres, redis: RedisProcess) -> AsyncIterator[Company]:
    async with company(letta, postgres, redis) as running:
        yield running


@pytest.fixture
def agent(letta: AppServer) -> Agent:
    return letta.create_agent()


@contextlib.asynccontextmanager
async def clients(three: Company) -> AsyncIterator[list[openai.AsyncOpenAI]]:
    """Give a client of each replica."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(sdk(replica.gateway, API_KEY)) for replica in three.replicas]


async def seen(so: Callable[[], Any], within: float) -> None:
    async with asyncio.timeout(within):
        while not so():  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.02)


# Without faults ------------------------------------------------------------------------------------------------------


async def test_one_turn_at_a_time_on_a_thread(three: Company, agent: Agent) -> None:
    words = [f"w{number}t0" for number in range(6)]
    async with clients(three) as each:
        answers = await asyncio.gather(
            *(ask(each[n % 3], agent, user(f"{word} count, please")) for n, word in enumerate(words))
        )
    assert [text_of(answer) for answer in answers] == [f"You said: {word} count, please" for word in words]
    heard = heard_by(three.letta)
    (thread,) = [messages for messages in heard.conversations if any(words[0] in text for _, text in messages)]
    assert [role for role, _ in thread] == ["user", "assistant"] * len(words)
    for (_, question), (_, answer) in zip(thread[::2], thread[1::2], strict=True):
        assert answer == f"You said: {question}"
    assert {word: heard.messages[word] for word in words} == dict.fromkeys(words, 1)


async def test_same_key_at_all_at_once(three: Company, agent: Agent) -> None:
    headers = {"Idempotency-Key": "pay", "X-Letta-Chat-Key": "paying"}
    async with clients(three) as each:
        answers = await asyncio.gather(
            *(ask(client, agent, user("w0k0 pay the bill"), extra_headers=headers) for client in each)
        )
    assert len({answer.id for answer in answers}) == 1
    assert text_of(answers[0]) == "You said: w0k0 pay the bill"
    assert (heard_by(three.letta).messages["w0k0"], asked_of(three.letta.model)["w0k0"]) == (1, 1)


async def test_rate_limit_is_one_for_all(letta: AppServer, postgres: Postgres) -> None:
    with RedisProcess() as redis:
        async with company(letta, postgres, redis, LETTA_GATEWAY_RATE_LIMIT="100/minute") as limited:
            key = {"Authorization": f"Bearer {API_KEY}"}
            statuses: Counter[int] = Counter()
            for _ in range(5):
                answers = await asyncio.gather(
                    *(replica.gateway.ask("GET", "/v1/models", key) for replica in limited.replicas for _ in range(10))
                )
                statuses.update(answer.status for answer in answers)
    assert statuses == {200: 100, 429: 50}


# With faults ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def anywhere(folder: Path, ports: list[int]) -> AsyncIterator[Nginx]:
    """Run nginx with the very site file, but let it choose a gateway by chance: a chat goes to another each time."""
    servers = "".join(f" server 127.0.0.1:{port} max_fails=3 fail_timeout=1s;" for port in ports)
    async with nginx(folder, *ports, gateways=f"random;{servers}") as running:
        yield running


@contextlib.asynccontextmanager
async def client_of(running: Nginx) -> AsyncIterator[openai.AsyncOpenAI]:
    """Give the SDK as it is by default: two retries."""
    running.tls.check_hostname = False  # it is asked by its address
    async with openai.DefaultAsyncHttpxClient(verify=running.tls, timeout=120.0) as http:
        url = f"https://127.0.0.1:{running.port}/v1"
        yield openai.AsyncOpenAI(base_url=url, api_key=API_KEY, http_client=http)


async def failover(three: Company, client: openai.AsyncOpenAI, agent: Agent, name: str) -> tuple[float, float]:
    """Kill a replica in mid-answer; return when, and the seconds until its chat has the next answer."""
    chat = {"X-Letta-Chat-Key": name}
    question = user("count to 200 every 50 ms")
    async with sdk(three.replicas[0].gateway, API_KEY) as direct:
        pieces = await direct.chat.completions.create(
            model=agent.name, messages=[question], extra_headers=chat, stream=True
        )
        await anext(aiter(pieces))
        killed_at = time.monotonic()
        await three.replicas[0].kill()
        with pytest.raises((openai.APIError, ConnectionError)):
            await folded(pieces)
    answer = await ask(client, agent, question, said("word0"), user("are you there?"), extra_headers=chat)
    assert text_of(answer) == "You said: are you there?"
    return killed_at, time.monotonic() - killed_at


async def test_chat_goes_on_whose_gateway_was_killed(three: Company, agent: Agent, tmp_path: Path) -> None:
    async with anywhere(tmp_path, three.ports) as running, client_of(running) as client:
        _, seconds = await failover(three, client, agent, "watched alone")
        await three.replicas[0].start()
    sys.stdout.write(f"\nfailover {seconds:.1f} s\n")
    assert seconds < FAILOVER


async def bring(client: openai.AsyncOpenAI, agent: Agent, chat: str, asked: Any) -> str:
    """Bring a tool's result, and return what the agent says to it."""
    (call,) = asked["tool_calls"]
    messages = (user("call get_weather now"), asked, result(call["id"], "18 degrees"))
    return text_of(await ask(client, agent, *messages, tools=TOOLS, extra_headers={"X-Letta-Chat-Key": chat}))


async def calls(client: openai.AsyncOpenAI, agent: Agent, chat: str) -> Any:
    """Have the agent call a tool; return its message."""
    headers = {"X-Letta-Chat-Key": chat}
    return message_of(await ask(client, agent, user("call get_weather now"), tools=TOOLS, extra_headers=headers))


async def test_results_come_to_a_turn_that_waits_though_redis_was_flushed(
    three: Company, agent: Agent, redis: RedisProcess
) -> None:
    async with clients(three) as (one, other, _):
        asked = await calls(one, agent, "flushed")
        with redis.client() as client:
            client.flushall()
        assert await bring(other, agent, "flushed", asked) == "Tool said: 18 degrees"


async def test_results_come_to_a_turn_that_waits_in_a_gateway_that_goes(three: Company, agent: Agent) -> None:
    async with clients(three) as (one, other, _):
        asked = await calls(one, agent, "going")
        going = three.replicas[0]
        draining = asyncio.get_running_loop().create_task(going.drain())
        await going.gateway.says('"draining"')
        await asyncio.sleep(2.0)
        assert not draining.done()
        assert await bring(other, agent, "going", asked) == "Tool said: 18 degrees"
        assert await draining == 0
        await going.start()


class Faults(msgspec.Struct):
    """When a replica was killed and another one drained, by the monotonic clock; ``failover`` is in seconds."""

    killed_at: float = 0.0
    failover: float = 0.0
    drained_from: float = 0.0
    drained_until: float = 0.0

    def explain(self, refused: Refused) -> str:
        """Name what a message was refused for; empty where nothing had happened."""
        if refused.code in CUT and refused.since < self.killed_at <= refused.at:
            return "kill"
        if refused.code in DRAINED and self.drained_from < refused.at < self.drained_until + 1:
            return "drain"
        return "redis" if refused.code in NO_REDIS else ""


async def break_things(three: Company, client: openai.AsyncOpenAI, agent: Agent, record: Record) -> Faults:
    """Kill one replica and start it again, then drain another one and start that again, while the chats go on."""
    killed, drained = three.replicas[:2]
    faults = Faults()
    await seen(lambda: len(record.answered) >= CHATS // 2, BREAK)
    faults.killed_at, faults.failover = await failover(three, client, agent, "watched in the crowd")
    await killed.start()
    await seen(lambda: len(record.answered) >= CHATS, BREAK)
    faults.drained_from = time.monotonic()
    assert await drained.drain() == 0
    faults.drained_until = time.monotonic()
    await drained.start()
    return faults


async def test_chats_at_random_replicas_of_which_one_is_killed_and_one_drained(
    three: Company, agent: Agent, tmp_path: Path
) -> None:
    record, gate = Record(), asyncio.Semaphore(AT_ONCE)
    taken_before, spent_before, began = heard_by(three.letta).tokens, await ledger(three), time.monotonic()
    async with anywhere(tmp_path, three.ports) as running, client_of(running) as client:

        async def one(number: int) -> None:
            async with gate:
                await Chat(client, agent.name, number, record).run()

        async with asyncio.TaskGroup() as group:
            for number in range(CHATS):
                group.create_task(one(number))
            breaking = group.create_task(break_things(three, client, agent, record))
        faults = breaking.result()
        statuses = Counter(str(line["gateway_status"]).rpartition(", ")[2] for line in running.requests)
    took = time.monotonic() - began
    settled = await settle(three)
    heard, asked = heard_by(three.letta), asked_of(three.letta.model)
    taken = [after - before for after, before in zip(heard.tokens, taken_before, strict=True)]
    spent = [after - before for after, before in zip(await ledger(three), spent_before, strict=True)]
    sys.stdout.write(
        f"\n{CHATS} chats at {len(three.replicas)} replicas: {len(record.answered)} messages answered in {took:.0f} s; "
        f"failover {faults.failover:.1f} s, slowest answer {record.slowest:.1f} s, drain "
        f"{faults.drained_until - faults.drained_from:.1f} s; told to clients {dict(record.codes)}; last statuses of "
        f"gateways {dict(statuses)}; tokens in the ledger {spent}, at Letta {taken}; open turns for {settled:.0f} s\n"
    )
    assert len(record.answered) == 3 * CHATS
    assert {word: heard.messages[word] for word in record.answered if heard.messages[word] != 1} == {}
    assert len(three.letta.model.requests) < REMEMBERED, "the model forgets what it was asked first"
    assert {word: asked[word] for word in record.answered if asked[word] != 1} == {}
    assert {refused.word for refused in record.refused if heard.messages[refused.word] > 1} == set()
    assert [refused for refused in record.refused if not faults.explain(refused)] == []
    reasons = Counter(map(faults.explain, record.refused))
    assert max(reasons["kill"], reasons["drain"]) <= AT_ONCE, "no more than were on their way"
    assert not reasons["redis"] or any("redis unavailable" in replica.log for replica in three.replicas)
    assert faults.failover < FAILOVER + record.slowest, "it waits for Letta as long as all others"
    assert spent == taken


async def settle(three: Company) -> float:
    """Wait until no turn is open in the ledger; return the seconds."""
    began = time.monotonic()
    async with asyncio.timeout(RECONCILED):
        while await three.read("select 1 from turns where status = 'running' limit 1"):  # noqa: ASYNC110
            await asyncio.sleep(1.0)
    return time.monotonic() - began


async def ledger(three: Company) -> tuple[int, int]:
    """Return the prompt and completion tokens of all turns, as both tables have them."""
    turns, usage = [await three.read(sql) for sql in (TURNS, USAGE)]
    assert turns == usage
    prompt, completion = turns[0]
    return int(prompt), int(completion)


# Without a key: last, as what is left in the ledger is settled by another gateway minutes later -----------------------


@contextlib.asynccontextmanager
async def service(ports: list[int]) -> AsyncIterator[str]:
    """Hand connections on to the first gateway that takes them, as what knows no HTTP does: Kubernetes' Services."""

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                target.write(data)
                await target.drain()
        target.close()

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for port in ports:
            with contextlib.suppress(ConnectionError):
                there, back = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(copy(reader, back), copy(there, writer))
                return

    server = await asyncio.start_server(hand_on, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def test_message_whose_gateway_was_killed_is_not_said_again_by_the_sdk(three: Company, agent: Agent) -> None:
    """By the SDK as it is: two tries more, and no key."""
    killed, question = three.replicas[0], user("w0q0 count to 100 every 50 ms")
    async with service(three.ports) as url, openai.AsyncOpenAI(base_url=url, api_key=API_KEY) as client:
        asking = asyncio.get_running_loop().create_task(ask(client, agent, question))
        await seen(lambda: asked_of(three.letta.model)["w0q0"], 10)
        await killed.kill()
        with pytest.raises(openai.ConflictError) as refused:
            await asking
    await killed.start()
    assert refused.value.code == "outcome_unknown"
    assert (heard_by(three.letta).messages["w0q0"], asked_of(three.letta.model)["w0q0"]) == (1, 1)
