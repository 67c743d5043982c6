import pytest

from gateway.conversations.metering import Meter, Payer
from gateway.errors import BudgetExceeded
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn
from tests.conversations.meters import RecordingMeter, Settled


def test_payer_came_by_no_personal_key_unless_it_is_told() -> None:
    assert Payer("anna", "responses") == Payer("anna", "responses", None)
    assert Payer("anna", "responses") != Payer("anna", "platform")


async def test_recorded_meter_is_one() -> None:
    meter = RecordingMeter()
    told: Meter = meter
    payer, turn = Payer("anna", "platform", "key-1"), AgentTurn(agent_id="agent-1")
    first, second = [await told.open(payer, turn) for _ in range(2)]
    assert meter.opened == {first: (payer, turn), second: (payer, turn)}
    with pytest.raises(AssertionError):
        meter.assert_settled()
    await told.close(first, Usage(1, 2), "complete")
    told.leave_open(second)
    meter.assert_settled()
    assert (meter.settled, meter.left_open) == ({first: Settled(Usage(1, 2), "complete")}, [second])


@pytest.mark.parametrize("first", ["close", "leave_open"])
async def test_recorded_meter_takes_no_turn_twice(first: str) -> None:
    meter = RecordingMeter()
    turn_id = await meter.open(Payer("anna", "platform"), AgentTurn(agent_id="agent-1"))
    if first == "close":
        await meter.close(turn_id, None, "failed")
    else:
        meter.leave_open(turn_id)
    with pytest.raises(AssertionError, match="twice"):
        meter.leave_open(turn_id)
    with pytest.raises(AssertionError, match="twice"):
        await meter.close(turn_id, None, "failed")


async def test_refusal_of_the_recorded_meter() -> None:
    meter = RecordingMeter()
    meter.refusal = BudgetExceeded()
    with pytest.raises(BudgetExceeded):
        await meter.open(Payer("anna", "platform"), AgentTurn(agent_id="agent-1"))
    assert meter.opened == {}
