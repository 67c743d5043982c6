import pytest

from gateway import keys
from gateway.accounts import settling
from gateway.conversations.metering import Payer
from gateway.server.accounts import Accounts
from gateway.storage.address import SqliteFile
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn
from tests.server.running import FRIEND, serving
from tests.server.wire import until


async def test_database_that_fails_and_the_ledger_behind_it_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "TRY_AGAIN", 0.05)
    async with serving() as gateway:
        accounts, database = gateway.app[keys.ACCOUNTS], gateway.app[keys.DATABASE]
        assert isinstance(accounts, Accounts)
        assert isinstance(database._address, SqliteFile)
        turn_id = await accounts.ledger.open(
            Payer("local", "chat_completions", None), AgentTurn(agent_id=FRIEND.id, conversation_id=None)
        )
        assert "letta_gateway_storage_failures_total 0.0" in gateway.exposed()
        moved = database._address.path.rename(database._address.path.with_name("moved"))
        await accounts.ledger.close(turn_id, Usage(1, 1), "complete")
        assert "letta_gateway_unsettled_turns 1.0" in gateway.exposed()
        await until(lambda: lag(gateway.exposed()) > 0.1)
        assert failures(gateway.exposed()) >= 1
        moved.rename(database._address.path)
        await until(lambda: "letta_gateway_unsettled_turns 0.0" in gateway.exposed())
        assert lag(gateway.exposed()) == 0


def figure(name: str, exposed: str) -> float:
    (found,) = [line for line in exposed.splitlines() if line.startswith(f"{name} ")]
    return float(found.rpartition(" ")[2])


def lag(exposed: str) -> float:
    return figure("letta_gateway_ledger_lag_seconds", exposed)


def failures(exposed: str) -> float:
    return figure("letta_gateway_storage_failures_total", exposed)
