"""Figures that are looked up when they are asked for, and those of parts that know no metrics."""

from gateway.accounts.ledger import Ledger
from gateway.metrics import Metrics
from gateway.storage.engine import Database


def watch(metrics: Metrics, database: Database, ledger: Ledger) -> None:
    """Show from now on how these fare."""
    database.on_failure = metrics.storage_failures.inc
    metrics.unsettled_turns.set_function(lambda: ledger.backlog().turns)
    metrics.ledger_lag.set_function(lambda: ledger.backlog().seconds)
