"""Many requests at once, from a process of its own, on connections that stand already, as those of a proxy do.

Run as ``python -m tests.faults.login_flood PORT logins|probes NUMBER``: it says when it begins, and what they came to.
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter

from tests.server.running import JSON
from tests.server.wire import Connection, connect, request

ADDRESSES = 25
"""From how many of this machine's addresses they come."""


async def login(connection: Connection, number: int) -> int:
    body = json.dumps({"email": f"user{number}@example.com", "password": "a wrong password"}).encode()
    await connection.send(request("POST", "/api/v1/auth/login", JSON, body))
    return (await connection.answer("POST")).status


async def probe(connection: Connection, number: int) -> int:
    await connection.send(request("GET", "/health"))
    return (await connection.answer()).status


async def main(port: int, kind: str, crowd: int) -> None:
    ask = login if kind == "logins" else probe
    async with contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(connect(port, source=f"127.0.1.{1 + number % ADDRESSES}"))
            for number in range(crowd)
        ]
        print("begins", flush=True)
        await asyncio.sleep(0.5)  # the chat begins
        found = Counter(
            await asyncio.gather(*(ask(connection, number) for number, connection in enumerate(connections)))
        )
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
