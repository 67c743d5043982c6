"""How users come to be: identity, profile, billing account, agent; the next login finishes what is missing.

Without an identity nothing else is made. Whoever has one has an account: a Letta or a biller that does not answer
delays the agent, never the login.
"""

import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from gateway.accounts.agents import PersonalAgents
from gateway.accounts.deletion import Deletion
from gateway.accounts.errors import InvalidToken, RegistrationClosed
from gateway.accounts.identity.protocol import IdentityProvider, NewUser, Tokens, Verified
from gateway.accounts.profiles import Profile, Profiles, canonical
from gateway.errors import GatewayError, InvalidRequest, StorageUnavailable

AGENT_WAIT: Final = 10.0
"""Seconds that a login waits for an agent that is yet to be made: then it goes on, and so does the making."""
MAX_NAME: Final = 100
"""Characters of a user's name."""

_log: Final = structlog.get_logger("gateway.accounts")


class RegistrationConfig(msgspec.Struct, frozen=True):
    """How long a login waits for its agent, in seconds."""

    agent_wait: float = AGENT_WAIT


class Registration:
    """Makes users, and what belongs to them; ``is_open`` tells whether they may register themselves now."""

    def __init__(
        self,
        *,
        identity: IdentityProvider,
        profiles: Profiles,
        agents: PersonalAgents,
        deletion: Deletion,
        is_open: Callable[[], bool],
        config: RegistrationConfig = RegistrationConfig(),  # noqa: B008 - it is frozen
        now: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._profiles = profiles
        self._agents = agents
        self._deletion = deletion
        self._is_open = is_open
        self._config = config
        self._now = now

    async def register(
        self, email: str, password: str, name: str | None, address: str
    ) -> tuple[Profile | None, Tokens | None]:
        """Make a user who asks for it themselves; raises ``RegistrationClosed``, and what ``create`` raises."""
        if not self._is_open():
            raise RegistrationClosed
        return await self.create(email, password, name, address)

    async def create(
        self, email: str, password: str, name: str | None, address: str | None
    ) -> tuple[Profile | None, Tokens | None]:
        """Make a user; neither profile nor tokens before the e-mail is confirmed, where it has to be.

        ``address`` is None where the operator makes them. Raises ``InvalidRequest`` for an e-mail or a name that is
        none, and what the identity provider raises.
        """
        wanted, chosen = canonical(email), checked_name(name)
        made = await self._identity.register(wanted, password, address)
        if isinstance(made, NewUser):
            return None, None
        profile = await self._profile(made.user_id, made.email, chosen)
        return await self._with_agent(profile), made

    async def login(self, email: str, password: str, address: str) -> tuple[Profile, Tokens]:
        """Begin a session, and finish what a registration left undone; raises what the identity provider raises."""
        tokens = await self._identity.login(canonical(email), password, address)
        profile = await self._profile(tokens.user_id, tokens.email, "")
        return await self._with_agent(profile), tokens

    async def complete(self, verified: Verified) -> Profile:
        """Return the profile of a token's user, made where the token is the first that is seen of them.

        An e-mail that a token tells later than the profile was changed is the user's new one.

        Raises ``InvalidToken`` where the user was deleted, or is nobody the gateway can keep.
        """
        return await self._profile(verified.user_id, verified.email or "", "", verified.issued_at)

    async def delete(self, user_id: str) -> None:
        """Delete a user and all that is theirs; raises as ``Deletion.delete`` does."""
        await self._deletion.delete(user_id)

    async def _profile(self, user_id: str, email: str, name: str, told_at: float | None = None) -> Profile:
        """Return the user's profile, made where there is none, with the e-mail that is theirs since ``told_at``."""
        wanted = _known_email(email)
        known = await self._profiles.find(user_id)
        if known is None:
            return await self._new_profile(user_id, wanted, name)
        if wanted and wanted != known.email and (told_at is None or told_at > known.updated_at):
            known = await self._profiles.take_email(user_id, wanted) or known
        if name and not known.name:
            return await self._profiles.change(user_id, name=name) or known
        return known

    async def _new_profile(self, user_id: str, email: str, name: str) -> Profile:
        if await self._deletion.is_deleted(user_id):
            raise InvalidToken
        now = self._now()
        profile = Profile(id=user_id, email=email, name=name, created_at=now, updated_at=now)
        if await self._profiles.add_with_email(profile):
            return profile
        known = await self._profiles.find(user_id)  # the same user, at the same time
        if known is None:
            raise InvalidToken  # and deleted since
        return known

    async def _with_agent(self, profile: Profile) -> Profile:
        """Return the profile with its agent; without one where that cannot be made just now."""
        try:
            return await self._agents.ensure_within(profile, self._config.agent_wait)
        except StorageUnavailable:
            raise
        except (GatewayError, TimeoutError) as error:
            reason = error.code if isinstance(error, GatewayError) else "timeout"
            _log.warning("agent not made yet", user=profile.id, code=reason)
            return profile


def _known_email(told: str) -> str:
    """Return an e-mail as it is kept; empty where an identity service tells none, or something else."""
    try:
        return canonical(told) if told else ""
    except InvalidRequest:
        return ""


def checked_name(name: str | None) -> str:
    """Return a user's name as it is kept; raises ``InvalidRequest``."""
    text = (name or "").strip()
    if len(text) > MAX_NAME or not text.isprintable():
        raise InvalidRequest(f"A name is one line of at most {MAX_NAME} characters: change it.", param="name")
    return text
