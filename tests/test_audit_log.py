import structlog

from gateway.audit_log import NAME, audit_log
from gateway.server.logs import set_level
from tests.server.recorded_logs import recorded_logs


def test_line_is_written_whatever_the_level() -> None:
    with recorded_logs(level="ERROR") as logs:
        structlog.get_logger("gateway.test").info("no")
        audit_log().info("yes", client="192.0.2.1")
        set_level("DEBUG")
        audit_log().info("yes again")
        set_level("ERROR")
        audit_log().info("and again")
    assert [line["event"] for line in logs.lines] == ["yes", "yes again", "and again"]
    assert logs.lines[0].items() >= {"level": "info", "logger": NAME, "client": "192.0.2.1"}.items()
