"""A LiteLLM proxy's books in memory: users and keys, in the shapes of its real answers (``tests/data/litellm``).

It fails where it is told to, before it does what it was asked (``breaks``) or after it (``dies``).
"""

import hashlib
import itertools
from typing import Any, Final

from tests.accounts.recorded_service import Asked, RecordedService, Sample, sample

MASTER_KEY: Final = "sk-master"
FAILURE: Final = Sample(503, {"error": {"message": "text of theirs", "type": "internal_server_error", "code": "503"}})


def _filled(name: str, **changed: Any) -> Sample:
    """Return a recorded answer with some of its fields changed."""
    recorded = sample(f"litellm/{name}")
    return Sample(recorded.status, {**recorded.response, **changed})


def digest(key: str) -> str:
    """Return what LiteLLM knows a key by."""
    return hashlib.sha256(key.encode()).hexdigest()


class FakeLitellm(RecordedService):
    """Serves the management API to whoever has the master key."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        """Keys by their plain text, with whose they are."""
        self.blocked: set[str] = set()
        self.breaks: set[str] = set()
        self.dies: set[str] = set()
        self._numbers = itertools.count(1)

    def keys_of(self, user_id: str) -> list[str]:
        """Return the keys that a user has."""
        return [key for key, owner in self.keys.items() if owner == user_id]

    def reply(self, asked: Asked) -> Sample:
        """Do what is asked."""
        if asked.headers.get("Authorization") != f"Bearer {MASTER_KEY}":
            return Sample(401, {"error": {"type": "token_not_found_in_db", "code": "401"}})
        if asked.path in self.breaks:
            return FAILURE
        match asked.path:
            case "/user/new":
                answer = self._new_user(asked.json())
            case "/key/generate":
                answer = _filled("key-generate", key=self._new_key(asked.json()["user_id"]))
            case "/user/info":
                answer = self._info(asked.query["user_id"])
            case "/key/delete":
                answer = self._delete_keys(asked.json()["keys"])
            case "/user/update":
                answer = self._update(asked.json())
            case "/user/delete":
                answer = self._delete_user(asked.json()["user_ids"][0])
            case "/key/block" | "/key/unblock":
                answer = self._block(asked.json()["key"], is_blocked=asked.path == "/key/block")
            case _:
                answer = super().reply(asked)
        return FAILURE if asked.path in self.dies else answer

    def _new_user(self, asked: dict[str, Any]) -> Sample:
        emails = {user.get("user_email") for user in self.users.values()} - {None}
        if asked["user_id"] in self.users or asked["user_email"] in emails:
            return sample("litellm/user-new-duplicate")
        self.users[asked["user_id"]] = {**asked, "spend": 0.0}
        return _filled("user-new", key=self._new_key(asked["user_id"]), user_id=asked["user_id"])

    def _new_key(self, user_id: str) -> str:
        key = f"sk-{next(self._numbers)}-of-{user_id}"
        self.keys[key] = user_id
        return key

    def _info(self, user_id: str) -> Sample:
        if user_id not in self.users:
            return sample("litellm/user-info-missing")
        keys = [{"token": digest(key), "key_name": "sk-...1234"} for key in self.keys_of(user_id)]
        return _filled("user-info", user_id=user_id, user_info=self.users[user_id], keys=keys)

    def _delete_keys(self, named: list[str]) -> Sample:
        known = [key for key in self.keys if key in named or digest(key) in named]
        for key in known:
            del self.keys[key]
        return _filled("key-delete", deleted_keys=named) if known else sample("litellm/key-delete-unknown")

    def _update(self, asked: dict[str, Any]) -> Sample:
        """Change a user; LiteLLM makes one where there is none."""
        self.users.setdefault(asked["user_id"], {"spend": 0.0}).update(asked)
        return sample("litellm/user-update")

    def _delete_user(self, user_id: str) -> Sample:
        if self.users.pop(user_id, None) is None:
            return Sample(404, {"detail": {"error": "User not found"}})
        for key in self.keys_of(user_id):
            del self.keys[key]
        return sample("litellm/user-delete")

    def _block(self, key: str, *, is_blocked: bool) -> Sample:
        if key not in self.keys:
            return Sample(404, {"error": {"message": "Key not found.", "code": "404"}})
        (self.blocked.add if is_blocked else self.blocked.discard)(key)
        return sample("litellm/key-block")
