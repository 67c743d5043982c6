from gateway.accounts.billing.protocol import Spent, SpentDay


def test_spent_is_the_sum_of_its_days() -> None:
    assert Spent(()).micros == 0
    assert Spent((SpentDay("2026-11-20", 5), SpentDay("2026-11-21", 7))).micros == 12
