"""The pipeline on the loader, with nothing installed but what its first lines name: prints what a chat says.

`python pipeline_alone.py FOLDER MODEL`, with `pipelines_server.py` beside it; the folder has the file and its valves.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


async def main(folder: Path, wanted: str) -> None:
    """Chat, and ask for a title."""
    from pipelines_server import PipelinesServer  # type: ignore[import-not-found] # noqa: PLC0415 - it lies beside

    server = PipelinesServer(folder)
    await server.start()
    try:
        models = {name: model_id for model_id, name in server.models().items()}
        body = {"model": models[wanted], "messages": [{"role": "user", "content": "think about tea"}]}
        streamed = await server.chat(await server.inlet(body["model"], body, {"id": "user-1"}))
        title: dict[str, Any] = {
            **body,
            "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
        }
        whole = await server.chat({**title, "stream": False})
    finally:
        await server.stop()
    told = {"streamed": streamed, "whole": whole, "requirements": server.requirements}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
