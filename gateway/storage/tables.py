"""The tables. Times are UTC seconds since the epoch; an owner comes from a credential and is part of every key."""

from typing import Final

from sqlalchemy import Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

pins: Final = Table(
    "pins",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("agent_id", Text, primary_key=True),
    Column("chat", Text, primary_key=True),
    Column("conversation_id", Text, nullable=False),
    Column("seen", LargeBinary, nullable=False),
    Column("instructions", LargeBinary),
    Column("is_settled", Boolean, nullable=False),
    Column("pinned_at", Double, nullable=False),
    Index(None, "agent_id"),
)
"""Which Letta conversation a chat has."""

waiting_calls: Final = Table(
    "waiting_calls",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("call_id", Text, primary_key=True),
    Column("agent_id", Text, nullable=False),
    Column("conversation_id", Text),
    Column("chat", Text),
    Column("is_ephemeral", Boolean, nullable=False),
    Column("name", Text, nullable=False),
    Column("asked_at", Double, nullable=False),
    Index(None, "call_id"),
    Index(None, "owner", "agent_id"),
    Index(None, "asked_at"),
)
"""Tool calls that wait for the client's results."""

outcomes: Final = Table(
    "outcomes",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request", LargeBinary, nullable=False),
    Column("status", Integer, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("ended_at", Double, nullable=False),
    Index(None, "ended_at"),
)
"""What a request with an idempotency key came to."""

responses: Final = Table(
    "responses",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("agent_id", Text, nullable=False),
    Column("conversation_id", Text),
    Column("previous_id", Text),
    Column("input_items", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "created_at"),
)
"""Responses that a client asked to store."""
