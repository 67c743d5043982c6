"""The tables.

Times are UTC seconds since the epoch, money is whole millionths of a US dollar (``micros``). An owner comes from a
credential and is part of every key: an API key of the operator's, this machine, or a user's id.
"""

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text, text

Counter: Final = BigInteger().with_variant(Integer, "sqlite")
"""What counts up by itself in both databases."""

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
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Index(None, "agent_id"),
)
"""Which Letta conversation a chat has; ``fence`` is that of the lease under which it was written."""

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
"""What a request with an idempotency key came to, and which requests SDKs may send again."""

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

# Accounts ------------------------------------------------------------------------------------------------------------

user_profiles: Final = Table(
    "user_profiles",
    metadata,
    Column("id", Text, primary_key=True),
    Column("email", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("letta_agent_id", Text),
    Column("litellm_key", Text),
    Column("is_blocked", Boolean, nullable=False),
    Column("budget_micros", BigInteger),
    Column("budget_period", Text),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(None, "email", unique=True, sqlite_where=text("email <> ''"), postgresql_where=text("email <> ''")),
    Index(None, "letta_agent_id", unique=True),
    Index(None, "created_at", "id"),
)
"""Users, whoever knows their passwords; ``metadata`` is a JSON object of theirs, ``litellm_key`` is encrypted.

``email`` is empty where it is not known, and nobody else's otherwise.
"""

passwords: Final = Table(
    "passwords",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("hash", Text, nullable=False),
    Column("changed_at", Double, nullable=False),
)
"""The passwords of users whose identity is the gateway's own, as argon2id hashes."""

sessions: Final = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index(None, "user_id"),
    Index(None, "expires_at"),
)
"""Sessions that stand: ending one deletes it, and with it the family of its refresh tokens."""

refresh_tokens: Final = Table(
    "refresh_tokens",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("issued_at", Double, nullable=False),
    Column("used_at", Double),
    Index(None, "session_id"),
)
"""Refresh tokens by their hash; one that is used a second time ends its session."""

ended_sessions: Final = Table(
    "ended_sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index(None, "user_id"),
    Index(None, "expires_at"),
)
"""Sessions of an identity service that ended before their tokens; a user's id stands for all of theirs."""

user_keys: Final = Table(
    "user_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("name", Text, nullable=False),
    Column("hint", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double),
    Index(None, "user_id"),
    Index(None, "hash", unique=True),
)
"""Personal API keys by their hash; ``hint`` is their end, by which people tell them apart."""

messages: Final = Table(
    "messages",
    metadata,
    Column("position", Counter, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("turn_id", Text),
    Column("instance", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("reasoning", Text, nullable=False),
    Column("activity", Text, nullable=False),
    Column("error_code", Text),
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),
    Index(None, "id", unique=True),
    Index(None, "user_id", "position"),
    Index(None, "turn_id"),
    Index(None, "status", "instance"),
)
"""What users and their agents said to each other by the platform API; ``activity`` is a JSON array."""

turns: Final = Table(
    "turns",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("conversation_id", Text),
    Column("key_id", Text),
    Column("instance", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cost_micros", BigInteger, nullable=False),
    Column("held_micros", BigInteger, nullable=False),
    Column("period", Text),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Index(None, "owner", "started_at"),
    Index(None, "status", "instance"),
)
"""The ledger: a row is written before its turn is sent, and settled once; ``period`` is what it was held from."""

usage_metrics: Final = Table(
    "usage_metrics",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("turns", BigInteger, nullable=False),
    Column("failed_turns", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cost_micros", BigInteger, nullable=False),
    Index(None, "day"),
)
"""Sums of settled turns by day (``2026-11-21``, UTC, of the turn's start), written with the turn's own row."""

spending: Final = Table(
    "spending",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("spent_micros", BigInteger, nullable=False),
    Column("held_micros", BigInteger, nullable=False),
)
"""What an owner with a budget has spent in a period (``2026-11-21``, ``2026-11``, ``total``), and what running turns
hold of the rest."""

instances: Final = Table(
    "instances",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seen_at", Double, nullable=False),
)
"""Gateways that share the database: what one has begun is another's to settle once it is seen no more."""

deletions: Final = Table(
    "deletions",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("letta_agent_id", Text),
    Column("begun_at", Double, nullable=False),
    Column("ended_at", Double),
    Index(None, "ended_at"),
)
"""Users who are being deleted, or were lately: a token of theirs that still holds makes no new account."""

# The operator's page -------------------------------------------------------------------------------------------------

changed_settings: Final = Table(
    "changed_settings",
    metadata,
    Column("field", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("changed_at", Double, nullable=False),
)
"""Settings that were changed while the gateway served; ``value`` is as the environment would hold it."""

ended_operator_sessions: Final = Table(
    "ended_operator_sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("expires_at", Double, nullable=False),
)
"""Sessions of the operator's page that were ended before their time, until nobody would take them any more."""
