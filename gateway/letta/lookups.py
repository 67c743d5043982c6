"""What a turn may wait for before it begins, asked by aiohttp: which agent is meant, and what it is.

letta-client takes ten times the CPU for it, and thousands of agents that are spoken to for the first time make a crowd.
"""

import asyncio
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import aiohttp
import letta_client

from gateway.letta import upstream_errors

_LONGEST: Final = 4_194_304
"""Bytes of one answer: a page of agents is 660 KB."""
_HEADERS: Final = {
    "Accept": "application/json",
    # As letta-client says it: Letta leaves tools, blocks and sources out of a listing then (0.16.8).
    "User-Agent": f"AsyncLetta/Python {letta_client.__version__}",
    "X-Stainless-Lang": "python",
    "X-Stainless-Package-Version": letta_client.__version__,
}

Query = Sequence[tuple[str, str]]


class Lookups:
    """Questions to a server, over the connections of the token streams; ``within`` is the seconds for an answer."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def agents(self, query: Query, within: float) -> bytes:
        """Return a page of agents; raises what the control plane's errors are to the gateway."""
        return await self._get("v1/agents/", query, within)

    async def agent(self, agent_id: str, query: Query, within: float) -> bytes:
        """Return an agent; raises ``AgentGone`` too."""
        return await self._get(f"v1/agents/{quote(agent_id, safe='')}", query, within)

    async def _get(self, path: str, query: Query, within: float) -> bytes:
        try:
            async with (
                asyncio.timeout(within),
                self._session.get(path, params=query, headers=_HEADERS, allow_redirects=False) as response,
            ):
                body = await _read(response)
        except upstream_errors.FOREIGN as error:
            raise upstream_errors.unanswered(error) from error
        if response.status != 200:  # noqa: PLR2004 - HTTP's own number
            answer = upstream_errors.Answered(response.status)
            raise upstream_errors.answered(response.status, response.headers, body) from answer
        return body


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _LONGEST:
            raise aiohttp.ClientPayloadError("the answer is too long")
    return bytes(body)
