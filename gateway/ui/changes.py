"""``/ui/api/settings``: what holds now, and the operator's changes of it."""

from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.handlers.json_answers import json_answer
from gateway.live_settings.view import setting_answer, settings_answer
from gateway.translation.field_errors import decoded


class SettingChange(msgspec.Struct, frozen=True):
    """Another value, written as the environment would hold it; ``changed_at`` is that of the setting as it was seen."""

    value: str
    changed_at: float | None


_CHANGES: Final = msgspec.json.Decoder(SettingChange)


async def list_settings(request: web.Request) -> web.Response:
    """Answer all settings, without their secrets."""
    return json_answer(settings_answer(request.app[keys.LIVE]))


async def change(request: web.Request) -> web.Response:
    """Give a setting another value, here at once and in the other gateways within seconds."""
    asked = decoded(_CHANGES, await request[keys.BODY].read())
    setting = await request.app[keys.STORED_SETTINGS].change(
        request.match_info["name"], asked.value, request[keys.NOTES].client, seen=asked.changed_at
    )
    return json_answer(setting_answer(request.app[keys.LIVE], setting))


async def reset(request: web.Request) -> web.Response:
    """Have a setting be as it is configured."""
    setting = await request.app[keys.STORED_SETTINGS].reset(request.match_info["name"], request[keys.NOTES].client)
    return json_answer(setting_answer(request.app[keys.LIVE], setting))
