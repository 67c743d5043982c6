"""L11: credentials that let nobody in, by the thousand: neither the database nor Letta is asked about each of them."""

import asyncio
import contextlib
import random
import string
from collections.abc import AsyncIterator, Callable
from typing import Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.accounts import credentials
from gateway.accounts.identity import tokens
from gateway.accounts.secrets import CHECK
from gateway.accounts.user_keys import SECRET
from gateway.keys import PERSONAL_KEY
from gateway.letta.scripted import ScriptedBackend
from gateway.storage.engine import Database
from tests.server.people import Town, bearer, town

FLOOD: Final = 150
FEW: Final = 10
"""Questions about one credential: once in five seconds, and a busy machine takes some of these for a flood."""
MODELS, ME = "/v1/models", "/api/v1/auth/me"
_CHANCE: Final = random.Random(11)


class Questions:
    """How often the database and Letta were asked for a request: what the gateway does of itself has a task's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        transaction, answer = Database._transaction, ScriptedBackend._answer

        @contextlib.asynccontextmanager
        async def counted(database: Database, *, writes: bool) -> AsyncIterator[object]:
            self._count()
            async with transaction(database, writes=writes) as found:
                yield found

        async def told(backend: ScriptedBackend) -> None:
            self._count()
            await answer(backend)

        monkeypatch.setattr(Database, "_transaction", counted)
        monkeypatch.setattr(ScriptedBackend, "_answer", told)

    def _count(self) -> None:
        task = asyncio.current_task()
        self.asked += task is not None and task.get_name().startswith("Task-")


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    async with town(talks=False) as running:
        yield running


@pytest.fixture
def questions(gateway: Town, monkeypatch: pytest.MonkeyPatch) -> Questions:
    assert gateway.ann.key
    return Questions(monkeypatch)


async def flood(gateway: Town, path: str, credential: Callable[[], str], status: int = 401) -> None:
    for _ in range(FLOOD):
        assert (await gateway.ask("GET", path, bearer(credential()))).status == status


def word(length: int) -> str:
    return "".join(_CHANCE.choices(string.ascii_letters + string.digits + "-_", k=length))


def personal_key() -> str:
    """Return what has the form of a personal key, and a check part that is none."""
    return PERSONAL_KEY + word(SECRET + CHECK)


# Made up -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: f"sk-{word(40)}", personal_key], ids=["API keys", "personal keys"])
async def test_keys_that_were_made_up(gateway: Town, questions: Questions, make: Callable[[], str]) -> None:
    await flood(gateway, MODELS, make)
    again = make()
    await flood(gateway, MODELS, lambda: again)
    assert questions.asked == 0


async def test_tokens_that_were_made_up(gateway: Town, questions: Questions) -> None:
    claims = jwt.decode(gateway.ann.token, options={"verify_signature": False})
    header, strange = jwt.get_unverified_header(gateway.ann.token), Ed25519PrivateKey.generate()

    def forged() -> str:
        return jwt.encode({**claims, "sid": word(32)}, strange, "EdDSA", {**header, "kid": word(43)})

    signed = gateway.ann.token.rpartition(".")[0]
    for make in (forged, lambda: f"{signed}.{word(86)}", lambda: word(400)):
        await flood(gateway, ME, make)
    assert questions.asked == 0


async def test_token_that_has_expired(gateway: Town, questions: Questions) -> None:
    expired = gateway.expired_token(gateway.ann)
    await flood(gateway, ME, lambda: expired)
    assert questions.asked == 0


# Once good -----------------------------------------------------------------------------------------------------------


async def test_key_that_was_deleted(gateway: Town, questions: Questions) -> None:
    deleted = await gateway.send("DELETE", f"/api/v1/user/keys/{gateway.ann.key_id}", gateway.ann.token)
    assert deleted.status == 204
    questions.asked = 0
    await flood(gateway, MODELS, lambda: gateway.ann.key)
    assert questions.asked <= FEW


async def test_token_of_a_session_that_ended(gateway: Town, questions: Questions) -> None:
    ended = await gateway.ended_token(gateway.ann)
    questions.asked = 0
    await flood(gateway, ME, lambda: ended)
    assert questions.asked <= FEW


async def test_user_who_was_deleted(gateway: Town, questions: Questions) -> None:
    assert (await gateway.admin("DELETE", f"/users/{gateway.ann.id}")).status == 204
    questions.asked = 0
    await flood(gateway, MODELS, lambda: gateway.ann.key)
    await flood(gateway, ME, lambda: gateway.ann.token)
    assert questions.asked <= FEW


async def test_user_who_is_blocked(gateway: Town, questions: Questions) -> None:
    assert (await gateway.admin("POST", f"/users/{gateway.ann.id}/block")).status == 200
    questions.asked = 0
    await flood(gateway, MODELS, lambda: gateway.ann.key, 403)
    await flood(gateway, ME, lambda: gateway.ann.token, 403)
    assert questions.asked <= FEW


async def test_new_key_holds_at_once_in_the_middle_of_a_flood(gateway: Town) -> None:
    await gateway.send("DELETE", f"/api/v1/user/keys/{gateway.ann.key_id}", gateway.ann.token)
    for number in range(20):
        assert (await gateway.ask("GET", MODELS, bearer(gateway.ann.key))).status == 401
        made = await gateway.send("POST", "/api/v1/user/keys", gateway.ann.token, {"name": f"number {number}"})
        assert (await gateway.ask("GET", MODELS, bearer(made.json()["key"]))).status == 200


def test_what_is_remembered_is_bounded_and_soon_looked_at_again() -> None:
    assert credentials.HELD <= 10_000
    assert credentials.REMEMBERED <= 5
    assert tokens.VERIFIED <= 10_000
