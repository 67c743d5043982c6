"""Users, their sessions and keys, what they said, and the ledger of what turns took."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
    _user_profiles()
    _passwords()
    _sessions()
    _refresh_tokens()
    _user_keys()
    _messages()
    _turns()
    _usage_metrics()
    _spending()
    _instances()
    _deletions()


def _user_profiles() -> None:
    op.create_table(
        "user_profiles",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("letta_agent_id", sa.Text),
        sa.Column("litellm_key", sa.Text),
        sa.Column("is_blocked", sa.Boolean, nullable=False),
        sa.Column("budget_micros", sa.BigInteger),
        sa.Column("budget_period", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_user_profiles"),
    )
    op.create_index("ix_user_profiles_email", "user_profiles", ["email"], unique=True)
    op.create_index("ix_user_profiles_letta_agent_id", "user_profiles", ["letta_agent_id"], unique=True)
    op.create_index("ix_user_profiles_created_at_id", "user_profiles", ["created_at", "id"])


def _passwords() -> None:
    op.create_table(
        "passwords",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_passwords"),
    )


def _sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"])


def _refresh_tokens() -> None:
    op.create_table(
        "refresh_tokens",
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("issued_at", sa.Double, nullable=False),
        sa.Column("used_at", sa.Double),
        sa.PrimaryKeyConstraint("hash", name="pk_refresh_tokens"),
    )
    op.create_index("ix_refresh_tokens_session_id", "refresh_tokens", ["session_id"])


def _user_keys() -> None:
    op.create_table(
        "user_keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("last_used_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_user_keys"),
    )
    op.create_index("ix_user_keys_user_id", "user_keys", ["user_id"])
    op.create_index("ix_user_keys_hash", "user_keys", ["hash"], unique=True)


def _messages() -> None:
    op.create_table(
        "messages",
        sa.Column("position", COUNTER, nullable=False, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("turn_id", sa.Text),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("reasoning", sa.Text, nullable=False),
        sa.Column("activity", sa.Text, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.PrimaryKeyConstraint("position", name="pk_messages"),
    )
    op.create_index("ix_messages_id", "messages", ["id"], unique=True)
    op.create_index("ix_messages_user_id_position", "messages", ["user_id", "position"])
    op.create_index("ix_messages_turn_id", "messages", ["turn_id"])
    op.create_index("ix_messages_status_instance", "messages", ["status", "instance"])


def _turns() -> None:
    op.create_table(
        "turns",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("key_id", sa.Text),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_micros", sa.BigInteger, nullable=False),
        sa.Column("held_micros", sa.BigInteger, nullable=False),
        sa.Column("period", sa.Text),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_turns"),
    )
    op.create_index("ix_turns_owner_started_at", "turns", ["owner", "started_at"])
    op.create_index("ix_turns_status_instance", "turns", ["status", "instance"])


def _usage_metrics() -> None:
    op.create_table(
        "usage_metrics",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("turns", sa.BigInteger, nullable=False),
        sa.Column("failed_turns", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_micros", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("owner", "day", "model", "source", name="pk_usage_metrics"),
    )
    op.create_index("ix_usage_metrics_day", "usage_metrics", ["day"])


def _spending() -> None:
    op.create_table(
        "spending",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("period", sa.Text, nullable=False),
        sa.Column("spent_micros", sa.BigInteger, nullable=False),
        sa.Column("held_micros", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("owner", "period", name="pk_spending"),
    )


def _instances() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_instances"),
    )


def _deletions() -> None:
    op.create_table(
        "deletions",
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("letta_agent_id", sa.Text),
        sa.Column("begun_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.PrimaryKeyConstraint("user_id", name="pk_deletions"),
    )
    op.create_index("ix_deletions_ended_at", "deletions", ["ended_at"])
