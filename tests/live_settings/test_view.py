import pytest

from gateway.live_settings.current import Change, LiveSettings
from gateway.live_settings.view import SettingAnswer, settings_answer
from gateway.settings import Origin, table
from tests.server.running import settings


def shown(live: LiveSettings) -> dict[str, SettingAnswer]:
    return {one.name: one for one in settings_answer(live).data}


def test_every_setting_is_shown_in_the_order_of_the_table() -> None:
    assert [one.name for one in settings_answer(LiveSettings(settings())).data] == [s.row.env for s in table()]


def test_where_a_value_comes_from() -> None:
    origins = {
        "queue_depth": Origin("environment", "LETTA_GATEWAY_QUEUE_DEPTH"),
        "rate_limit": Origin("file", "letta-gateway.toml"),
        "secret_key": Origin("credential", "SECRET_KEY"),
    }
    live = LiveSettings(settings(queue_depth=5), origins)
    live.take({"rate_limit": Change("1/day", 7.0)})
    found = shown(live)
    assert {name: found[name].source for name in ("LETTA_GATEWAY_QUEUE_DEPTH", "SECRET_KEY", "LOG_LEVEL")} == {
        "LETTA_GATEWAY_QUEUE_DEPTH": "environment",
        "SECRET_KEY": "credential",
        "LOG_LEVEL": "default",
    }
    limit = found["LETTA_GATEWAY_RATE_LIMIT"]
    assert (limit.value, limit.configured, limit.source, limit.found, limit.changed_at) == (
        "1/day",
        "600/minute",
        "changed",
        "letta-gateway.toml",
        7.0,
    )


def test_secret_is_told_to_be_set_and_no_more() -> None:
    found = shown(LiveSettings(settings(letta_api_key="canary", api_keys=("canary",))))
    assert "canary" not in repr(found)
    key, other = found["LETTA_API_KEY"], found["LITELLM_MASTER_KEY"]
    assert (key.value, key.configured, key.is_set, other.is_set) == (None, None, True, False)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://me:canary@host:11434/v1", "http://***@host:11434/v1"),
        ("http://canary@host", "http://***@host"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host", "http://host"),
    ],
)
def test_password_within_a_url_is_not_shown(url: str, told: str) -> None:
    assert shown(LiveSettings(settings(lmstudio_base_url=url)))["LMSTUDIO_BASE_URL"].value == told


def test_choices_of_a_setting_that_is_one_of_some() -> None:
    found = shown(LiveSettings(settings()))
    assert found["LETTA_GATEWAY_CONVERSATION"].choices == ("agent", "stateless")
    assert found["LETTA_GATEWAY_QUEUE_DEPTH"].choices == found["LETTA_GATEWAY_SERVER_TOOLS"].choices == ()
