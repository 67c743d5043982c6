"""Row-level security on PostgreSQL: who else reaches the database, as PostgREST does, sees of users what is theirs.

The gateway owns the tables, and owners are not affected. Claims as PostgREST and Supabase hand them down.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = (
    "alembic_version",
    "deletions",
    "instances",
    "messages",
    "outcomes",
    "passwords",
    "pins",
    "refresh_tokens",
    "responses",
    "sessions",
    "spending",
    "turns",
    "usage_metrics",
    "user_keys",
    "user_profiles",
    "waiting_calls",
)
OWN_ROWS = {"messages": "user_id", "usage_metrics": "owner", "user_profiles": "id"}
"""What users may read of their own, by the column that says whose it is."""

# Empty where the setting was made in an earlier transaction of the session; a subquery is computed once per statement.
USER = "(SELECT NULLIF(current_setting('request.jwt.claims', true), '')::json ->> 'sub')"

ROLES = ("anon", "authenticated")
"""Supabase's roles, which have every right on new tables unless told otherwise."""
READER = "authenticated"
PROFILE = "id, email, name, metadata, letta_agent_id, is_blocked, budget_micros, budget_period, created_at, updated_at"
"""The columns of a profile that are their user's to read: all but the key to the biller."""


def upgrade() -> None:
    """Hide every row from others, then show users their own."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    for table, column in OWN_ROWS.items():
        op.execute(f"CREATE POLICY own_rows ON {table} FOR SELECT USING ({column} = {USER})")
    for role in ROLES:
        if role_is_there(role):
            _narrow(role)


def role_is_there(role: str) -> bool:
    """Tell whether the database has a role."""
    found = op.get_bind().execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
    return found.scalar() is not None


def _narrow(role: str) -> None:
    """Take a role of Supabase's every right, and give the users' one back what they may read."""
    op.execute(f"REVOKE ALL ON {', '.join(TABLES)} FROM {role}")
    op.execute(f"REVOKE ALL ON SEQUENCE messages_position_seq FROM {role}")
    if role == READER:
        op.execute(f"GRANT SELECT ON messages, usage_metrics TO {role}")
        op.execute(f"GRANT SELECT ({PROFILE}) ON user_profiles TO {role}")
