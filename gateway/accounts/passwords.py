"""Passwords as argon2id hashes, made and checked in a few threads, so that no crowd of logins stops the streams."""

import asyncio
import base64
import contextlib
import os
import secrets
import sys
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import argon2
import msgspec
from argon2.exceptions import VerifyMismatchError

from gateway.accounts.errors import PasswordsBusy, WeakPassword

LOWEST: Final = 19
"""The niceness of threads that hash: a fiftieth of what the event loop gets where both want a processor."""

_COMMON: Final = """
    password password1 password12 password123 passw0rd p@ssw0rd 12345678 123456789 1234567890 12341234 11223344
    87654321 987654321 0987654321 qwertyui qwertyuiop qwerty12 qwerty123 qwertzui qwertzuiop asdfghjk asdfghjkl
    zxcvbnm123 1q2w3e4r 1q2w3e4r5t 1qaz2wsx q1w2e3r4 abcd1234 abc12345 abcdefgh iloveyou iloveyou1 letmein1
    welcome1 welcome123 admin123 administrator changeme changeme1 football baseball superman princess sunshine
    trustno1 starwars whatever computer internet michelle jennifer samantha passwort passwort1 hallo123
"""
COMMON: Final = frozenset(_COMMON.split())
"""Passwords that are tried first everywhere."""

T = TypeVar("T")

SHORTEST: Final = 8
LONGEST: Final = 1_024
"""Characters of a password: one megabyte of it would be hashed as well, at the cost of everybody else."""


class PasswordPolicy(msgspec.Struct, frozen=True):
    """What a hash costs, and how many at once.

    The costs are the least of the OWASP Password Storage Cheat Sheet: 19 MiB, two passes, one lane (30 ms); the memory
    of all threads together is what logins can take at most.
    """

    memory_kib: int = 19_456
    passes: int = 2
    threads: int = 2
    waiting: int = 64
    """Logins that may wait for a thread: a second's work."""


class Verdict(msgspec.Struct, frozen=True):
    """Whether a password is right; ``replacement`` is its hash at today's cost, where the stored one has another."""

    is_right: bool
    replacement: str | None = None


class Passwords:
    """Makes and checks hashes; threads are started when they are needed."""

    def __init__(self, policy: PasswordPolicy | None = None) -> None:
        self._policy = policy or PasswordPolicy()
        self._hasher = argon2.PasswordHasher(
            time_cost=self._policy.passes, memory_cost=self._policy.memory_kib, parallelism=1
        )
        self._pool = ThreadPoolExecutor(self._policy.threads, "passwords", initializer=_give_way)
        self._door = asyncio.Lock()
        self._places = 0
        self._nobodys = _nobodys_hash(self._policy)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Take a place among those who wait for a thread; raises ``PasswordsBusy``.

        Taken before anything else is done for a login: of a crowd, most cost next to nothing. They come in one by one,
        with a turn of the event loop between two, so that streams go on in between.
        """
        async with self._door:
            await asyncio.sleep(0)
        if self._places >= self._policy.threads + self._policy.waiting:
            raise PasswordsBusy
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def hash(self, password: str) -> str:
        """Return the hash of a password that was checked by ``check_strength``; asked for with a ``place``."""
        return await self._off_loop(lambda: self._hasher.hash(_normal(password)))

    async def verify(self, stored: str | None, password: str) -> Verdict:
        """Compare a password with a stored hash; None, for a user who is not known, takes as long.

        Asked for with a ``place``.
        """
        if len(password) > LONGEST:
            return Verdict(is_right=False)  # nobody has one: to say so at once tells nothing
        return await self._off_loop(lambda: self._verdict(stored, _normal(password)))

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _verdict(self, stored: str | None, password: bytes) -> Verdict:
        try:
            self._hasher.verify(stored or self._nobodys, password)
        except VerifyMismatchError:
            return Verdict(is_right=False)
        is_old = stored is not None and self._hasher.check_needs_rehash(stored)
        return Verdict(stored is not None, self._hasher.hash(password) if is_old else None)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def check_strength(password: str, email: str, *, param: str = "password") -> None:
    """Raise ``WeakPassword`` for a password that no new one may be."""
    folded = password.casefold()
    is_guessed = folded == email or folded in COMMON or len(set(folded)) == 1
    if not SHORTEST <= len(password) <= LONGEST or is_guessed:
        raise WeakPassword(param=param)


def _normal(password: str) -> bytes:
    """Return the bytes of a password, the same for every way to type it (NIST SP 800-63B, 3.1.1.2)."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")


def _nobodys_hash(policy: PasswordPolicy) -> str:
    """Return a hash that no password has, in argon2's notation."""
    salt, digest = (base64.b64encode(secrets.token_bytes(size)).decode().rstrip("=") for size in (16, 32))
    return f"$argon2id$v=19$m={policy.memory_kib},t={policy.passes},p=1${salt}${digest}"


def _give_way() -> None:
    """Let the thread run after the event loop's: a password has time, a stream's next chunk has not."""
    if sys.platform != "linux":
        return  # elsewhere the number names a process, not a thread
    with contextlib.suppress(PermissionError):  # a sandbox may forbid it: then they are equals
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
