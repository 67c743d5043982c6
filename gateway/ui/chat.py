"""``POST /ui/api/chat``: the operator tries an agent, by the handler of ``/v1/chat/completions`` itself."""

from aiohttp import web

from gateway import keys
from gateway.handlers.chat_completions import complete


async def chat(request: web.Request) -> web.StreamResponse:
    """Answer as ``/v1`` does, what the agent's own tools do among its reasoning; errors are those of ``/v1``."""
    with request.app[keys.DRAIN].request():
        return await complete(request, shows_activity=True)
