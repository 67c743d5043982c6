"""Users whom Supabase knows: through the gateway's endpoints, and with tokens that Supabase's own clients have."""

import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
import pytest_asyncio

from tests.live.gateways import gateway_before
from tests.live.v1_server import EMBEDDING_HANDLE, MODEL_HANDLE, V1Server
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.people import OPERATOR_KEY, PASSWORD, ask, logged_in, registered
from tests.services.supabase.server import ANON_KEY, JWT_SECRET, SERVICE_KEY, SupabaseServer, running_supabase
from tests.services.surroundings import Client, base_url, run

pytestmark = pytest.mark.asyncio(loop_scope="session")

_ROOT: Final = Path(__file__).parents[2]
_CLIENTS: Final = Path(__file__).parent / "clients"
_ANOTHER: Final = "another horse battery staple"


class Seen(msgspec.Struct, frozen=True):
    """What one of two people saw in the end."""

    email: str
    id: str
    history: list[str]
    notes: list[str]


@pytest.fixture(scope="session")
def supabase(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SupabaseServer]:
    with running_supabase(tmp_path_factory.mktemp("supabase")) as server:
        yield server


def settings_of(server: SupabaseServer) -> dict[str, str]:
    return {
        "LETTA_GATEWAY_API_KEYS": "sk-somebody-else",
        "LETTA_GATEWAY_OPERATOR_KEY": OPERATOR_KEY,
        "LETTA_GATEWAY_REGISTRATION": "open",
        "LETTA_GATEWAY_IDENTITY": "supabase",
        "LETTA_GATEWAY_USER_MODEL": MODEL_HANDLE,
        "LETTA_GATEWAY_USER_EMBEDDING": EMBEDDING_HANDLE,
        "SUPABASE_URL": server.url,
        "SUPABASE_ANON_KEY": ANON_KEY,
        "SUPABASE_SERVICE_KEY": SERVICE_KEY,
        "SUPABASE_JWT_SECRET": JWT_SECRET,
    }


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(v1: V1Server, supabase: SupabaseServer) -> AsyncIterator[GatewayProcess]:
    async with gateway_before(v1, **settings_of(supabase)) as running:
        yield running


