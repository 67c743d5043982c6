"""B13: slow heads, slow bodies and slow readers at nginx, by slowhttptest; others are served as ever meanwhile."""

import functools
from pathlib import Path
from typing import Final

import pytest

from tests.bench import targets
from tests.bench.processes import raise_file_limit
from tests.services.nginx import PROXY, nginx
from tests.services.slow_clients import ELSEWHERE, Attack, withstood

ASKED: Final = targets.Asking(0, "events=2 interval=0 delay=0", stream=False)
CHAT: Final = "/v1/chat/completions"
BODIES: Final = ("-B", "-i", "2", "-s", "8192", "-x", "10", "-f", "application/json")

ATTACKS: Final = {
    # Ten seconds for each; with TLS the attacker needs some more to open them all.
    "heads": Attack("/v1/models", ("-H", "-i", "2"), 1_000, 20, held=(600, 1_000), a_second=200),
    "bodies": Attack(CHAT, BODIES, 300, 4, held=(0, 150)),
    # A hundred requests at once are what one address may have, and nginx listens to the others for ten seconds;
    # the gateway waits for each body for 30 s.
    "bodies of who has a key": Attack(CHAT, BODIES, 300, 36, held=(80, 300), has_key=True),
    "readers": Attack(
        "/api/v1/openapi.json", ("-X", "-w", "1", "-y", "1", "-n", "5", "-z", "1"), 90, 64, held=(45, 90)
    ),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_slow(tmp_path: Path, attack: Attack) -> None:
    raise_file_limit()
    with targets.upstream(1) as letta, targets.gateway(letta.port) as gateway:
        async with nginx(tmp_path, gateway.port) as running:
            connect = functools.partial(running.connect, ELSEWHERE)
            await withstood(f"https://{PROXY}:{running.port}", attack, connect, gateway.request(ASKED), tmp_path)
            answered = [line["status"] for line in running.requests if line["client"] == PROXY]
    if attack.has_key:
        assert answered.count(408) >= 80, "the gateway's own deadline"
        assert 429 in answered
    elif attack.path == CHAT:
        assert answered.count(401) > attack.connections / 2, "nobody waits for what a stranger says"
