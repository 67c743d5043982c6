from collections.abc import Iterator

import msgspec
from aiohttp import web

from gateway import keys
from gateway.letta.scripted import ScriptedBackend
from gateway.server.app import build_app
from tests.server.running import settings
from tests.storage.late import LateDatabase


def every(kind: type) -> Iterator[tuple[str, object]]:
    yield from ((name, value) for name, value in vars(keys).items() if isinstance(value, kind))


async def test_composition_root_fills_every_place() -> None:
    app = build_app(settings(), LateDatabase(), backend=ScriptedBackend())
    for name, key in every(web.AppKey):
        assert key in app, name


def test_names_are_told_apart() -> None:
    for kind in (web.AppKey, web.RequestKey):
        shown = [str(key) for _, key in every(kind)]
        assert len(set(shown)) == len(shown) >= 4


def test_notes_begin_empty() -> None:
    """What nobody told does not stand in the log."""
    assert set(msgspec.structs.asdict(keys.RequestNotes()).values()) == {None}


def test_caller_is_known_by_the_credential_alone() -> None:
    user = keys.Caller("user-1", "user-1", key_id="key-1")
    assert (user.owner, user.user_id, user.key_id, user.session_id) == ("user-1", "user-1", "key-1", None)
    assert keys.Caller("local").user_id is None
