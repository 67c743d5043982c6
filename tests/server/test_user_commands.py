import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import structlog
from click.testing import CliRunner, Result

from gateway.__main__ import main
from gateway.accounts.errors import AccountBlocked, InvalidCredentials, InvalidToken
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.protocol import Tokens
from gateway.accounts.profiles import Profiles
from gateway.accounts.secrets import Secrets
from gateway.accounts.user_keys import PREFIX, UserKey, UserKeys
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from tests.accounts.identities import EMAIL, HOME, PASSWORD, SECRET_KEY, local_identity

T = TypeVar("T")

BOB = "bob@example.com"
NEW_PASSWORD = "another fine password"


class Desk:
    """A gateway's folder, and the command line on it while no gateway runs."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def see(self, work: Callable[[Database, LocalIdentity], Awaitable[T]]) -> T:
        """Do something with the database, as the gateway would."""

        async def opened() -> T:
            database = await Database.open(SqliteFile(self.home / "gateway.db"))
            try:
                return await work(database, local_identity(database))
            finally:
                await database.close()

        return asyncio.run(opened())

    def register(self, email: str) -> Tokens:
        return self.see(lambda _, identity: identity.register(email, PASSWORD, HOME))

    def login(self, password: str = PASSWORD) -> Tokens:
        return self.see(lambda _, identity: identity.login(EMAIL, password, HOME))

    def key_of(self, plaintext: str) -> UserKey | None:
        return self.see(lambda database, _: UserKeys(database, Secrets.from_key(SECRET_KEY)).find(plaintext))

    def run(self, *arguments: str, **environment: str) -> Result:
        usual = {
            "LETTA_BASE_URL": "http://127.0.0.1:9",
            "LETTA_GATEWAY_HOME": str(self.home),
            "SECRET_KEY": SECRET_KEY,
        }
        return CliRunner().invoke(main, arguments, env={**usual, **environment})

    @property
    def where(self) -> str:
        return f"letta-gateway: database {self.home}/gateway.db; Letta http://127.0.0.1:9\n"

    def lines(self, *arguments: str) -> list[str]:
        """Run what works, and return what it says."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stderr) == (0, self.where)
        return result.stdout.splitlines()

    def refused(self, *arguments: str, **environment: str) -> str:
        """Run what does not work, and return the one line that says why."""
        result = self.run(*arguments, **environment)
        assert (result.exit_code, result.stdout) == (2, "")
        *where, line = result.stderr.splitlines()
        assert len(where) <= 1
        return line.removeprefix("letta-gateway: ")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    root, configured = logging.getLogger(), structlog.get_config()
    before = list(root.handlers), root.level, logging.getLogger("aiohttp.server").disabled
    yield Desk(tmp_path / "home")
    structlog.configure(**configured)
    root.handlers[:], root.level, logging.getLogger("aiohttp.server").disabled = before


@pytest.fixture
def ada(desk: Desk) -> Tokens:
    return desk.register(EMAIL)


@pytest.mark.parametrize(
    "arguments",
    [("users", "list"), ("users", "delete", EMAIL, "--yes"), ("keys", "list", EMAIL), ("keys", "make", EMAIL, "x")],
)
def test_installation_that_is_not_there_is_not_made(desk: Desk, arguments: tuple[str, ...]) -> None:
    """As that of the shell's user, where the service has its own."""
    result = desk.run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    where, why = result.stderr.splitlines()
    assert f"{where}\n" == desk.where
    assert why.startswith(f"letta-gateway: there is no database {desk.home}/gateway.db: ")
    assert not desk.home.exists()


def test_users_are_listed(desk: Desk, ada: Tokens) -> None:
    bob = desk.register(BOB)
    assert desk.lines("users", "list") == [f"{ada.user_id}  {EMAIL}", f"{bob.user_id}  {BOB}"]
    assert desk.lines("users", "list", "--search", "BOB") == [f"{bob.user_id}  {BOB}"]
    assert desk.lines("users", "list", "--search", "%") == []


@pytest.mark.parametrize("by", ["id", "email"])
def test_user_is_blocked_and_let_in_again(desk: Desk, ada: Tokens, by: str) -> None:
    user = ada.user_id if by == "id" else f" {EMAIL.upper()} "
    assert desk.lines("users", "block", user) == [f"{EMAIL} is blocked"]
    assert desk.lines("users", "list") == [f"{ada.user_id}  {EMAIL}  blocked"]
    with pytest.raises(AccountBlocked):
        desk.login()
    assert desk.lines("users", "unblock", user) == [f"{EMAIL} is not blocked any more"]
    desk.login()


