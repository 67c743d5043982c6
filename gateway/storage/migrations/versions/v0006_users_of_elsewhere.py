"""Users of an identity service: e-mails that are not known, and sessions that were ended before their tokens."""

import sqlalchemy as sa
from alembic import op

from gateway.storage.migrations.versions.v0003_row_level_security import ROLES, role_is_there

revision = "0006"
down_revision = "0005"

TABLES = ("ended_sessions",)


def upgrade() -> None:
    """Let several users have no e-mail; make the table, and hide it from others as all the rest."""
    op.drop_index("ix_user_profiles_email", "user_profiles", if_exists=True)
    is_known = sa.text("email <> ''")
    op.create_index(
        "ix_user_profiles_email",
        "user_profiles",
        ["email"],
        unique=True,
        sqlite_where=is_known,
        postgresql_where=is_known,
    )
    op.create_table(
        "ended_sessions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ended_sessions"),
    )
    op.create_index("ix_ended_sessions_user_id", "ended_sessions", ["user_id"])
    op.create_index("ix_ended_sessions_expires_at", "ended_sessions", ["expires_at"])
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute("ALTER TABLE ended_sessions ENABLE ROW LEVEL SECURITY")
    for role in ROLES:
        if role_is_there(role):
            op.execute(f"REVOKE ALL ON ended_sessions FROM {role}")
