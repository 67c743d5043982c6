import pytest

from gateway.server import check
from gateway.server.check import run_check
from tests.server.running import settings
from tests.server.upstream import AGENT_ID, Upstream


async def checked(**changes: object) -> tuple[bool, list[str]]:
    said: list[str] = []
    fine = await run_check(settings(**changes), said.append)
    return fine, said


async def test_all_is_well() -> None:
    async with Upstream() as letta:
        fine, said = await checked(letta_base_url=letta.url)
    assert fine
    assert [line.split()[:2] for line in said[:3]] == [["settings", "ok"], ["letta", "ok"], ["agents", "ok"]]
    assert "1 found" in said[2]
    assert said[3].split() == ["friend", f"({AGENT_ID})"]


async def test_more_agents_than_a_screen_holds() -> None:
    async with Upstream() as letta:
        letta.agents = [{**letta.agents[0], "id": f"agent-{n}", "name": f"a{n}"} for n in range(50)]
        fine, said = await checked(letta_base_url=letta.url)
    assert fine
    assert len(said) == 23


async def test_letta_does_not_answer() -> None:
    fine, said = await checked(letta_base_url="http://127.0.0.1:9")
    assert not fine
    assert said[-1].startswith("letta      FAILED  http://127.0.0.1:9: The Letta server cannot be reached")


async def test_chain_that_cannot_be_built() -> None:
    fine, said = await checked(middleware=("auth",))
    assert not fine
    (line,) = said
    assert line.startswith("settings   FAILED")


async def test_replica_that_the_others_could_not_reach() -> None:
    fine, said = await checked(host="0.0.0.0", redis_url="redis://cache")  # noqa: S104 - what a pod listens on
    assert not fine
    (line,) = said
    assert line.startswith("settings   FAILED  LETTA_GATEWAY_ADVERTISE is needed")


@pytest.mark.parametrize(
    ("changes", "who"), [({}, "a scripted model"), ({"openai_api_key": "sk-canary"}, "OpenAI")], ids=["none", "openai"]
)
async def test_nothing_is_configured(changes: dict[str, str], who: str) -> None:
    fine, said = await checked(letta_base_url="", **changes)
    assert fine
    assert said[-1] == f"letta      local   'serve' starts one; {who} answers"
    assert "canary" not in str(said)


async def test_nothing_is_configured_or_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "is_installed", lambda: False)
    fine, said = await checked(letta_base_url="")
    assert not fine
    assert said[-1].startswith("letta      FAILED  none is configured or installed")
