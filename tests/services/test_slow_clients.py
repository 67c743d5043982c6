"""B13 at the gateway alone, without a proxy before it: slow heads and slow bodies, and others are served as ever."""

import functools
from pathlib import Path
from typing import Final

import pytest

from tests.bench import targets
from tests.bench.processes import raise_file_limit
from tests.server.wire import connect
from tests.services.slow_clients import ATTACKER, ELSEWHERE, Attack, withstood
from tests.services.test_nginx_slow_clients import ASKED, BODIES, CHAT

ATTACKS: Final = {
    "heads": Attack("/v1/models", ("-H", "-i", "2"), 1_000, 14, held=(800, 1_000), a_second=200),
    # Who was refused is listened to for a moment more, so that the refusal is read.
    "bodies": Attack(CHAT, BODIES, 300, 14, held=(0, 150)),
    "bodies of who has a key": Attack(CHAT, BODIES, 300, 34, held=(250, 300), has_key=True),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_slow(tmp_path: Path, attack: Attack) -> None:
    raise_file_limit()
    with targets.upstream(1) as letta, targets.gateway(letta.port) as gateway:
        ordinary = functools.partial(connect, gateway.port, source=ELSEWHERE)
        await withstood(f"http://{ATTACKER}:{gateway.port}", attack, ordinary, gateway.request(ASKED), tmp_path)
