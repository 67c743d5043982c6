import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import asyncpg
import pytest
from sqlalchemy import delete, insert, update

from gateway.storage.address import Address, PostgresServer
from gateway.storage.engine import Database
from gateway.storage.migrations.versions import v0003_row_level_security as migration
from gateway.storage.migrations.versions import v0005_operator_page as later
from gateway.storage.migrations.versions import v0006_users_of_elsewhere as newest
from gateway.storage.tables import messages, metadata, turns, usage_metrics, user_profiles
from tests.live.postgres import Postgres
from tests.storage.databases import new_database, opened

ANN: Final = "11111111-1111-4111-8111-111111111111"
BOB: Final = "22222222-2222-4222-8222-222222222222"
SHOWN: Final = {"messages": "user_id", "usage_metrics": "owner", "user_profiles": "id"}
NOBODIES: Final[tuple[object, ...]] = (
    None,
    "",
    {},
    {"sub": None},
    {"sub": ""},
    {"role": "authenticated"},
    {"sub": "*"},
)
HIDDEN: Final = sorted({*metadata.tables, "alembic_version"} - set(SHOWN))

_ROLES: Final = """
do $$ begin
  if not exists (select from pg_roles where rolname = 'anon') then
    create role anon login; create role authenticated login; create role reader login;
  end if;
end $$;
"""
_AS_SUPABASE_DOES: Final = "alter default privileges in schema public grant all on {} to anon, authenticated"


def selecting(table: str, columns: str = "1") -> str:
    return f"select {columns} from {table}"  # noqa: S608 - names of our own


