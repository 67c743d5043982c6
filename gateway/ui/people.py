"""``/ui/api/users/{user}/keys`` and ``/ui/api/keys``: which keys there are, and what was done with them."""

import msgspec
from aiohttp import web

from gateway import keys
from gateway.accounts.answers import KeysAnswer, key_answer
from gateway.accounts.errors import UserKeyNotFound
from gateway.handlers.json_answers import json_answer
from gateway.handlers.platform_admin import user_of


class ApiKeysAnswer(msgspec.Struct, frozen=True):
    """The operator's own API keys, by the names that logs and the ledger have for their holders."""

    owners: tuple[str, ...]


async def list_api_keys(request: web.Request) -> web.Response:
    """Answer the API keys of the settings: none of them can be told from its name."""
    return json_answer(ApiKeysAnswer(request.app[keys.LIVE].key_owners()))


async def list_user_keys(request: web.Request) -> web.Response:
    """Answer a user's personal API keys."""
    user = await user_of(request)
    found = await request.app[keys.USER_KEYS].list(user.id)
    return json_answer(KeysAnswer(tuple(key_answer(key) for key in found)))


async def delete_user_key(request: web.Request) -> web.Response:
    """Delete one of a user's keys: whoever holds it is out at once."""
    user = await user_of(request)
    if not await request.app[keys.USER_KEYS].delete(user.id, request.match_info["key"]):
        raise UserKeyNotFound
    request.app[keys.CREDENTIALS].forget(user.id)
    return web.Response(status=204)
