import itertools

import pytest

from tests.bench.app_server import CROWDS, Findings, Sample, markdown

TARGETS = {"own": 20.0, "kept": 10.0, "own, new": 40.0, "new": 30.0, "own, again": 50.0, "first": 100.0}


def made_up(*factors: float) -> Findings:
    """Return a run of as many repeats, in each of which everything takes so many times as long."""
    return Findings(
        [
            Sample(target, crowd, [time * factor] * crowd)
            for crowd, factor in itertools.product(CROWDS, factors)
            for target, time in TARGETS.items()
        ]
    )


def test_ratio_is_that_of_the_middle_repeat() -> None:
    findings = made_up(1, 1, 1)
    findings.samples.append(Sample("kept", 1, [1.0]))
    findings.samples.append(Sample("own", 1, [1_000.0]))
    assert findings.ratio("kept", "own", 1) == pytest.approx(0.5)
    assert findings.ratio("own", "kept", 5) == pytest.approx(2)


def test_ratio_is_not_moved_by_a_machine_that_slows_down() -> None:
    assert made_up(1, 10, 100).ratio("new", "own, new", 5) == pytest.approx(0.75)


def test_ratio_of_targets_that_were_not_measured_alike() -> None:
    findings = made_up(1)
    findings.samples.append(Sample("own", 1, [1.0]))
    with pytest.raises(ValueError, match="longer"):
        findings.ratio("kept", "own", 1)


def test_table_has_a_row_for_each_crowd_and_kind_of_agents() -> None:
    head, line, *rows = markdown(made_up(1)).split("\n")
    assert head.count("|") == line.count("|") == 6
    assert len(rows) == 3 * len(CROWDS)
    assert rows[0] == "| 1 | spoken to through it before | 20 ms | 10 ms | 0.50 x |"
    assert rows[-1] == "| 20 | just made | 40 ms | 30 ms | 0.75 x |"
