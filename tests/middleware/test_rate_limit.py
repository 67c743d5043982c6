import asyncio
from collections import Counter

import limits
import pytest

from middleware.rate_limit import duration
from tests.handlers.platforms import ANN, BEN, key, platform, token
from tests.server.running import serving, settings

LIMIT = limits.parse("600/minute")


async def test_200_at_once_at_a_limit_of_100() -> None:
    async with serving(settings(rate_limit="100/minute")) as gateway:
        answers = await asyncio.gather(*(gateway.ask("GET", "/v1/models") for _ in range(200)))
        assert Counter(answer.status for answer in answers) == {200: 100, 429: 100}
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.error["type"] == "rate_limit_error"
        assert refused.code == "rate_limit_exceeded"
        assert 1 <= int(refused.header("retry-after") or 0) <= 60
        assert refused.header("x-should-retry") == "true"
        assert refused.header("x-ratelimit-limit-requests") == "100"
        assert refused.header("x-ratelimit-remaining-requests") == "0"
        left = {answer.header("x-ratelimit-remaining-requests") for answer in answers if answer.status == 200}
        assert "0" in left
        assert (await gateway.ask("GET", "/health")).status == 200, "probes are not counted"


async def test_window_moves_on() -> None:
    async with serving(settings(rate_limit="2/second")) as gateway:
        for expected in (200, 200, 429):
            assert (await gateway.ask("GET", "/v1/models")).status == expected
        await asyncio.sleep(1.05)
        assert (await gateway.ask("GET", "/v1/models")).status == 200


async def test_streams_are_counted_and_told() -> None:
    async with serving(settings(rate_limit="1/minute")) as gateway:
        answer = await gateway.chat(stream=True)
        assert answer.header("x-ratelimit-limit-requests") == "1"
        assert answer.header("x-ratelimit-remaining-requests") == "0"
        assert answer.header("x-ratelimit-reset-requests") in ("1m0s", "60s", "59s")
        assert (await gateway.chat(stream=True)).status == 429
        assert len(gateway.backend.turns) == 1


async def test_each_key_has_its_own_share() -> None:
    """Behind one proxy, that is: from one address, the address's share is used up too."""
    chosen = settings(api_keys=("sk-one", "sk-two"), rate_limit="2/minute")
    async with serving(chosen) as gateway:

        async def ask(key: str, address: str) -> int:
            headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": address}
            return (await gateway.ask("GET", "/v1/models", headers)).status

        assert [await ask("sk-one", f"203.0.113.{n}") for n in range(3)] == [200, 200, 429]
        assert await ask("sk-two", "203.0.113.9") == 200
        assert await ask("sk-two", "203.0.113.9") == 200


async def test_forged_addresses_do_not_help() -> None:
    keys = tuple(f"sk-{n}" for n in range(100))  # the key's own limit is not what is tried here
    unused = iter(keys)
    chosen = settings(rate_limit="3/minute", trusted_networks=("127.0.0.1/32",), api_keys=keys)
    async with serving(chosen) as gateway:

        async def ask(forwarded: str, source: str | None = None) -> int:
            headers = {"X-Forwarded-For": forwarded, "X-Api-Key": next(unused)}
            return (await gateway.ask("GET", "/v1/models", headers, source=source)).status

        direct = [await ask(f"198.51.100.{n}", "127.0.0.5") for n in range(5)]
        assert direct == [200, 200, 200, 429, 429], "a stranger's header is not believed"
        proxied = [await ask(f"198.51.100.{n}, 203.0.113.7") for n in range(5)]
        assert proxied == [200, 200, 200, 429, 429], "what is left of the proxy's own word is the client's"
        unreadable = [await ask(f"198.51.100.{n}, what{n}") for n in range(5)]
        assert unreadable == [200, 200, 200, 429, 429]


async def test_one_ipv6_network_is_one_client() -> None:
    keys = tuple(f"sk-{n}" for n in range(100))
    unused = iter(keys)
    async with serving(settings(rate_limit="2/minute", api_keys=keys)) as gateway:

        async def ask(address: str) -> int:
            headers = {"X-Forwarded-For": address, "X-Api-Key": next(unused)}
            return (await gateway.ask("GET", "/v1/models", headers)).status

        assert [await ask(f"2001:db8:0:1:{n:x}::1") for n in range(4)] == [200, 200, 429, 429]
        assert await ask("2001:db8:0:2::1") == 200
        assert [await ask(f"::ffff:203.0.113.{n}") for n in range(3)] == [200, 200, 200], "IPv4 in disguise"
        assert [await ask(a) for a in ("203.0.113.1", "::ffff:203.0.113.1")] == [200, 429]


