"""Pinned chats, waiting tool calls, outcomes of idempotent requests, stored responses."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    _pins()
    _waiting_calls()
    _outcomes()
    _responses()


def _pins() -> None:
    op.create_table(
        "pins",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("chat", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text, nullable=False),
        sa.Column("seen", sa.LargeBinary, nullable=False),
        sa.Column("instructions", sa.LargeBinary),
        sa.Column("is_settled", sa.Boolean, nullable=False),
        sa.Column("pinned_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", "agent_id", "chat", name="pk_pins"),
    )
    op.create_index("ix_pins_agent_id", "pins", ["agent_id"])


def _waiting_calls() -> None:
    op.create_table(
        "waiting_calls",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("call_id", sa.Text, nullable=False),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("chat", sa.Text),
        sa.Column("is_ephemeral", sa.Boolean, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("asked_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", "call_id", name="pk_waiting_calls"),
    )
    op.create_index("ix_waiting_calls_call_id", "waiting_calls", ["call_id"])
    op.create_index("ix_waiting_calls_owner_agent_id", "waiting_calls", ["owner", "agent_id"])
    op.create_index("ix_waiting_calls_asked_at", "waiting_calls", ["asked_at"])


def _outcomes() -> None:
    op.create_table(
        "outcomes",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("request", sa.LargeBinary, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("ended_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name="pk_outcomes"),
    )
    op.create_index("ix_outcomes_ended_at", "outcomes", ["ended_at"])


def _responses() -> None:
    op.create_table(
        "responses",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("previous_id", sa.Text),
        sa.Column("input_items", sa.LargeBinary, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", "id", name="pk_responses"),
    )
    op.create_index("ix_responses_created_at", "responses", ["created_at"])
