"""`letta-gateway serve` with nothing configured: a local App Server of its own, with the scripted model behind it."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.live.gateways import sdk
from tests.live.test_chat import user
from tests.server.subprocesses import GatewayProcess, gateway_process

pytestmark = pytest.mark.services

_PATIENCE = 20.0


@contextlib.asynccontextmanager
async def at_home(home: Path, **environment: str) -> AsyncIterator[GatewayProcess]:
    """Run the command with nothing configured but where it keeps its state; no child outlives the context."""
    clean = {"LETTA_GATEWAY_HOME": str(home), "ENVIRONMENT": "production", **environment}
    unset = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY"), "")
    unset |= dict.fromkeys(("OLLAMA_BASE_URL", "OLLAMA_HOST", "LMSTUDIO_BASE_URL"), "")
    async with gateway_process(None, env={**unset, **clean}) as gateway:
        yield gateway


def child_of(gateway: GatewayProcess) -> int:
    """Find the local Letta: the gateway's only child, the leader of a group of its own."""
    pid = gateway.process.pid
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def group_lives(leader: int) -> bool:
    """Tell whether any process of that group is left, but for zombies that nobody has buried yet."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                return True
    return False


async def gone(leader: int) -> None:
    async with asyncio.timeout(_PATIENCE):
        while group_lives(leader):  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.1)


async def ready(gateway: GatewayProcess, status: int) -> None:
    async with asyncio.timeout(_PATIENCE):
        while (await gateway.ask("GET", "/ready")).status != status:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def says(client: openai.AsyncOpenAI, text: str, model: str = "Milo") -> str:
    answer = await client.chat.completions.create(model=model, messages=user(text))
    return answer.choices[0].message.content or ""


async def test_nothing_configured_and_the_line_of_the_banner_answers(tmp_path: Path) -> None:
    started = time.monotonic()
    async with at_home(tmp_path) as gateway:
        assert time.monotonic() - started < 60  # 3 s on a quiet machine
        await gateway.says("try it:")
        assert f"http://127.0.0.1:{gateway.port}/v1" in gateway.errors
        assert "agent:   Milo" in gateway.errors
        assert "a scripted model answers" in gateway.errors
        [line] = re.findall(r"try it:\s+(curl .*)", gateway.errors)
        curl = await asyncio.create_subprocess_exec(*shlex.split(line), "-sS", stdout=asyncio.subprocess.PIPE)
        output = (await curl.communicate())[0].decode()
        assert curl.returncode == 0
        assert output.count("data: {") > 3
        assert output.rstrip().endswith("data: [DONE]")
        answer = await gateway.ask("GET", "/ready")
        assert answer.status == 200
        assert answer.json()["note"] == "a scripted model answers: no provider is configured"
        child = child_of(gateway)
        async with sdk(gateway) as client:
            assert [model.id async for model in client.models.list()] == ["Milo"]
            assert (await says(client, "hello")).startswith("You said: hello")
        stopped = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert time.monotonic() - stopped < 30
        assert not group_lives(child)


async def test_killed_and_started_again_at_the_same_home(tmp_path: Path) -> None:
    async with at_home(tmp_path) as gateway, sdk(gateway) as client:
        await says(client, "my cat is called Tiger")
        child = child_of(gateway)
        gateway.signal(signal.SIGKILL)
        await gateway.ended()
        await gone(child)
    async with at_home(tmp_path) as gateway, sdk(gateway) as client:
        assert [model.id async for model in client.models.list()] == ["Milo"]
        async with asyncio.timeout(_PATIENCE):
            assert (await says(client, "hello again")).startswith("You said: hello again")
    stored = b"".join(path.read_bytes() for path in (tmp_path / "letta").rglob("*.json*") if path.is_file())
    assert b"my cat is called Tiger" in stored
    assert b"hello again" in stored
    assert len(list((tmp_path / "letta" / ".letta" / "lc-local-backend" / "agents").iterdir())) == 1


async def test_the_child_is_killed_in_mid_stream(tmp_path: Path) -> None:
    async with at_home(tmp_path) as gateway, sdk(gateway) as client:
        await ready(gateway, 200)
        stream = await client.chat.completions.create(
            model="Milo", messages=user("count to 300 every 50 ms"), stream=True
        )
        heard = 0
        with pytest.raises(openai.APIError) as broken:  # noqa: PT012 - it breaks while it is heard
            async for _ in stream:
                heard += 1
                if heard == 5:
                    os.kill(child_of(gateway), signal.SIGKILL)
        assert broken.value.code == "upstream_stream_truncated"
        await ready(gateway, 503)
        await ready(gateway, 200)
        assert (await says(client, "and now?")).startswith("You said: and now?")
        metrics = (await gateway.ask("GET", "/metrics")).body.decode()
        assert "letta_gateway_embedded_restarts_total 1.0" in metrics
