from typing import Any, Final

import msgspec
import pytest
from sqlalchemy import insert

from gateway.accounts import export as module
from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.billing.local import LocalBilling
from gateway.accounts.export import Export
from gateway.accounts.history import Ended, History, new_exchange
from gateway.accounts.instances import Instances
from gateway.accounts.own_agents import OwnAgents
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.secrets import Secrets
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.accounts.usage import UsageReports
from gateway.accounts.user_keys import UserKeys
from gateway.errors import UpstreamUnavailable
from gateway.letta.backend import Agent, MemoryBlock
from gateway.letta.scripted import ScriptedBackend
from gateway.storage.engine import Database
from gateway.storage.tables import responses, turns
from gateway.tasks import TaskSet

ANN: Final = Profile(
    id="ann", email="ann@example.com", name="Ann", letta_agent_id="agent-1", created_at=1.0, updated_at=1.0
)
BEN: Final = Profile(id="ben", email="ben@example.com", created_at=1.0, updated_at=1.0)


class World:
    """A database, a Letta with Ann's agent, and what reads them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.backend = ScriptedBackend([Agent("agent-1", "Ann's", 1)])
        self.backend.memories["agent-1"] = {"human": MemoryBlock("human", "Likes tea.")}
        self.history = History(database, Instances(database, "gateway-1"))
        self.keys = UserKeys(database, Secrets.from_key("a secret of the tests, 32 characters"))
        profiles = Profiles(database)
        agents = PersonalAgents(
            backend=self.backend,
            profiles=profiles,
            billing=LocalBilling({}),
            database=database,
            config=AgentConfig(),
            stopping=Stopping(database, NoTurns),
            tasks=TaskSet(),
        )
        self.export = Export(
            database,
            self.backend,
            own_agents=OwnAgents(profiles, agents, self.backend, 30.0),
            history=self.history,
            usage=UsageReports(database),
            user_keys=self.keys,
        )

    async def pieces(self, profile: Profile) -> list[bytes]:
        return [piece async for piece in self.export.pieces(profile)]

    async def whole(self, profile: Profile) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(b"".join(await self.pieces(profile)))
        return found

    async def say(self, user_id: str, text: str) -> None:
        exchange = new_exchange(user_id)
        await self.history.begin(exchange, text)
        await self.history.end(exchange, Ended(status="complete", text=f"re: {text}"))

    async def add_turns(self, owner: str, count: int) -> None:
        texts = {"source": "platform", "agent_id": "agent-1", "instance": "i", "status": "complete", "model": "m"}
        names = (
            "prompt_tokens",
            "completion_tokens",
            "cached_tokens",
            "reasoning_tokens",
            "cost_micros",
            "held_micros",
        )
        rows = [
            {"id": f"{owner}-{n:05}", "owner": owner, "started_at": float(n), **texts, **dict.fromkeys(names, 1)}
            for n in range(count)
        ]
        async with self.database.write() as connection:
            await connection.execute(insert(turns), rows)

    async def add_response(self, owner: str, response_id: str, text: str) -> None:
        row = {
            "owner": owner,
            "id": response_id,
            "agent_id": "agent-1",
            "input_items": b'[{"type":"message"}]',
            "response": msgspec.json.encode({"id": response_id, "output": text}),
            "status": "completed",
            "created_at": 1.0,
        }
        async with self.database.write() as connection:
            await connection.execute(insert(responses), [row])


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


async def test_user_who_has_nothing(world: World) -> None:
    found = await world.whole(BEN)
    user = found.pop("user")
    assert (user["id"], user["email"], user["agent"]) == ("ben", "ben@example.com", None)
    assert found == {"memory": [], "keys": [], "usage": [], "messages": [], "responses": []}


async def test_everything_of_one_user_and_nothing_of_another(world: World) -> None:
    for who in ("ann", "ben"):
        await world.say(who, f'"{who}" says {{ ] }} , \\ 🍵')
        await world.add_turns(who, 2)
        await world.add_response(who, f"resp_{who}", who)
        await world.keys.make(who, f"{who}'s")
    found = await world.whole(ANN)
    assert found["user"]["agent"] == {"id": "agent-1", "name": "Ann's"}
    assert [block["value"] for block in found["memory"]] == ["Likes tea."]
    assert [key["name"] for key in found["keys"]] == ["ann's"]
    assert [turn["id"] for turn in found["usage"]] == ["ann-00000", "ann-00001"]
    assert [message["text"] for message in found["messages"]] == [
        're: "ann" says { ] } , \\ 🍵',
        '"ann" says { ] } , \\ 🍵',
    ]
    (response,) = found["responses"]
    assert response == {"response": {"id": "resp_ann", "output": "ann"}, "input_items": [{"type": "message"}]}
    assert "ben" not in msgspec.json.encode(found).decode()


async def test_much_comes_in_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 7)
    monkeypatch.setattr(module, "PIECE", 1_000)
    await world.add_turns("ann", 50)
    for number in range(5):
        await world.add_response("ann", f"resp_{number}", "x" * 900)
    pieces = await world.pieces(ANN)
    assert len(pieces) > 10
    assert max(map(len, pieces)) < 3_000
    found = msgspec.json.decode(b"".join(pieces))
    assert [turn["id"] for turn in found["usage"]] == [f"ann-{n:05}" for n in range(50)]
    assert [one["response"]["id"] for one in found["responses"]] == [f"resp_{n}" for n in range(5)]


async def test_letta_that_is_down_is_told_before_anything(world: World) -> None:
    world.backend.down = UpstreamUnavailable()
    with pytest.raises(UpstreamUnavailable):
        await anext(world.export.pieces(ANN))


async def test_agent_that_is_gone_has_no_memory(world: World) -> None:
    world.backend.listed.clear()
    assert (await world.whole(ANN))["memory"] == []
