"""Whose a credential is: an access token's user, a personal key's, and whether they may come in."""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import msgspec

from gateway.accounts.errors import AccountBlocked, InvalidToken
from gateway.accounts.identity.protocol import Verified
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.recent import Recent
from gateway.accounts.user_keys import UserKeys

REMEMBERED: Final = 5.0
"""Seconds after which a user or a key is looked at again: so long another gateway's change may go unnoticed."""
HELD: Final = 10_000
"""Users and keys that are remembered, and refusals."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks, by the credential alone.

    ``owner`` is the name under which everything is kept; ``user_id`` is there for users, who see no agent but their
    own, ``key_id`` where they came by a personal key, ``session_id`` where by an access token.
    """

    owner: str
    user_id: str | None = None
    key_id: str | None = None
    session_id: str | None = None


class Standing(msgspec.Struct, frozen=True):
    """Whether a user may come in."""

    user_id: str
    is_blocked: bool
    email: str


class Verifier(Protocol):
    """The part of an identity provider that is asked here."""

    async def verify(self, access_token: str) -> Verified:
        """Return whose access token this is; raises ``InvalidToken``."""
        ...


Complete: TypeAlias = Callable[[Verified], Awaitable[Profile]]
"""Makes the profile of a user whom only the identity service knows so far."""


class UserCredentials:
    """The credentials of all users."""

    def __init__(self, identity: Verifier, user_keys: UserKeys, profiles: Profiles, complete: Complete) -> None:
        self._identity = identity
        self._user_keys = user_keys
        self._profiles = profiles
        self._complete = complete
        self._callers: Recent[bytes, Caller] = Recent(HELD, REMEMBERED)
        self._standings: Recent[str, Standing] = Recent(HELD, REMEMBERED)
        self._refused: Recent[bytes | str, bool] = Recent(HELD, REMEMBERED)
        """Keys that are nobody's, by their digest, and users who are no more: none is let in later.

        So who sends one in a loop costs no question to the database each time.
        """

    async def caller_of_key(self, key: str) -> Caller | None:
        """Return whose personal key this is; None where it is nobody's.

        Raises ``AccountBlocked`` and ``StorageUnavailable``.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        if self._refused.get(digest):
            return None
        ticket = self._refused.ticket()
        caller = await self._caller_of_key(key, digest)
        standing = None if caller is None or caller.user_id is None else await self._standing(caller.user_id)
        if standing is None:
            self._refused.put(digest, value=True, ticket=ticket)
            return None
        _admit(standing)
        return caller

    async def caller_of_token(self, token: str) -> Caller:
        """Return whose access token this is.

        Raises ``InvalidToken``, ``AccountBlocked``, ``StorageUnavailable``, and ``UpstreamUnavailable`` where an
        identity service has to be asked and does not answer.
        """
        verified = await self._identity.verify(token)
        if self._refused.get(verified.user_id):
            raise InvalidToken
        standing = await self._standing(verified.user_id)
        if standing is None or _tells_more(verified, standing):
            standing = await self._completed(verified)
        _admit(standing)
        return Caller(verified.user_id, verified.user_id, session_id=verified.session_id)

    def forget(self, user_id: str) -> None:
        """Look at the user and their keys again before the next answer: something of them was changed or deleted."""
        self._callers.forget(lambda _, caller: caller.user_id == user_id)
        self._standings.forget(lambda known, _: known == user_id)
        self._refused.forget(lambda refused, _: refused == user_id)

    async def _completed(self, verified: Verified) -> Standing:
        ticket = self._refused.ticket()
        try:
            profile = await self._complete(verified)
        except InvalidToken:
            self._refused.put(verified.user_id, value=True, ticket=ticket)
            raise
        return Standing(profile.id, profile.is_blocked, profile.email)

    async def _caller_of_key(self, key: str, digest: bytes) -> Caller | None:
        held = self._callers.get(digest)
        if held is not None:
            return held
        ticket = self._callers.ticket()
        found = await self._user_keys.find(key)
        if found is None:
            return None
        caller = Caller(found.user_id, found.user_id, key_id=found.id)
        self._callers.put(digest, caller, ticket)
        return caller

    async def _standing(self, user_id: str) -> Standing | None:
        held = self._standings.get(user_id)
        if held is not None:
            return held
        ticket = self._standings.ticket()
        profile = await self._profiles.find(user_id)
        if profile is None:
            return None
        standing = Standing(profile.id, profile.is_blocked, profile.email)
        self._standings.put(user_id, standing, ticket)
        return standing


def _tells_more(verified: Verified, standing: Standing) -> bool:
    """Tell whether a token names an e-mail that is not the user's as far as is known here."""
    return verified.email is not None and verified.email.strip().casefold() != standing.email


def _admit(standing: Standing) -> None:
    if standing.is_blocked:
        raise AccountBlocked
