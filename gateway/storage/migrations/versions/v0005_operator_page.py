"""What the operator changes on the page: settings, and sessions that were ended before their time."""

import sqlalchemy as sa
from alembic import op

from gateway.storage.migrations.versions.v0003_row_level_security import ROLES, role_is_there

revision = "0005"
down_revision = "0004"

TABLES = ("changed_settings", "ended_operator_sessions")


def upgrade() -> None:
    """Make the tables, and hide them from others as all the rest."""
    op.create_table(
        "changed_settings",
        sa.Column("field", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("field", name="pk_changed_settings"),
    )
    op.create_table(
        "ended_operator_sessions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ended_operator_sessions"),
    )
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    for role in ROLES:
        if role_is_there(role):
            op.execute(f"REVOKE ALL ON {', '.join(TABLES)} FROM {role}")
