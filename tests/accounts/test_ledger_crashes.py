"""A gateway that is killed in the midst of turns, as ``kill -9`` or the kernel do: the ledger is exact all the same."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gateway.accounts.ledger import STORED
from gateway.storage.address import SqliteFile
from gateway.storage.tables import spending, turns, usage_metrics
from tests.accounts.crashing_ledger import sent_before
from tests.accounts.ledgers import House, assert_balanced
from tests.storage.databases import opened

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=[pytest.mark.services, pytest.mark.timeout(600)])])
async def test_killed_at_any_moment_the_ledger_is_what_letta_reported(tmp_path: Path, rounds: int) -> None:
    path, acks = tmp_path / "gateway.db", tmp_path / "acks"
    command: list[str | Path] = [sys.executable, "-m", "tests.accounts.crashing_ledger", path, acks, str(rounds)]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in acks.read_text().splitlines()]
    assert ["damaged"] not in said
    begun, settled, taken_back = (
        {word[1] for word in said if word[0] == name} for name in ("begun", "settled", "unsent")
    )
    assert len(settled) >= rounds // 2
    async with opened(SqliteFile(path)) as database:
        async with database.read() as connection:
            assert (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() == ["ok"]
        await assert_balanced(database)
        house = House(database, name="last")
        house.clock.at += STORED
        sent = house.letta.counts = sent_before(acks)
        await house.ledger.reconcile()
        rows: dict[str, dict[str, Any]] = {row["id"]: row for row in await house.rows(turns)}
        assert all(rows[turn_id]["status"] == "complete" for turn_id in settled)
        assert begun - taken_back <= rows.keys(), "what was acknowledged is there"
        assert sent.keys() <= rows.keys()
        for turn_id, row in rows.items():
            assert row["status"] in {"complete", "interrupted"}
            assert row["prompt_tokens"] == (sent[turn_id].prompt_tokens if turn_id in sent else 0)
        assert sum(row["status"] == "interrupted" for row in rows.values()) >= rounds // 4, "it was killed in time"
        reported = sum(usage.prompt_tokens for usage in sent.values())
        sums = await house.rows(usage_metrics)
        assert (
            sum(row["prompt_tokens"] for row in sums) == sum(row["prompt_tokens"] for row in rows.values()) == reported
        )
        assert [row["held_micros"] for row in await house.rows(spending)] == [0] * len(await house.rows(spending))
        await house.idle()
        await assert_balanced(database)
