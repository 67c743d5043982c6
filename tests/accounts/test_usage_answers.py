import msgspec

from gateway.accounts.billing.protocol import Spent, SpentDay
from gateway.accounts.usage import BudgetState, OwnerSums, Sums, UsageReport, UsageRow
from gateway.accounts.usage_answers import all_usage_answer, usage_answer

COUNTS = {
    "turns": 3,
    "failed_turns": 1,
    "prompt_tokens": 30,
    "completion_tokens": 20,
    "cached_tokens": 10,
    "reasoning_tokens": 5,
}
ROW = UsageRow(day="2026-11-21", model="openai/gpt-5", source="platform", cost_micros=1_234_567, **COUNTS)


def test_money_is_dollars_and_nothing_is_lost() -> None:
    report = UsageReport(
        first_day="2026-11-01",
        last_day="2026-11-30",
        rows=(ROW,),
        totals=Sums(cost_micros=9_000_000_000_000_000_001, **COUNTS),
        budget=BudgetState(period="month", limit_micros=5_000_000, spent_micros=4_999_999, held_micros=2),
    )
    told = msgspec.to_builtins(usage_answer(report, None))
    assert {**told, "data": list(told["data"])} == {
        "from": "2026-11-01",
        "to": "2026-11-30",
        "data": [{**COUNTS, "day": "2026-11-21", "model": "openai/gpt-5", "source": "platform", "cost": "1.234567"}],
        "totals": {**COUNTS, "cost": "9000000000000.000001"},
        "budget": {
            "amount": "5.000000",
            "period": "month",
            "spent": "4.999999",
            "held": "0.000002",
            "remaining": "0.000000",
        },
        "billed": None,
    }


def test_what_a_biller_says() -> None:
    report = UsageReport(first_day="2026-11-01", last_day="2026-11-30", rows=(), totals=Sums(), budget=None)
    answer = usage_answer(report, Spent((SpentDay("2026-11-21", 4_200),)))
    assert answer.billed is not None
    assert [(day.day, day.cost) for day in answer.billed] == [("2026-11-21", "0.004200")]
    assert answer.budget is None


def test_everybody_together() -> None:
    owners = [OwnerSums(owner="key_0123456789ab", cost_micros=5, **COUNTS), OwnerSums(owner="local", **COUNTS)]
    answer = all_usage_answer("2026-11-01", "2026-11-02", Sums(cost_micros=5), owners)
    assert [(one.owner, one.cost) for one in answer.owners] == [("key_0123456789ab", "0.000005"), ("local", "0.000000")]
    assert (answer.totals.cost, answer.totals.turns) == ("0.000005", 0)
