"""A real Open WebUI 0.12 that reaches nothing but this machine: two connections to a gateway, and the Function.

It runs without PyTorch, which it needs for embeddings and speech of its own alone: those are said to be OpenAI's.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.live import processes
from tests.services import installs
from tests.services.open_webui.pipelines import KEY

TITLE: Final = "Walnut cake"
HEADERS: Final = {"X-OpenWebUI-Chat-Id": "{{CHAT_ID}}", "X-OpenWebUI-Task": "{{TASK}}"}
"""The headers of a connection, as the README has them."""
RESPONSES: Final = "responses"
"""What comes before the ids of the models of the second connection, which is spoken to by the Responses API."""
_READY: Final = 180.0
_NOWHERE: Final = "http://127.0.0.1:9"
_PERSON: Final = {"name": "Ann", "email": "ann@example.com", "password": "a long pass word 1"}


def _environment(home: Path, base_url: str, api_key: str, pipelines: str) -> dict[str, str]:
    connection = {"enable": True, "headers": HEADERS}
    responses = {**connection, "api_type": "responses", "prefix_id": RESPONSES}
    configs = {"0": connection, "1": responses, "2": {"enable": True}}
    offline = {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    quiet = {"ENABLE_VERSION_UPDATE_CHECK": "false", "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "1"}
    proxies = {"HTTP_PROXY": _NOWHERE, "HTTPS_PROXY": _NOWHERE, "NO_PROXY": "127.0.0.1,localhost"}
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "DATA_DIR": str(home),
        "LC_ALL": "C.UTF-8",
        "WEBUI_SECRET_KEY": "a secret of the tests",
        "RAG_EMBEDDING_ENGINE": "openai",
        "AUDIO_STT_ENGINE": "openai",
        "ENABLE_OLLAMA_API": "false",
        "ENABLE_PERSISTENT_CONFIG": "false",
        "ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": "false",
        "OPENAI_API_BASE_URLS": f"{base_url};{base_url};{pipelines}",
        "OPENAI_API_KEYS": f"{api_key};{api_key};{KEY}",
        "OPENAI_API_CONFIGS": json.dumps(configs),
        # The scripted model says what it is told, and Open WebUI takes the JSON in it. No prompt of Open WebUI's own
        # begins so: that it is no message of the chat's is told by the header, and to the Function by Open WebUI.
        "TITLE_GENERATION_PROMPT_TEMPLATE": f'Gib dem Gespräch einen Titel wie {{"title": "{TITLE}"}}',
        **offline,
        **quiet,
        **proxies,
    }


class OpenWebUI:
    """One that runs, and its first user, who is the admin."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        self.base_url = base_url
        self.token = ""
        self._session = session

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Ask its API for something."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        async with self._session.request(method, self.base_url + path, json=body, headers=headers) as answer:
            assert answer.ok, await answer.text()
            return await answer.json()

    async def sign_up(self) -> None:
        """Make the first account."""
        self.token = (await self.call("POST", "/api/v1/auths/signup", _PERSON))["token"]

    async def add_function(self, name: str, content: str, valves: Mapping[str, object]) -> None:
        """Paste a Function, set its valves, and enable it."""
        form = {"id": name, "name": "Letta", "content": content, "meta": {"description": ""}}
        await self.call("POST", "/api/v1/functions/create", form)
        await self.call("POST", f"/api/v1/functions/id/{name}/valves/update", dict(valves))
        await self.call("POST", f"/api/v1/functions/id/{name}/toggle")

    async def chat(self, model: str, *messages: Mapping[str, object], **more: object) -> Any:
        """Return what is answered to an API client of its own."""
        body = {"model": model, "messages": messages, "stream": False, **more}
        return await self.call("POST", "/api/chat/completions", body)

    async def stream(self, model: str, text: str, until: bytes = b"the end") -> bytes:
        """Return what such a client hears of a stream, whatever the status; it goes away where it hears ``until``."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
        headers = {"Authorization": f"Bearer {self.token}"}
        heard = b""
        async with self._session.post(f"{self.base_url}/api/chat/completions", json=body, headers=headers) as answer:
            async for piece in answer.content.iter_any():
                heard += piece
                if until in heard:
                    answer.close()
                    break
        return heard

    async def models(self) -> dict[str, str]:
        """Return the names of the models that can be picked, by their ids."""
        return {model["id"]: model["name"] for model in (await self.call("GET", "/api/models"))["data"]}

    async def title(self, chat_id: str) -> str:
        """Return the title of a chat."""
        chat = await self.call("GET", f"/api/v1/chats/{chat_id}")
        return str(chat["title"])

    async def _is_ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.get(f"{self.base_url}/health") as answer:
                return answer.ok
        return False

    async def ready(self, program: processes.Program, log: Path) -> None:
        """Wait until it answers."""
        async with asyncio.timeout(_READY):
            while not await self._is_ready():
                assert program.running, processes.tail(log)
                await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def running_open_webui(home: Path, base_url: str, api_key: str, pipelines: str) -> AsyncIterator[OpenWebUI]:
    """Run one whose connections lead to a gateway and a Pipelines server, with its first user signed up."""
    port, log = processes.free_port(), home / "open-webui.log"
    command: list[str | Path] = [installs.OPEN_WEBUI, "serve", "--host", "127.0.0.1", "--port", str(port)]
    program = processes.start(command, log=log, env=_environment(home, base_url, api_key, pipelines), cwd=home)
    with processes.running(program):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            running = OpenWebUI(f"http://127.0.0.1:{port}", session)
            await running.ready(program, log)
            await running.sign_up()
            yield running