async def test_user_from_registration_to_logout(gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    assert (await ann.say("hello")).status == 200
    again = await registered(gateway, ann.email)
    assert (again.id, again.token != ann.token) == (ann.id, True)
    fresh = await ask(gateway, "POST", "/api/v1/auth/refresh", {"refresh_token": again.refresh_token})
    assert (fresh.status, fresh.body["user"]["id"]) == (200, ann.id)
    assert (await ann.ask("POST", "/api/v1/auth/logout", {})).status == 204
    assert (await ann.ask("GET", "/api/v1/auth/me")).body["error"]["code"] == "invalid_token"
    assert (await again.ask("GET", "/api/v1/auth/me")).status == 200


async def test_what_is_refused(gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    for path, body, status, code in (
        ("register", {"email": ann.email, "password": _ANOTHER}, 409, "account_exists"),
        ("register", {"email": "new@example.com", "password": "1"}, 400, "weak_password"),
        ("login", {"email": ann.email, "password": _ANOTHER}, 401, "invalid_credentials"),
        ("login", {"email": "nobody@example.com", "password": PASSWORD}, 401, "invalid_credentials"),
        ("refresh", {"refresh_token": "made up"}, 401, "invalid_refresh_token"),
    ):
        said = await ask(gateway, "POST", f"/api/v1/auth/{path}", body)
        assert (said.status, said.body["error"]["code"]) == (status, code), said.text


@pytest.mark.parametrize("key", [ANON_KEY, SERVICE_KEY, "eyJhbGciOiJub25lIn0.e30.", JWT_SECRET])
async def test_keys_of_the_project_are_nobodys_token(gateway: GatewayProcess, key: str) -> None:
    said = await ask(gateway, "GET", "/api/v1/auth/me", key=key)
    assert (said.status, said.body["error"]["code"]) == (401, "invalid_token")


async def test_password_is_changed(gateway: GatewayProcess) -> None:
    ann = await registered(gateway)
    other = await logged_in(gateway, ann.email)
    change = {"current_password": PASSWORD, "new_password": _ANOTHER}
    wrong = await ann.ask("POST", "/api/v1/auth/password", {**change, "current_password": "wrong"})
    assert (wrong.status, wrong.body["error"]["code"]) == (401, "invalid_credentials")
    changed = await ann.ask("POST", "/api/v1/auth/password", change)
    assert changed.status == 200, changed.text
    assert (await ann.ask("GET", "/api/v1/auth/me")).status == 401
    assert (await ask(gateway, "GET", "/api/v1/auth/me", key=changed.body["access_token"])).status == 200
    refused = await ask(gateway, "POST", "/api/v1/auth/refresh", {"refresh_token": other.refresh_token})
    assert refused.body["error"]["code"] == "invalid_refresh_token"
    await logged_in(gateway, ann.email, _ANOTHER)


async def test_blocked_user_is_refused_by_the_gateway(gateway: GatewayProcess) -> None:
    """This server has no admin API, so the ban there fails; the gateway's own does not."""
    ann = await registered(gateway)
    await ask(gateway, "POST", f"/api/v1/admin/users/{ann.id}/block", key=OPERATOR_KEY)
    assert (await ann.ask("GET", "/api/v1/auth/me")).status in (401, 403)


async def test_address_that_is_to_be_confirmed_first(v1: V1Server, tmp_path: Path) -> None:
    with running_supabase(tmp_path, confirms=True) as server:
        async with gateway_before(v1, **settings_of(server)) as gateway:
            asked = {"email": "ann@example.com", "password": PASSWORD}
            said = await ask(gateway, "POST", "/api/v1/auth/register", asked)
            assert said.status == 202, said.text
            assert "access_token" not in said.text
            refused = await ask(gateway, "POST", "/api/v1/auth/login", asked)
            assert (refused.status, refused.body["error"]["code"]) == (403, "email_not_confirmed")


async def test_server_that_went_away_is_503_and_tokens_hold(v1: V1Server, tmp_path: Path) -> None:
    with running_supabase(tmp_path) as server:
        settings = settings_of(server)
        async with gateway_before(v1, **settings) as gateway:
            ann = await registered(gateway)
            server.stop()
            said = await ask(gateway, "POST", "/api/v1/auth/login", {"email": ann.email, "password": PASSWORD})
            assert (said.status, said.body["error"]["code"]) == (503, "identity_unavailable")
            assert (await ann.ask("GET", "/api/v1/auth/me")).status == 200


@pytest.mark.parametrize("program", ["supabase_python.py", "supabase_js.mjs"])
async def test_official_client(gateway: GatewayProcess, supabase: SupabaseServer, tmp_path: Path, program: str) -> None:
    """People whom the gateway has never seen before: they come with tokens of Supabase's own."""
    emails = [f"{name}-{uuid.uuid4().hex[:8]}@example.com" for name in ("ann", "bob")]
    more = {
        "GATEWAY_URL": f"http://127.0.0.1:{gateway.port}",
        "SUPABASE_URL": supabase.url,
        "SUPABASE_ANON_KEY": ANON_KEY,
        "EMAILS": ",".join(emails),
    }
    client = Client(base_url(gateway), "")
    ended = await run(client, _command(program, tmp_path), home=tmp_path, cwd=_ROOT, seconds=120, more=more)
    assert ended.status == 0, ended.errors
    seen = [msgspec.json.decode(line, type=Seen) for line in ended.output.splitlines() if line.startswith('{"email"')]
    assert [(one.email, one.history, one.notes) for one in seen] == [
        (email, [f"I am {email}"], [f"note of {email}"]) for email in emails
    ]
    assert len({one.id for one in seen}) == 2


def _command(program: str, folder: Path) -> list[str | Path]:
    if program.endswith(".py"):
        return [installs.PYTHON, "-m", f"tests.services.clients.{Path(program).stem}"]
    shutil.copy(_CLIENTS / program, folder)
    (folder / "node_modules").symlink_to(installs.NODE_MODULES)
    return [installs.NODE, folder / program]


async def test_users_see_nothing_of_each_other(gateway: GatewayProcess) -> None:
    ann, bob = await registered(gateway), await registered(gateway)
    for person, message in ((ann, "a secret of Ann"), (bob, "a secret of Bob")):
        assert (await person.say(message)).status == 200
    for person, other in ((ann, "Bob"), (bob, "Ann")):
        for path in ("chat/history", "user/export", "agent/memory", "user/usage"):
            said = await person.ask("GET", f"/api/v1/{path}")
            assert said.status == 200
            assert f"a secret of {other}" not in said.text
