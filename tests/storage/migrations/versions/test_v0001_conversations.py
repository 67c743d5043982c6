from sqlalchemy import Connection, inspect

from gateway.storage.address import Address
from tests.storage.databases import opened, run


async def test_tables_and_their_keys(address: Address) -> None:
    async with opened(address):
        pass
    keys = await run(address, _keys)
    assert (
        keys.items()
        >= {
            "alembic_version": ["version_num"],
            "outcomes": ["owner", "key"],
            "pins": ["owner", "agent_id", "chat"],
            "responses": ["owner", "id"],
            "waiting_calls": ["owner", "call_id"],
        }.items()
    )


def _keys(connection: Connection) -> dict[str, list[str]]:
    inspector = inspect(connection)
    return {name: inspector.get_pk_constraint(name)["constrained_columns"] for name in inspector.get_table_names()}
