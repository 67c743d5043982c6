"""What the platform API answers of accounts: a user, a session, and what belongs to them.

Times are UTC seconds. Nothing secret is here but what its owner is shown once.
"""

from typing import Literal

import msgspec

from gateway.accounts.identity.protocol import Tokens
from gateway.accounts.profiles import Profile
from gateway.accounts.user_keys import UserKey
from gateway.translation.platform_types import dollars


class UserAgent(msgspec.Struct, frozen=True):
    """Which agent is the user's own."""

    id: str


class NamedAgent(UserAgent, frozen=True):
    """The user's own agent; ``name`` is the model of the OpenAI surface, None where Letta does not tell just now."""

    name: str | None


class UserAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A user, as they see themselves; ``agent`` is None until it is made, ``metadata`` is their own JSON object."""

    id: str
    email: str | None
    name: str
    metadata: msgspec.Raw
    agent: NamedAgent | None
    created_at: float


class SessionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A session that has begun or goes on; ``expires_in`` is the access token's, in seconds."""

    user: UserAnswer
    access_token: str
    refresh_token: str
    token_type: str
    expires_in: int


class ConfirmationAnswer(msgspec.Struct, frozen=True):
    """A registration that waits for its e-mail to be confirmed: then the user can log in."""

    message: str


def user_answer(profile: Profile, agent_name: str | None) -> UserAnswer:
    """Return a user as they see themselves; ``agent_name`` is what their agent is called, as far as it is known."""
    return UserAnswer(
        id=profile.id,
        email=profile.email or None,
        name=profile.name,
        metadata=msgspec.Raw(profile.metadata),
        agent=None if profile.letta_agent_id is None else NamedAgent(profile.letta_agent_id, agent_name),
        created_at=profile.created_at,
    )


def session_answer(user: UserAnswer, tokens: Tokens) -> SessionAnswer:
    """Return a session as its client gets it, the one time that the tokens are told."""
    return SessionAnswer(
        user=user,
        access_token=tokens.access_token,
        refresh_token=tokens.refresh_token,
        token_type="bearer",  # noqa: S106 - RFC 6750, and no token
        expires_in=tokens.expires_in,
    )


class AgentAnswer(msgspec.Struct, frozen=True):
    """An agent as its user sees it; ``model`` is the handle on Letta, ``created_at`` None where it does not tell."""

    id: str
    name: str
    model: str | None
    created_at: float | None
    tools: tuple[str, ...]


class AgentStatus(msgspec.Struct, frozen=True):
    """Whether the user has an agent: ``missing`` until it is made, and where Letta has it no more."""

    state: Literal["ready", "missing"]
    agent: AgentAnswer | None = None


class MemoryBlockAnswer(msgspec.Struct, frozen=True):
    """A piece of memory that is always before the agent; ``limit`` is in characters."""

    label: str
    value: str
    description: str | None
    limit: int | None
    is_read_only: bool


class MemoryAnswer(msgspec.Struct, frozen=True):
    """What an agent has in its memory."""

    data: tuple[MemoryBlockAnswer, ...]


class BudgetAnswer(msgspec.Struct, frozen=True):
    """What a user may spend in a period of UTC's calendar; ``amount`` is in US dollars."""

    amount: str
    period: Literal["day", "month", "total"]


class AdminUser(msgspec.Struct, frozen=True, kw_only=True):
    """A user, as the operator sees them; ``budget`` is None where the default one holds."""

    id: str
    email: str | None
    name: str
    metadata: msgspec.Raw
    agent: UserAgent | None
    is_blocked: bool
    budget: BudgetAnswer | None
    created_at: float
    updated_at: float


class AdminUserPage(msgspec.Struct, frozen=True):
    """Some users, oldest first; ``next_cursor`` asks for those behind them, None: there are no more."""

    data: tuple[AdminUser, ...]
    next_cursor: str | None


def admin_user(profile: Profile) -> AdminUser:
    """Return a user as the operator sees them."""
    budget = profile.budget
    return AdminUser(
        id=profile.id,
        email=profile.email or None,
        name=profile.name,
        metadata=msgspec.Raw(profile.metadata),
        agent=None if profile.letta_agent_id is None else UserAgent(profile.letta_agent_id),
        is_blocked=profile.is_blocked,
        budget=None if budget is None else BudgetAnswer(dollars(budget.micros), budget.period),
        created_at=profile.created_at,
        updated_at=profile.updated_at,
    )


class KeyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A personal API key as its user sees it later; ``hint`` is its end."""

    id: str
    name: str
    hint: str
    created_at: float
    last_used_at: float | None


class NewKeyAnswer(KeyAnswer, frozen=True, kw_only=True):
    """A personal API key as its user sees it once: ``key`` is nowhere else."""

    key: str


class KeysAnswer(msgspec.Struct, frozen=True):
    """A user's personal API keys, newest first."""

    data: tuple[KeyAnswer, ...]


def key_answer(key: UserKey) -> KeyAnswer:
    """Return a key as its user sees it later."""
    return KeyAnswer(id=key.id, name=key.name, hint=key.hint, created_at=key.created_at, last_used_at=key.last_used_at)


def new_key_answer(key: UserKey, plaintext: str) -> NewKeyAnswer:
    """Return a key as its user sees it once."""
    return NewKeyAnswer(
        id=key.id,
        name=key.name,
        hint=key.hint,
        created_at=key.created_at,
        last_used_at=key.last_used_at,
        key=plaintext,
    )