def test_biller_that_is_down_leaves_the_user_blocked(desk: Desk, ada: Tokens) -> None:
    billed = {
        "LETTA_GATEWAY_BILLING": "litellm",
        "LITELLM_BASE_URL": "http://127.0.0.1:9",
        "LITELLM_MASTER_KEY": "sk-master",
        "LETTA_GATEWAY_USER_MODEL": "openai/gpt",
    }
    with_key = Secrets.from_key(SECRET_KEY).encrypt("sk-of-ada")
    desk.see(lambda database, _: Profiles(database).change(ada.user_id, litellm_key=with_key))
    for command in ("block", "unblock"):
        assert desk.refused("users", command, EMAIL, **billed).startswith("The billing service")
        assert desk.lines("users", "list") == [f"{ada.user_id}  {EMAIL}  blocked"]
    desk.lines("users", "unblock", EMAIL)
    desk.login()


def test_new_password_ends_the_sessions(desk: Desk, ada: Tokens) -> None:
    said = desk.lines("users", "set-password", EMAIL, "--password", NEW_PASSWORD)
    assert said == [f"{EMAIL} has a new password, and is logged out everywhere"]
    with pytest.raises(InvalidToken):
        desk.see(lambda _, identity: identity.verify(ada.access_token))
    with pytest.raises(InvalidCredentials):
        desk.login()
    assert desk.login(NEW_PASSWORD).user_id == ada.user_id
    assert "password" in desk.refused("users", "set-password", EMAIL, "--password", "short")


def test_passwords_of_an_identity_service_are_changed_there(desk: Desk, ada: Tokens) -> None:
    elsewhere = {
        "LETTA_GATEWAY_IDENTITY": "supabase",
        "SUPABASE_URL": "http://127.0.0.1:9",
        "SUPABASE_ANON_KEY": "anon",
    }
    said = desk.refused("users", "set-password", EMAIL, "--password", NEW_PASSWORD, **elsewhere)
    assert said.startswith("The identity service keeps the users' passwords: ")
    desk.login()


def test_deletion_asks_first_and_closes_the_account_though_letta_is_down(desk: Desk, ada: Tokens) -> None:
    assert desk.run("users", "delete", EMAIL).exit_code == 1
    desk.login()
    assert desk.refused("users", "delete", EMAIL, "--yes").startswith("The account is closed")
    with pytest.raises(InvalidCredentials):
        desk.login()


def test_keys_are_made_listed_and_deleted(desk: Desk, ada: Tokens) -> None:
    described, plaintext = desk.lines("keys", "make", EMAIL, "laptop")
    assert plaintext.startswith(PREFIX)
    key = desk.key_of(plaintext)
    assert key is not None
    assert key.user_id == ada.user_id
    assert desk.lines("keys", "list", ada.user_id) == [described] == [f"{key.id}  ...{plaintext[-4:]}  laptop"]
    desk.register(BOB)
    assert "no key of this id" in desk.refused("keys", "delete", BOB, key.id)
    assert desk.lines("keys", "delete", EMAIL, key.id) == [f"key {key.id} is deleted"]
    assert desk.key_of(plaintext) is None
    assert desk.lines("keys", "list", EMAIL) == []


@pytest.mark.parametrize("user", ["nobody", "nobody@example.com", "' OR 1=1 --", ""])
def test_user_who_is_not_known(desk: Desk, ada: Tokens, user: str) -> None:
    for command in (("users", "block"), ("users", "unblock"), ("keys", "list")):
        assert desk.refused(*command, user).startswith("No user has this id or e-mail.")


def test_what_is_no_address(desk: Desk, ada: Tokens) -> None:
    assert desk.refused("users", "block", "a@b@c").startswith("This is no e-mail address.")


def test_shared_database_without_its_secret_is_one_line(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("no folder")
    assert "there is no database" in desk.refused("users", "list", LETTA_GATEWAY_HOME=str(folder))
    desk.register(EMAIL)
    assert "SECRET_KEY" in desk.refused("users", "list", SECRET_KEY="short")
