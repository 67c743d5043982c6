from hypothesis import given
from hypothesis import strategies as st

from gateway.shared_state.tally import Counts, MemoryTally, Pace, Share

STEADY = Pace(free=3, first_delay=1.0, longest_delay=60.0, forget=3_600.0)


@given(st.lists(st.tuples(st.sampled_from(["begin", "fail", "succeed", "pass"]), st.floats(0, 100)), max_size=60))
def test_waits_are_never_negative_nor_longer_than_the_longest(steps: list[tuple[str, float]]) -> None:
    counts, now, failed = Counts(STEADY, 10), 1_000.0, 0
    for step, seconds in steps:
        if step == "pass":
            now += seconds
        elif step == "begin":
            counts.begin(("a",), now)
        else:
            counts.end(("a",), now, is_failure=step == "fail")
            failed += step == "fail"
        assert 0 <= counts.wait(("a",), now) <= STEADY.longest_delay
        assert 0 <= counts.failed(("a",)) <= failed


async def test_each_kind_has_keys_of_its_own() -> None:
    tally = MemoryTally(10)
    one, other = (Share(kind, ("a",), STEADY) for kind in ("account", "address"))
    for _ in range(3):
        await (await tally.begin([one])).end(is_failure=True)
    assert (await tally.begin([one])).wait > 0
    assert (await tally.begin([other])).wait == 0
