import logging

import msgspec
import pytest
import structlog

from gateway.server.logs import MAX_VALUE, clip, escape, set_level
from tests.server.recorded_logs import recorded_logs


def test_production_writes_one_json_object_a_line() -> None:
    with recorded_logs() as logs:
        structlog.get_logger("gateway.test").warning("something\nhappened", why="a\r\nb\x1b[2J", count=3, what=object)
    (line,) = logs.lines
    assert line["event"] == "something\nhappened"
    assert line["why"] == "a\r\nb\x1b[2J"
    assert line.items() >= {"level": "warning", "logger": "gateway.test", "count": 3}.items()
    assert line["timestamp"].endswith("Z")
    assert "\x1b" not in logs.text


def test_lines_of_other_libraries_look_the_same() -> None:
    with recorded_logs() as logs:
        logging.getLogger("some.library").error("failed: %s", "x\ny")
    (line,) = logs.lines
    assert line.items() >= {"event": "failed: x\ny", "level": "error", "logger": "some.library"}.items()


def test_exception_is_told_in_the_same_line() -> None:
    with recorded_logs() as logs:
        try:
            int("of no use")
        except ValueError as error:
            structlog.get_logger().exception("failed", exc_info=error)
    (line,) = logs.lines
    assert "of no use" in line["exception"]


def test_development_is_for_reading_and_no_terminal_obeys_it() -> None:
    with recorded_logs("development") as logs:
        structlog.get_logger("gateway.test").info("hello", model="m\x1b[2Jx\nforged line\u202e", plain="é ü", n=1)
    assert logs.text.count("\n") == 1
    assert "hello" in logs.text
    assert "é ü" in logs.text
    for character in "\x1b\u202e":
        assert character not in logs.text


def test_level() -> None:
    with recorded_logs(level="WARNING") as logs:
        log = structlog.get_logger()
        log.debug("no")
        log.info("no")
        log.warning("yes")
        logging.getLogger("x").info("no")
    assert [line["event"] for line in logs.lines] == ["yes"]


@pytest.mark.parametrize("name", ["httpx", "httpcore", "letta_client", "asyncio"])
def test_libraries_that_tell_too_much_are_quiet_even_at_debug(name: str) -> None:
    with recorded_logs(level="DEBUG") as logs:
        logging.getLogger(name).debug("Request headers: Authorization: Bearer sk-canary")
        logging.getLogger(name).info("Request headers: Authorization: Bearer sk-canary")
    assert logs.text == ""


def test_aiohttps_server_logger_is_silent() -> None:
    with recorded_logs() as logs:
        logging.getLogger("aiohttp.server").error("Error handling request: sk-canary")
    assert logs.text == ""


def test_clip_cuts_what_a_peer_could_make_endless() -> None:
    event = clip(
        None, "", {"event": "x" * 1_000_000, "short": "y", "n": 5, "exception": "z" * 5_000, "odd": "a\udcffb"}
    )
    assert event["event"] == "x" * MAX_VALUE + "..."
    assert (event["short"], event["n"], len(event["exception"])) == ("y", 5, 5_000)
    assert event["odd"] == "a\\udcffb"
    msgspec.json.encode(event)


def test_escape_leaves_what_can_be_printed() -> None:
    event = escape(None, "", {"event": "été", "bad": "a\x00b\nc", "n": 1, "exception": "two\nlines"})
    assert event == {"event": "été", "bad": "a\\x00b\\nc", "n": 1, "exception": "two\nlines"}


def test_level_changes_while_lines_are_written() -> None:
    with recorded_logs(level="INFO") as logs:
        ours, others = structlog.get_logger("gateway.test"), logging.getLogger("some.library")
        for level in ("INFO", "ERROR", "DEBUG"):
            set_level(level)
            for write in (ours.debug, ours.info, ours.error, others.debug, others.error):
                write(level)
    assert [(line["event"], line["level"]) for line in logs.lines] == [
        ("INFO", "info"),
        ("INFO", "error"),
        ("INFO", "error"),
        ("ERROR", "error"),
        ("ERROR", "error"),
        ("DEBUG", "debug"),
        ("DEBUG", "info"),
        ("DEBUG", "error"),
        ("DEBUG", "debug"),
        ("DEBUG", "error"),
    ]
