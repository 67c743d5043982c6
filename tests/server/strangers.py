"""Requests that nobody foresaw: random paths, methods, models, users, keys and headers, by the thousand."""

import asyncio
import random
import string
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from gateway.keys import PERSONAL_KEY
from tests.server.people import API_KEY, OPERATOR_KEY, Town, bearer
from tests.server.running import JSON, chat_body
from tests.server.wire import Connection, request

_SEED: Final = 7
_LETTERS: Final = string.ascii_letters + string.digits + "-_"
_KNOWN_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_OTHER_METHODS: Final = ("PROPFIND", "TRACE", "MKCOL", "PURGE", "SUBSCRIBE")
_SAMPLE: Final = 20
"""Words that are kept, to be looked for afterwards."""
_TRIES: Final = 40
"""How often each kind of request is tried at first: more than the tries after which logins and registrations are held
back, so that all their answers are known."""


class Strangers:
    """Clients without a plan; ``answers`` counts what they were told, ``words`` has some of what they said."""

    def __init__(self, gateway: Town) -> None:
        self.answers = 0
        self.words: list[str] = []
        self._gateway = gateway
        self._chance = random.Random(_SEED)
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._unknown_path,
            self._other_method,
            self._any_method,
            self._model,
            self._chat,
            self._response,
            self._login,
            self._registration,
            self._user_with_a_made_up_token,
            self._personal_key,
            self._admin,
            self._no_request,
        )

    async def try_everything(self) -> None:
        """Send every kind of request, often enough to see all that is answered."""
        await self._send_all(kind() for kind in self._kinds for _ in range(_TRIES))

    async def come(self, count: int, *, at_once: int = 4) -> None:
        """Send so many requests."""
        share = range(count // at_once)
        crowd = [(self._chance.choice(self._kinds)() for _ in share) for _ in range(at_once)]
        await asyncio.gather(*map(self._send_all, crowd))

    async def _send_all(self, requests: Iterable[bytes]) -> None:
        client = _Client(self._gateway.port)
        for sent in requests:
            await client.send(sent)
            self.answers += 1
        await client.leave()

    def _word(self, most: int = 30) -> str:
        word = "".join(self._chance.choices(_LETTERS, k=self._chance.randint(12, 12 + most)))
        if len(self.words) < _SAMPLE:
            self.words.append(word)
        return word

    # Kinds of requests -----------------------------------------------------------------------------------------------

    def _unknown_path(self) -> bytes:
        return request("GET", f"/{self._word()}/{self._word()}?{self._word()}={self._word()}")

    def _other_method(self) -> bytes:
        return request(self._chance.choice(_OTHER_METHODS), f"/v1/{self._word()}", {"User-Agent": self._word()})

    def _any_method(self) -> bytes:
        return request(self._chance.choice(_KNOWN_METHODS), f"/v1/models/{self._word()}", bearer(API_KEY))

    def _model(self) -> bytes:
        headers = {**bearer(API_KEY), "X-Request-Id": self._word(), "X-Forwarded-For": self._word()}
        return request("GET", f"/v1/models/{self._word()}", headers)

    def _chat(self) -> bytes:
        headers = {**JSON, **bearer(API_KEY), "X-Letta-Chat-Key": self._word()}
        body = chat_body(self._word(), model=self._word(), user=self._word())
        return request("POST", "/v1/chat/completions", headers, body)

    def _response(self) -> bytes:
        return request("GET", f"/v1/responses/{self._word()}", bearer(API_KEY))

    def _login(self) -> bytes:
        account = {"email": f"{self._word()}@example.com", "password": self._word()}
        return request("POST", "/api/v1/auth/login", JSON, msgspec.json.encode(account))

    def _registration(self) -> bytes:
        account = {"email": f"{self._word()}@example.com", "password": self._word(), "name": self._word()}
        return request("POST", "/api/v1/auth/register", JSON, msgspec.json.encode(account))

    def _user_with_a_made_up_token(self) -> bytes:
        return request("GET", f"/api/v1/chat/history?cursor={self._word()}", bearer(self._word()))

    def _personal_key(self) -> bytes:
        return request("GET", "/v1/models", bearer(PERSONAL_KEY + self._word()))

    def _admin(self) -> bytes:
        return request("GET", f"/api/v1/admin/users/{self._word()}", bearer(OPERATOR_KEY))

    def _no_request(self) -> bytes:
        return self._word().encode() + b"\r\n\r\n"


class _Client:
    """One client, on a connection that is made anew whenever the gateway has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: Connection | None = None

    async def send(self, sent: bytes) -> None:
        """Send a request, and read its answer."""
        if self._connection is None:
            self._connection = Connection(*await asyncio.open_connection("127.0.0.1", self._port))
        await self._connection.send(sent)
        answer = await self._connection.answer()
        if answer.version == "HTTP/1.0" or (answer.header("connection") or "").lower() == "close":
            await self.leave()

    async def leave(self) -> None:
        """Go away."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
