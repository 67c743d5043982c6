from gateway.live_settings.current import EDITABLE, Change, LiveSettings
from gateway.settings import Settings, key_owner
from tests.server.recorded_logs import recorded_logs
from tests.server.running import settings


def test_configured_settings_hold_until_something_is_changed() -> None:
    chosen = settings(queue_depth=5)
    live = LiveSettings(chosen)
    assert live.current is live.configured is chosen
    live.take({"queue_depth": Change("3", 1.0), "rate_limit": Change("7/minute", 2.0)})
    assert (live.current.queue_depth, live.current.rate_limit) == (3, "7/minute")
    assert live.configured.queue_depth == 5
    live.take({})
    assert live.current == chosen


def test_who_cannot_ask_is_told_once_for_each_change() -> None:
    live, heard = LiveSettings(settings()), list[Settings]()
    live.on_change(heard.append)
    for _ in range(3):
        live.take({"log_level": Change("ERROR", 1.0)})
    assert [told.log_level for told in heard] == ["ERROR"]


def test_change_that_does_not_fit_any_more_is_left_out_and_told_once() -> None:
    live = LiveSettings(settings())
    with recorded_logs() as logs:
        for _ in range(3):
            live.take({"conversation": Change("of another age", 1.0), "queue_depth": Change("3", 1.0)})
    (left_out, changed) = logs.lines
    assert (left_out["event"], left_out["setting"]) == ("stored setting left out", "LETTA_GATEWAY_CONVERSATION")
    assert changed["event"] == "setting changed"
    assert (live.current.conversation, live.current.queue_depth) == ("agent", 3)


def test_what_another_version_or_a_stranger_has_stored_is_left_alone() -> None:
    live = LiveSettings(settings())
    live.take({"of_the_future": Change("1", 1.0), "operator_key": Change("stolen", 1.0)})
    assert live.current == live.configured
    assert live.changes == {}


def test_change_to_what_is_configured_is_one_all_the_same() -> None:
    live = LiveSettings(settings())
    live.take({"queue_depth": Change("8", 1.0)})
    assert live.changes == {"queue_depth": Change("8", 1.0)}


def test_secrets_are_never_among_what_can_change() -> None:
    assert len(EDITABLE) >= 8
    assert not [setting for setting in EDITABLE.values() if setting.row.secret]


def test_holders_of_keys_have_the_names_of_the_log() -> None:
    assert LiveSettings(settings(api_keys=("sk-1", "sk-2"))).key_owners() == (key_owner("sk-1"), key_owner("sk-2"))
