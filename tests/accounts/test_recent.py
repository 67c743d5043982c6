from gateway.accounts.recent import Recent
from tests.accounts.identities import Clock


def test_value_is_held_for_its_time_from_the_begin_of_its_reading() -> None:
    clock = Clock(100.0)
    recent: Recent[str, int] = Recent(10, 5.0, clock)
    ticket = recent.ticket()
    clock.now = 103.0
    recent.put("a", 1, ticket)
    clock.now = 104.9
    assert recent.get("a") == 1
    clock.now = 105.0
    assert recent.get("a") is None
    assert len(recent) == 0


def test_nothing_is_held_under_another_name() -> None:
    recent: Recent[str, int] = Recent(10, 5.0)
    recent.put("a", 1, recent.ticket())
    assert recent.get("b") is None


def test_number_is_bounded_and_the_oldest_goes() -> None:
    recent: Recent[int, int] = Recent(3, 5.0)
    for number in range(5):
        recent.put(number, number, recent.ticket())
    assert [recent.get(number) for number in range(5)] == [None, None, 2, 3, 4]
    recent.put(2, 20, recent.ticket())
    recent.put(5, 5, recent.ticket())
    assert [recent.get(number) for number in range(6)] == [None, None, 20, None, 4, 5]


def test_what_is_forgotten_is_gone_and_the_rest_stays() -> None:
    recent: Recent[str, str] = Recent(10, 5.0)
    for key, owner in (("a", "ada"), ("b", "bob"), ("c", "ada")):
        recent.put(key, owner, recent.ticket())
    recent.forget(lambda _, owner: owner == "ada")
    assert [recent.get(key) for key in "abc"] == [None, "bob", None]


def test_value_whose_reading_began_before_a_forgetting_is_not_held() -> None:
    """A logout between the read and its end: what was read is the state of before."""
    recent: Recent[str, str] = Recent(10, 5.0)
    ticket = recent.ticket()
    recent.forget(lambda key, _: key == "a")
    recent.put("a", "live", ticket)
    assert recent.get("a") is None
    recent.put("a", "ended", recent.ticket())
    assert recent.get("a") == "ended"
