"""``/api/v1/user``: the user's profile, usage, keys, export and farewell."""

from typing import Final

import msgspec
import structlog
from aiohttp import web
from msgspec import UNSET, UnsetType

from gateway import keys
from gateway.accounts.answers import KeysAnswer, key_answer, new_key_answer
from gateway.accounts.errors import InvalidToken, UserKeyNotFound
from gateway.accounts.profiles import MAX_METADATA
from gateway.accounts.registration import checked_name
from gateway.errors import GatewayError, InvalidRequest
from gateway.handlers.json_answers import json_answer
from gateway.handlers.platform_agent import profile_of, user_of
from gateway.translation.field_errors import decoded


class ProfileChange(msgspec.Struct, frozen=True):
    """What of a profile is to change; ``metadata`` is a JSON object of the user's own, as a whole."""

    name: str | UnsetType = UNSET
    metadata: dict[str, msgspec.Raw] | UnsetType = UNSET


class NewKey(msgspec.Struct, frozen=True):
    """By what name the user knows the key again."""

    name: str


_encode: Final = msgspec.json.Encoder().encode
_PROFILES: Final = msgspec.json.Decoder(ProfileChange)
_KEYS: Final = msgspec.json.Decoder(NewKey)
_log: Final = structlog.get_logger("gateway.accounts")


async def profile(request: web.Request) -> web.Response:
    """Answer the user's profile."""
    return json_answer(await user_of(request, await profile_of(request)))


async def change_profile(request: web.Request) -> web.Response:
    """Change the user's name or their own data; nothing else of a profile is theirs to change."""
    change = decoded(_PROFILES, await request[keys.BODY].read())
    name = change.name if isinstance(change.name, UnsetType) else checked_name(change.name)
    metadata = change.metadata if isinstance(change.metadata, UnsetType) else _metadata(change.metadata)
    changed = await request.app[keys.PROFILES].change((await profile_of(request)).id, name=name, metadata=metadata)
    if changed is None:
        raise InvalidToken
    return json_answer(await user_of(request, changed))


async def export(request: web.Request) -> web.StreamResponse:
    """Answer everything that is kept of the user, as one JSON object: profile, memory, keys, usage, messages.

    One that breaks off is not whole: its connection ends without the end of the body.
    """
    pieces = request.app[keys.EXPORT].pieces(await profile_of(request))
    first = await anext(pieces)
    response = web.StreamResponse(headers={"Content-Disposition": 'attachment; filename="export.json"'})
    response.content_type = "application/json"
    await response.prepare(request)
    try:
        await response.write(first)
        async for piece in pieces:
            await response.write(piece)
    except GatewayError as error:
        _log.warning("export broken off", code=error.code)
        if request.transport is not None:
            request.transport.abort()
    return response


async def delete(request: web.Request) -> web.Response:
    """Delete the user and all that is theirs: sessions and keys, the agent with its memory, messages, usage."""
    await request.app[keys.REGISTRATION].delete((await profile_of(request)).id)
    return web.Response(status=204)


async def list_keys(request: web.Request) -> web.Response:
    """Answer the user's personal API keys, newest first, without what is secret of them."""
    found = await request.app[keys.USER_KEYS].list((await profile_of(request)).id)
    return json_answer(KeysAnswer(tuple(key_answer(key) for key in found)))


async def create_key(request: web.Request) -> web.Response:
    """Make a personal API key for the OpenAI surface: it is shown this once."""
    asked = decoded(_KEYS, await request[keys.BODY].read())
    key, plaintext = await request.app[keys.USER_KEYS].make((await profile_of(request)).id, asked.name)
    return json_answer(new_key_answer(key, plaintext), status=201)


async def delete_key(request: web.Request) -> web.Response:
    """Delete a personal API key: it lets nobody in any more."""
    user = await profile_of(request)
    is_gone = await request.app[keys.USER_KEYS].delete(user.id, request.match_info["key"])
    request.app[keys.CREDENTIALS].forget(user.id)
    if not is_gone:
        raise UserKeyNotFound
    return web.Response(status=204)


def _metadata(given: dict[str, msgspec.Raw]) -> bytes:
    metadata = _encode(given)
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"'metadata' is longer than {MAX_METADATA} bytes of JSON: shorten it.", param="metadata")
    return metadata