async def test_several_limits() -> None:
    async with serving(settings(rate_limit="2/second;3/hour")) as gateway:
        first = await gateway.ask("GET", "/v1/models")
        assert first.header("x-ratelimit-limit-requests") == "2", "the tightest is told"
        assert (await gateway.ask("GET", "/v1/models")).status == 200
        assert (await gateway.ask("GET", "/v1/models")).header("retry-after") == "1"
        await asyncio.sleep(1.05)
        last = [await gateway.ask("GET", "/v1/models") for _ in range(2)]
        assert [answer.status for answer in last] == [200, 429]
        assert 3590 < int(last[1].header("retry-after") or 0) <= 3600, "the truth, however long"


async def test_whom_the_address_refuses_has_not_used_up_the_key() -> None:
    async with serving(settings(rate_limit="2/minute", api_keys=("sk-one", "sk-two"))) as gateway:

        async def ask(key: str, address: str) -> int:
            headers = {"X-Forwarded-For": address, "X-Api-Key": key}
            return (await gateway.ask("GET", "/v1/models", headers)).status

        assert [await ask("sk-two", "203.0.113.1") for _ in range(2)] == [200, 200]
        assert [await ask("sk-one", "203.0.113.1") for _ in range(5)] == [429] * 5
        assert [await ask("sk-one", "203.0.113.2") for _ in range(2)] == [200, 200]


async def test_what_is_refused_before_uses_up_nothing() -> None:
    async with serving(settings(api_keys=("sk-one",), rate_limit="1/minute")) as gateway:
        for _ in range(3):
            assert (await gateway.ask("GET", "/v1/models")).status == 401
        assert (await gateway.ask("GET", "/v1/models", {"X-Api-Key": "sk-one"})).status == 200


async def test_each_user_has_their_own_share_on_every_surface() -> None:
    async with platform(api_keys=("sk-one",), rate_limit="2/minute") as gateway:

        async def ask(path: str, headers: dict[str, str], address: str) -> int:
            return (await gateway.ask("GET", path, {**headers, "X-Forwarded-For": address})).status

        assert await ask("/v1/models", key(ANN), "203.0.113.1") == 200
        assert await ask("/api/v1/auth/me", token(ANN), "203.0.113.2") == 200
        for path, headers in (("/v1/models", key(ANN)), ("/api/v1/auth/me", token(ANN))):
            assert await ask(path, headers, "203.0.113.3") == 429
        assert await ask("/v1/models", key(BEN), "203.0.113.4") == 200
        assert await ask("/api/v1/auth/me", token(BEN), "203.0.113.4") == 200


async def test_open_and_operators_routes_are_not_counted() -> None:
    async with platform(operator_key="sk-operator", rate_limit="1/minute") as gateway:
        for _ in range(3):
            assert (await gateway.ask("GET", "/.well-known/jwks.json")).status == 200
            assert (await gateway.ask("GET", "/api/v1/admin/users", {"X-Api-Key": "sk-operator"})).status == 200
        assert [(await gateway.ask("GET", "/v1/models")).status for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (5.2, "6s"),
        (60, "1m0s"),
        (90, "1m30s"),
        (3600, "1h0m0s"),
        (86_399.5, "24h0m0s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# Figures -------------------------------------------------------------------------------------------------------------


async def test_refusals_are_counted_by_surface() -> None:
    async with platform(api_keys=("sk-one",), rate_limit="1/minute") as gateway:
        for path, headers, times in (("/v1/models", key(ANN), 3), ("/api/v1/auth/me", token(BEN), 2)):
            for number in range(times):
                address = {"X-Forwarded-For": f"203.0.113.{times}{number}"}
                await gateway.ask("GET", path, {**headers, **address})
        assert 'letta_gateway_rate_limited_total{surface="openai"} 2.0' in gateway.exposed()
        assert 'letta_gateway_rate_limited_total{surface="platform"} 1.0' in gateway.exposed()
