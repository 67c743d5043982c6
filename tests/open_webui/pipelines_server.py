"""What Open WebUI's Pipelines server does with the files of its folder, kept to the letter: it is on no registry.

After open-webui/pipelines, ``main.py`` of July 2025, without HTTP: loading with frontmatter, ``failed/`` and
``valves.json``, manifold ids, ``pipe`` by keyword in a thread, and what is made of its answer, filters, valves. What it
would install by pip is kept in ``requirements`` instead.
"""

import asyncio
import importlib.util
import json
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class PipelinesServer:
    """The server of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.requirements: list[str] = []
        self.listed: dict[str, dict[str, Any]] = {}

    async def start(self) -> None:
        """Load every file, then tell each that the server starts."""
        for path in sorted(self.folder.glob("*.py")):
            self._load(path)
        self.listed = self._all()
        for module in self.modules.values():
            if hasattr(module, "on_startup"):
                await module.on_startup()

    async def stop(self) -> None:
        """Tell each that the server ends."""
        for module in self.modules.values():
            if hasattr(module, "on_shutdown"):
                await module.on_shutdown()

    def models(self) -> dict[str, str]:
        """Return the names of the models, by their ids: a type that is neither manifold nor filter is not listed."""
        self.listed = self._all()
        return {listed["id"]: listed["name"] for listed in self.listed.values()}

    async def update_valves(self, pipeline_id: str, form: dict[str, Any]) -> None:
        """Put new valves in place, keep them, and tell."""
        pipeline = self.modules[pipeline_id]
        pipeline.valves = pipeline.valves.__class__(**form)
        kept = self.folder / self.names[pipeline_id] / "valves.json"
        kept.write_text(json.dumps(pipeline.valves.model_dump()))
        if hasattr(pipeline, "on_valves_updated"):
            await pipeline.on_valves_updated()

    async def inlet(self, model_id: str, body: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
        """Do what Open WebUI asks for before a chat with a model that has a ``pipeline``."""
        self.listed = self._all()
        assert model_id in self.listed
        module = self.modules[
            model_id.split(".", maxsplit=1)[0] if self.listed[model_id]["type"] == "manifold" else model_id
        ]
        answered: dict[str, Any] = await module.inlet(json.loads(json.dumps(body)), user)
        return answered

    async def outlet(self, model_id: str, body: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
        """Do what Open WebUI asks for after it."""
        module = self.modules[model_id.split(".", maxsplit=1)[0]]
        answered: dict[str, Any] = await module.outlet(json.loads(json.dumps(body)), user)
        return answered

    async def chat(self, body: dict[str, Any]) -> str | dict[str, Any]:
        """Answer ``POST /chat/completions``: a stream's text, or the document of the other answers."""
        self.listed = self._all()
        assert body["model"] in self.listed, "404"
        assert all(isinstance(message["content"], str | list) for message in body["messages"]), "422"
        form = {"stream": True, **json.loads(json.dumps(body))}
        return await asyncio.to_thread(self._job, form)

    def stream(self, form: dict[str, Any]) -> Iterator[str]:
        """Return the lines of a streamed answer."""
        answered = self._pipe(form)
        if isinstance(answered, str):
            yield f"data: {json.dumps(_template(form['model'], answered))}\n\n"
        if isinstance(answered, Iterator):
            for line in answered:
                yield _line(form["model"], line)
        if isinstance(answered, str | Generator):
            yield f"data: {json.dumps(_finish(form['model']))}\n\n"
            yield "data: [DONE]"

    def _load(self, path: Path) -> None:
        (self.folder / path.stem).mkdir(exist_ok=True)
        valves = self.folder / path.stem / "valves.json"
        if not valves.exists():
            valves.write_text("{}")
        pipeline = self._pipeline(path)
        if pipeline is None:
            return
        if hasattr(pipeline, "valves"):
            kept = {**pipeline.valves.model_dump(), **json.loads(valves.read_text())}
            pipeline.valves = pipeline.valves.__class__(**kept)
        pipeline_id = pipeline.id if hasattr(pipeline, "id") else path.stem
        self.modules[pipeline_id], self.names[pipeline_id] = pipeline, path.stem

    def _pipeline(self, path: Path) -> Any:
        try:
            self.requirements += _frontmatter(path.read_text("utf-8")).get("requirements", "").split(",")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.Pipeline()
        except Exception:  # noqa: BLE001 - as the server does
            (self.folder / "failed").mkdir(exist_ok=True)
            path.rename(self.folder / "failed" / path.name)
            return None

    def _all(self) -> dict[str, dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = {}
        for pipeline_id, module in self.modules.items():
            kind = getattr(module, "type", None)
            if kind is None or kind == "filter":
                listed[pipeline_id] = {"id": pipeline_id, "type": kind or "pipe", "name": module.name}
            elif kind == "manifold":
                inner = module.pipelines() if callable(module.pipelines) else module.pipelines
                for one in inner:
                    model_id = f"{pipeline_id}.{one['id']}"
                    listed[model_id] = {"id": model_id, "type": kind, "name": f"{module.name}{one['name']}"}
        return listed

    def _job(self, form: dict[str, Any]) -> str | dict[str, Any]:
        if form["stream"]:
            return "".join(self.stream(form))
        answered = self._pipe(form)
        if isinstance(answered, dict):
            return answered
        if isinstance(answered, BaseModel):
            return answered.model_dump()
        text = answered if isinstance(answered, str) else ""
        if isinstance(answered, Generator):
            text = "".join(f"{piece}" for piece in answered)
        return {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": text}}]}

    def _pipe(self, form: dict[str, Any]) -> Any:
        pipeline_id = model_id = form["model"]
        if self.listed[form["model"]]["type"] == "manifold":
            pipeline_id, model_id = form["model"].split(".", 1)
        messages = form["messages"]
        return self.modules[pipeline_id].pipe(
            user_message=_last_user_message(messages), model_id=model_id, messages=messages, body=form
        )


def _frontmatter(content: str) -> dict[str, str]:
    if not content.startswith('"""'):
        return {}
    found = {}
    for line in content[3 : content.find('"""', 3)].split("\n"):
        if ":" in line:
            key, value = line.split(":", 1)
            found[key.strip().lower()] = value.strip()
    return found


def _last_user_message(messages: list[dict[str, Any]]) -> Any:
    for message in reversed(messages):
        if message["role"] == "user":
            if isinstance(message["content"], list):
                for item in message["content"]:
                    if item["type"] == "text":
                        return item["text"]
            return message["content"]
    return None


def _line(model: str, line: Any) -> str:
    if isinstance(line, BaseModel):
        line = f"data: {line.model_dump_json()}"
    elif isinstance(line, dict):
        line = f"data: {json.dumps(line)}"
    if isinstance(line, bytes):
        line = line.decode()
    if line.startswith("data:"):
        return f"{line}\n\n"
    return f"data: {json.dumps(_template(model, line))}\n\n"


def _template(model: str, text: str) -> dict[str, Any]:
    return _chunk(model, {"content": text}, None)


def _finish(model: str) -> dict[str, Any]:
    return _chunk(model, {}, "stop")


def _chunk(model: str, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    made = {"id": f"{model}-{uuid.uuid4()}", "object": "chat.completion.chunk", "created": int(time.time())}
    return {**made, "model": model, "choices": [choice]}
