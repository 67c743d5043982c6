import asyncio

import pytest

from gateway.errors import InvalidRequest, SettingChanged, StorageUnavailable
from gateway.live_settings.current import Change, LiveSettings
from gateway.live_settings.stored import LONGEST, StoredSettings, editable
from gateway.settings import show_value
from gateway.storage.address import Address
from tests.server.running import settings
from tests.storage.databases import opened


async def test_change_is_kept_for_the_next_start_and_for_others(address: Address) -> None:
    async with opened(address) as database:
        live = LiveSettings(settings())
        stored = StoredSettings(live, database, now=lambda: 5.0)
        await stored.load()
        assert live.current == live.configured
        await stored.change("LETTA_GATEWAY_QUEUE_DEPTH", " 3 ")
        await stored.change("LETTA_GATEWAY_SERVER_TOOLS", '{"M\\u0000": ["Read"]}')
        assert live.changes["queue_depth"] == Change("3", 5.0)
        other = LiveSettings(settings())
        await StoredSettings(other, database).load()
        assert other.current == live.current
        assert other.current.server_tools == {"M\0": ("Read",)}
        await stored.reset("LETTA_GATEWAY_QUEUE_DEPTH")
        await stored.reset("LETTA_GATEWAY_QUEUE_DEPTH")
        assert live.current.queue_depth == 8
        assert list(live.changes) == ["server_tools"]


async def test_later_change_takes_the_place_of_the_one_before(address: Address) -> None:
    async with opened(address) as database:
        live = LiveSettings(settings())
        stored = StoredSettings(live, database)
        await asyncio.gather(*(stored.change("LETTA_GATEWAY_QUEUE_DEPTH", str(depth)) for depth in range(10)))
        assert live.current.queue_depth == 9
        assert len(live.changes) == 1


async def test_change_by_who_saw_an_older_value_is_refused(address: Address) -> None:
    async with opened(address) as database:
        one = StoredSettings(LiveSettings(settings()), database, now=lambda: 5.0)
        other = StoredSettings(LiveSettings(settings()), database, now=lambda: 6.0)
        await one.change("LETTA_GATEWAY_QUEUE_DEPTH", "3", seen=None)
        with pytest.raises(SettingChanged):
            await other.change("LETTA_GATEWAY_QUEUE_DEPTH", "4", seen=None)
        await other.change("LETTA_GATEWAY_QUEUE_DEPTH", "4", seen=5.0)
        with pytest.raises(SettingChanged):
            await one.change("LETTA_GATEWAY_QUEUE_DEPTH", "3", seen=5.0)
        await one.load()
        assert one._live.current.queue_depth == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LETTA_GATEWAY_RATE_LIMIT", "often"),
        ("LETTA_GATEWAY_RATE_LIMIT", " "),
        ("LETTA_GATEWAY_RATE_LIMIT", "0/minute"),
        ("LETTA_GATEWAY_QUEUE_DEPTH", "1001"),
        ("LETTA_GATEWAY_SERVER_TOOLS", '{"Milo": "Read"}'),
        pytest.param("LETTA_GATEWAY_SERVER_TOOLS", "x" * (LONGEST + 1), id="too long"),
        ("LOG_LEVEL", "info"),
    ],
)
async def test_value_that_is_none_changes_nothing(address: Address, name: str, text: str) -> None:
    async with opened(address) as database:
        live = LiveSettings(settings())
        stored = StoredSettings(live, database)
        with pytest.raises(InvalidRequest) as raised:
            await stored.change(name, text)
        assert raised.value.param == "value"
        await stored.load()
        assert live.changes == {}


async def test_empty_text_is_no_tools(address: Address) -> None:
    async with opened(address) as database:
        live = LiveSettings(settings(server_tools={"Milo": ("Bash",)}))
        stored = StoredSettings(live, database)
        await stored.change("LETTA_GATEWAY_SERVER_TOOLS", "")
        assert live.current.server_tools == {}
        assert show_value(live.current.server_tools) == ""


async def test_database_that_is_away_leaves_everything_as_it_is(address: Address) -> None:
    async with opened(address) as database:
        live = LiveSettings(settings())
        stored = StoredSettings(live, database)
        await stored.change("LETTA_GATEWAY_QUEUE_DEPTH", "3")
        await database.close()
        for work in (stored.change("LOG_LEVEL", "ERROR"), stored.reset("LETTA_GATEWAY_QUEUE_DEPTH"), stored.load()):
            with pytest.raises(StorageUnavailable):
                await work
        assert (live.current.queue_depth, live.current.log_level) == (3, "INFO")


def test_what_cannot_be_changed_here() -> None:
    assert editable("LOG_LEVEL").field == "log_level"
    for name in ("SECRET_KEY", "LETTA_GATEWAY_PORT", "log_level", ""):
        with pytest.raises(InvalidRequest):
            editable(name)
