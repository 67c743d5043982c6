"""A gateway that is killed while users chat: ``python -m tests.handlers.crashing_gateway FOLDER ROUNDS``.

Each round is a fork that serves FOLDER/gateway.db, so that what takes long, the imports, is done once. What clients saw
is written to FOLDER/acks: ``asked TEXT`` once a message was acknowledged, ``done TEXT`` once its answer was, ``status
TEXT N`` for what a request came to that was sent again after a crash, with the key it had before.
"""

import asyncio
import http.client
import itertools
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from gateway import keys
from gateway.accounts.profiles import Profile
from gateway.letta.scripted import Pause, Script, ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.translation.agent_events import Stop, TextDelta, Usage
from tests.handlers.platforms import ANN, BEN, MESSAGE, SECRET, KnownCallers, agent_of, token
from tests.server.running import JSON, settings

USERS: Final = (ANN, BEN)
ANSWER: Final = Script(([TextDelta("Hel")], Pause(0.003), [TextDelta("lo")], [Stop("end_turn"), Usage(10, 2)]))


# The gateway ---------------------------------------------------------------------------------------------------------


async def _serve(folder: Path, ready: int) -> None:
    database = await Database.open(SqliteFile(folder / "gateway.db"))
    backend = ScriptedBackend([agent_of(user) for user in USERS], ANSWER)
    app = build_app(settings(secret_key=SECRET, home=str(folder)), database, backend=backend)
    credentials: keys.Credentials = KnownCallers()
    app[keys.CREDENTIALS] = credentials
    for user in USERS:
        agent_id = agent_of(user).id
        profile = Profile(id=user, email=f"{user}@x.example", letta_agent_id=agent_id, created_at=1.0, updated_at=1.0)
        await app[keys.PROFILES].add(profile)
    listener = Listener(app, "127.0.0.1", 0)
    await listener.start()
    os.write(ready, f"{listener.port}\n".encode())
    await asyncio.Event().wait()


def _fork(folder: Path) -> tuple[int, int]:
    """Return the process and the port of a gateway that serves; the port is 0 where it was killed before it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        asyncio.run(_serve(folder, writing))
        os._exit(1)
    os.close(writing)
    port = int(os.read(reading, 100) or b"0")
    os.close(reading)
    return child, port


# Its clients ---------------------------------------------------------------------------------------------------------


class Client:
    """One who chats until the gateway is gone; ``lost`` is what was sent and got no end."""

    def __init__(self, user: str, acks: int) -> None:
        self.user = user
        self.lost: list[str] = []
        self.asked = 0
        self._acks = acks

    def chat(self, port: int, round_number: int) -> None:
        try:
            while self.lost:
                self._note(f"status {self.lost[0]} {self._say(port, self.lost[0])}")
                self.lost.pop(0)
            for number in itertools.count():
                self.lost.append(f"{self.user[-1]}-{round_number}-{number}")
                self._say(port, self.lost[0])
                self.lost.pop(0)
        except (OSError, http.client.HTTPException):
            return  # killed

    def _say(self, port: int, words: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            body = msgspec.json.encode({"message": words})
            connection.request("POST", MESSAGE, body, {**JSON, **token(self.user), "Idempotency-Key": words})
            response = connection.getresponse()
            for line in response:
                if line == b"event: start\n":
                    self._note(f"asked {words}")
                    self.asked += 1
                elif line == b"event: done\n":
                    self._note(f"done {words}")
            return response.status
        finally:
            connection.close()

    def _note(self, line: str) -> None:
        os.write(self._acks, f"{line}\n".encode())


def _main(folder: Path, rounds: int) -> None:
    acks = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    clients = [Client(user, acks) for user in USERS]
    chance = random.Random(7)
    for number in range(rounds):
        child, port = _fork(folder)
        before = sum(client.asked for client in clients)
        threads = [threading.Thread(target=client.chat, args=(port, number)) for client in clients]
        for thread in threads:
            thread.start()
        while number % 4 and sum(client.asked for client in clients) == before and threads[0].is_alive():
            time.sleep(0.001)  # three of four crash while users chat, one perhaps before
        time.sleep(chance.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            raise RuntimeError(f"round {number} ended by itself: {status}")
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
