"""The Pipelines server over HTTP, as far as Open WebUI asks it: models, chats, and the filters around them."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from tests.open_webui.pipelines_server import PipelinesServer
from tests.open_webui.shared_part import FOLDER

KEY: Final = "0p3n-w3bu!"
_END: Final = ""


class _Pipelines:
    def __init__(self, server: PipelinesServer) -> None:
        self._server = server

    async def models(self, _: web.Request) -> web.Response:
        names = await asyncio.to_thread(self._server.models)
        kinds = {"type": "manifold", "valves": True}
        data = [{"id": key, "name": name, "object": "model", "pipeline": kinds} for key, name in names.items()]
        return web.json_response({"data": data, "object": "list", "pipelines": True})

    async def filtered(self, request: web.Request) -> web.Response:
        form: dict[str, Any] = await request.json()
        ask = getattr(self._server, request.match_info["way"])
        return web.json_response(await ask(request.match_info["model"], form["body"], form["user"]))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        form: dict[str, Any] = {"stream": True, **await request.json()}
        if not form["stream"]:
            return web.json_response(await self._server.chat(form))
        await asyncio.to_thread(self._server.models)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        lines = self._server.stream(form)
        _UNREAD.append(lines)
        while line := await asyncio.to_thread(next, lines, _END):
            await response.write(line.encode())
        return response


_UNREAD: Final[list[object]] = []
"""Every stream, as the server's garbage: one that nobody reads on is dropped there without being closed."""


@contextlib.asynccontextmanager
async def running_pipelines(folder: Path, valves: Mapping[str, object]) -> AsyncIterator[str]:
    """Serve the pipeline alone in a folder, with these valves; give the address for a connection."""
    shutil.copy(FOLDER / "pipeline.py", folder)
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "valves.json").write_text(json.dumps(valves))
    server = PipelinesServer(folder)
    await server.start()
    pipelines, app = _Pipelines(server), web.Application()
    app.router.add_get("/models", pipelines.models)
    app.router.add_post("/chat/completions", pipelines.chat)
    app.router.add_post("/{model}/filter/{way:inlet|outlet}", pipelines.filtered)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
        await server.stop()
        _UNREAD.clear()
