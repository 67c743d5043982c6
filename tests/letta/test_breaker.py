import pytest

from gateway.errors import UpstreamUnavailable
from gateway.letta.breaker import FAILURES_TO_OPEN, FIRST_PAUSE, LEAST_RETRIES, LONGEST_PAUSE, Breaker, RetryBudget


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, times: int = FAILURES_TO_OPEN) -> None:
    for _ in range(times):
        breaker.failed()


def refusal(breaker: Breaker) -> UpstreamUnavailable:
    with pytest.raises(UpstreamUnavailable) as raised:
        breaker.check()
    return raised.value


def refuses(breaker: Breaker) -> bool:
    return breaker.refuses


def test_few_failures_in_a_row_let_requests_through(breaker: Breaker) -> None:
    fail(breaker, FAILURES_TO_OPEN - 1)
    breaker.check()
    assert not breaker.is_open


def test_success_between_failures_starts_the_count_again(breaker: Breaker) -> None:
    fail(breaker, FAILURES_TO_OPEN - 1)
    breaker.succeeded()
    fail(breaker, FAILURES_TO_OPEN - 1)
    breaker.check()


def test_failures_in_a_row_open_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    assert breaker.is_open
    clock.now += 0.25
    refused = refusal(breaker)
    assert refused.retry_after == FIRST_PAUSE - 0.25
    assert refused.should_retry is True


def test_one_probe_at_a_time(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_PAUSE
    breaker.check()
    refusal(breaker)
    breaker.succeeded()
    breaker.check()
    breaker.check()
    assert not breaker.is_open


def test_probe_that_is_never_heard_of_again_is_followed_by_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_PAUSE
    breaker.check()
    clock.now += FIRST_PAUSE
    breaker.check()
    refusal(breaker)


def test_pause_grows_with_each_failed_probe_up_to_a_limit(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    pauses: list[float] = []
    for _ in range(8):
        wait = refusal(breaker).retry_after
        assert wait is not None
        pauses.append(wait)
        clock.now += wait
        breaker.check()
        breaker.failed()
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_recovery_forgets_the_grown_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_PAUSE
    breaker.check()
    breaker.failed()
    breaker.succeeded()
    fail(breaker)
    assert refusal(breaker).retry_after == FIRST_PAUSE


def test_many_requests_under_way_that_fail_at_once_are_one_outage(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 500)
    assert refusal(breaker).retry_after == FIRST_PAUSE
    clock.now += 0.5
    breaker.failed()
    assert refusal(breaker).retry_after == FIRST_PAUSE - 0.5


def test_late_success_closes_it(breaker: Breaker) -> None:
    fail(breaker)
    breaker.succeeded()
    breaker.check()


def test_refuses_only_while_the_pause_lasts(breaker: Breaker, clock: Clock) -> None:
    assert not refuses(breaker)
    fail(breaker)
    assert refuses(breaker)
    clock.now += FIRST_PAUSE
    assert breaker.is_open
    assert not refuses(breaker)
    breaker.check()
    assert refuses(breaker)


def test_ping_that_is_answered_after_one_that_was_not_ends_the_pause(breaker: Breaker) -> None:
    fail(breaker)
    breaker.pinged(answered=False)
    assert refuses(breaker)
    breaker.pinged(answered=True)
    assert not refuses(breaker)
    breaker.check()
    refusal(breaker)  # the one before is the probe


def test_pings_that_were_answered_all_along_end_no_pause(breaker: Breaker) -> None:
    breaker.pinged(answered=True)
    fail(breaker)
    breaker.pinged(answered=True)
    refusal(breaker)


def test_time_is_monotonic_unless_told_otherwise() -> None:
    breaker = Breaker()
    fail(breaker)
    assert 0 < (refusal(breaker).retry_after or 0) <= FIRST_PAUSE


# The budget ----------------------------------------------------------------------------------------------------------


def test_few_retries_are_always_allowed() -> None:
    budget = RetryBudget()
    for _ in range(LEAST_RETRIES):
        assert budget.allows()
        budget.retries += 1
    assert not budget.allows()


def test_retries_are_a_share_of_what_is_under_way() -> None:
    budget = RetryBudget()
    budget.requests = 100
    budget.retries = 19
    assert budget.allows()
    budget.retries = 20
    assert not budget.allows()


def test_what_ended_is_no_longer_under_way_however_it_ended() -> None:
    budget = RetryBudget()
    with budget.request(), budget.retry():
        assert (budget.requests, budget.retries) == (1, 1)
    with pytest.raises(UpstreamUnavailable), budget.request(), budget.retry():
        raise UpstreamUnavailable
    assert (budget.requests, budget.retries) == (0, 0)
