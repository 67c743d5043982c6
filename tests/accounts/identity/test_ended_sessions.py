import pytest

from gateway.accounts.identity import ended_sessions
from gateway.accounts.identity.ended_sessions import EndedSessions


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ended(clock: Clock) -> EndedSessions:
    return EndedSessions(60.0, clock)


def test_session_that_nobody_ended(ended: EndedSessions) -> None:
    assert ended.goes_on("ann", "one", 5.0)
    assert ended.goes_on("ann", None, 5.0)


def test_session_that_ended_is_the_only_one(ended: EndedSessions) -> None:
    ended.end("one")
    assert not ended.goes_on("ann", "one", 5.0)
    assert ended.goes_on("ann", "two", 5.0)
    assert ended.goes_on("ann", None, 5.0)


def test_user_whose_sessions_ended_can_begin_new_ones(ended: EndedSessions) -> None:
    ended.end_all("ann", 100.7)
    assert not ended.goes_on("ann", "one", 99)
    assert not ended.goes_on("ann", None, 99)
    assert ended.goes_on("ann", "new", 100)
    assert ended.goes_on("bob", "one", 99)


def test_what_no_token_can_hold_any_more_is_forgotten(ended: EndedSessions, clock: Clock) -> None:
    ended.end("old")
    clock.now += 59
    ended.end("young")
    assert not ended.goes_on("ann", "old", 5.0)
    clock.now += 1
    ended.end("new")
    assert ended.goes_on("ann", "old", 5.0)
    assert not ended.goes_on("ann", "young", 5.0)


def test_number_is_bounded(ended: EndedSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_sessions, "MOST", 3)
    for name in ("a", "b", "a", "c", "d"):
        ended.end(name)
    assert [ended.goes_on("ann", name, 5.0) for name in "abcd"] == [False, True, False, False]
