"""Users are kept out and let in again: the gateway's own door is the first to be shut and the last to be opened."""

from collections.abc import Callable

from gateway.accounts.billing.protocol import Billing
from gateway.accounts.errors import UserNotFound
from gateway.accounts.identity.protocol import IdentityProvider
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.stopping import Stopping


class Blocking:
    """Blocks users; ``forget`` drops what is remembered of a user's credentials in this process.

    Where an identity service or a biller cannot be asked, its error is raised and the user stays out; the same once
    more goes on from there.
    """

    def __init__(
        self,
        *,
        profiles: Profiles,
        identity: IdentityProvider,
        billing: Billing,
        stopping: Stopping,
        forget: Callable[[str], None],
    ) -> None:
        self._profiles = profiles
        self._identity = identity
        self._billing = billing
        self._stopping = stopping
        self._forget = forget

    async def block(self, profile: Profile) -> Profile:
        """Keep a user out, and end what they have under way; raises ``UserNotFound`` where they are gone since."""
        blocked = await self._write(profile, is_blocked=True)
        await self._stopping.stop(profile.id)
        await self._identity.set_blocked(profile.id, is_blocked=True)
        await self._billing.set_blocked(profile, is_blocked=True)
        return blocked

    async def unblock(self, profile: Profile) -> Profile:
        """Let a user in again; raises ``UserNotFound`` where they are gone since."""
        await self._billing.set_blocked(profile, is_blocked=False)
        await self._identity.set_blocked(profile.id, is_blocked=False)
        return await self._write(profile, is_blocked=False)

    async def _write(self, profile: Profile, *, is_blocked: bool) -> Profile:
        try:
            changed = await self._profiles.change(profile.id, is_blocked=is_blocked)
        finally:
            self._forget(profile.id)
        if changed is None:
            raise UserNotFound
        return changed
