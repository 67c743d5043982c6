"""A gateway before the real Letta server, and the official SDK before the gateway."""

import contextlib
from collections.abc import AsyncIterator

import openai

from tests.live.letta_server import LettaServer
from tests.server.subprocesses import GatewayProcess, gateway_process


@contextlib.asynccontextmanager
async def gateway_before(letta: LettaServer, **environment: str) -> AsyncIterator[GatewayProcess]:
    """Run the command with the server as its Letta."""
    async with gateway_process(letta.base_url, env={"LETTA_GATEWAY_MODELS_TTL": "0.5", **environment}) as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def sdk(gateway: GatewayProcess, api_key: str = "none", retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    """The unmodified SDK, as a user points it at the gateway."""
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=api_key, max_retries=retries, timeout=60
    )
    try:
        yield client
    finally:
        await client.close()