class Role:
    """Somebody who is not the gateway, with a database connection of their own."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def run(self, sql: str, claims: object = None) -> Sequence[Any]:
        """Run SQL in a transaction, as PostgREST does for the bearer of these claims."""
        async with self._connection.transaction():
            if claims is not None:
                said = claims if isinstance(claims, str) else json.dumps(claims)
                await self._connection.execute("select set_config('request.jwt.claims', $1, true)", said)
            found: Sequence[Any] = await self._connection.fetch(sql)
            return found

    async def is_refused(self, sql: str) -> None:
        """Check that one with a valid token may not do that."""
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await self.run(sql, {"sub": ANN})

    async def owners(self, table: str, claims: object = None) -> list[str]:
        """Return whose rows of a table are seen."""
        return sorted(row[0] for row in await self.run(selecting(table, SHOWN[table]), claims))


@pytest.fixture
def supabase(postgres: Postgres) -> PostgresServer:
    """A database with the roles that Supabase has, which get every right on new tables."""
    address = new_database(postgres)
    postgres.run(_ROLES)
    name = address.url.rpartition("/")[2].partition("?")[0]
    for kind in ("tables", "sequences"):
        postgres.run(_AS_SUPABASE_DOES.format(kind), name)
    return address


@pytest.fixture
async def filled(supabase: PostgresServer) -> AsyncIterator[Database]:
    async with opened(supabase) as database:
        await fill(database)
        yield database


async def fill(database: Database) -> None:
    async with database.write() as connection:
        for number, user in enumerate((ANN, BOB)):
            await connection.execute(insert(user_profiles).values(profile(user)))
            await connection.execute(insert(messages).values(message(user, number)))
            await connection.execute(insert(usage_metrics).values(day(user)))
            await connection.execute(insert(turns).values(turn(user)))


def profile(user: str) -> dict[str, Any]:
    row = {"id": user, "email": f"{user}@example.com", "name": "", "metadata": "{}", "litellm_key": "secret"}
    return {**row, "is_blocked": False, "created_at": 1.0, "updated_at": 1.0}


def message(user: str, number: int) -> dict[str, Any]:
    row = {"id": f"message-{number}", "user_id": user, "instance": "i", "role": "user", "status": "complete"}
    return {**row, "text": "hello", "reasoning": "", "activity": "[]", "created_at": 1.0}


def day(user: str) -> dict[str, Any]:
    counts = dict.fromkeys(("turns", "failed_turns", "prompt_tokens", "completion_tokens", "cached_tokens"), 1)
    return {
        "owner": user,
        "day": "2026-11-21",
        "model": "m",
        "source": "s",
        **counts,
        "reasoning_tokens": 1,
        "cost_micros": 1,
    }


def turn(user: str) -> dict[str, Any]:
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"), 1)
    row = {"id": f"turn-{user}", "owner": user, "source": "s", "agent_id": "a", "instance": "i", "status": "complete"}
    return {**row, "model": "m", **counts, "cost_micros": 1, "held_micros": 0, "started_at": 1.0}


async def role_of(address: PostgresServer, name: str) -> Role:
    return Role(await asyncpg.connect(address.url.replace("postgres@", f"{name}@")))


@pytest.fixture
async def authenticated(filled: Database, supabase: PostgresServer) -> AsyncIterator[Role]:
    role = await role_of(supabase, "authenticated")
    yield role
    await role._connection.close()


@pytest.fixture
async def anon(filled: Database, supabase: PostgresServer) -> AsyncIterator[Role]:
    role = await role_of(supabase, "anon")
    yield role
    await role._connection.close()


async def test_every_kind_of_database_takes_the_migration(address: Address) -> None:
    async with opened(address) as database:
        await fill(database)


@pytest.mark.live
async def test_every_table_is_secured(filled: Database, postgres: Postgres, supabase: PostgresServer) -> None:
    """A table that is added later has to be secured by its own migration."""
    name = supabase.url.rpartition("/")[2].partition("?")[0]
    ours = "select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    open_ones = f"{ours} and not relrowsecurity"
    assert postgres.run(open_ones, name) == ""
    assert {*metadata.tables, "alembic_version"} == {*migration.TABLES, *later.TABLES, *newest.TABLES}


@pytest.mark.live
async def test_users_see_their_own_rows_and_nobody_sees_others(authenticated: Role) -> None:
    for table in SHOWN:
        for user in (ANN, BOB):
            assert await authenticated.owners(table, {"sub": user, "role": "authenticated"}) == [user]
            # What an earlier request on the connection said is over.
            for nobody in NOBODIES:
                assert await authenticated.owners(table, nobody) == [], (table, nobody)


@pytest.mark.live
async def test_the_rest_is_the_gateways_alone(authenticated: Role, anon: Role) -> None:
    for role, tables in ((authenticated, HIDDEN), (anon, [*SHOWN, *HIDDEN])):
        for table in tables:
            await role.is_refused(selecting(table))


@pytest.mark.live
async def test_key_to_the_biller_is_shown_to_nobody(authenticated: Role) -> None:
    for columns in ("litellm_key", "*", "count(litellm_key)"):
        await authenticated.is_refused(selecting("user_profiles", columns))
    await authenticated.is_refused("select 1 from user_profiles where litellm_key > ''")
    shown = {column.name for column in user_profiles.columns} - {"litellm_key"}
    rows = await authenticated.run(selecting("user_profiles", migration.PROFILE), {"sub": ANN})
    assert [set(row.keys()) for row in rows] == [shown]


WRITING: Final = (
    "update messages set text = 'other'",
    "delete from messages",
    "insert into usage_metrics select owner, '2026-11-22', model, source, 0, 0, 0, 0, 0, 0, 0 from usage_metrics",
    "update user_profiles set budget_micros = 1000000000",
    "update user_profiles set is_blocked = false",
    "truncate messages",
    "alter table messages disable row level security",
    "drop policy own_rows on messages",
    "select nextval('messages_position_seq')",
    "select last_value from messages_position_seq",
)


@pytest.mark.live
async def test_writing_is_refused(authenticated: Role, anon: Role) -> None:
    for sql in WRITING:
        for role in (authenticated, anon):
            await role.is_refused(sql)


@pytest.mark.live
async def test_role_with_every_right_is_held_by_the_policies(
    filled: Database, supabase: PostgresServer, postgres: Postgres
) -> None:
    """Whom the operator let in after the migration."""
    name = supabase.url.rpartition("/")[2].partition("?")[0]
    postgres.run("grant all on all tables in schema public to reader", name)
    postgres.run("grant all on all sequences in schema public to reader", name)
    role = await role_of(supabase, "reader")
    for table, column in SHOWN.items():
        assert await role.owners(table, {"sub": ANN}) == [ANN]
        assert await role.owners(table) == []
        for change in (update(metadata.tables[table]).values({column: "x"}), delete(metadata.tables[table])):
            assert (
                await role.run(f"{change.compile(compile_kwargs={'literal_binds': True})} returning 1", {"sub": ANN})
                == []
            )
    for table in HIDDEN:
        assert await role.run(selecting(table), {"sub": ANN}) == []
    await role.is_refused("insert into instances values ('mine', 1)")
    await role._connection.close()


@pytest.mark.live
async def test_gateway_itself_sees_and_changes_all(filled: Database) -> None:
    async with filled.write() as connection:
        for table in (messages, turns, usage_metrics, user_profiles):
            assert (
                await connection.execute(table.update().values({column.name: column for column in table.columns}))
            ).rowcount == 2
