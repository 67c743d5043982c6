from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import Break, Script, ScriptedBackend
from gateway.translation.agent_events import TextDelta
from gateway.ui.recent_errors import RecentError, RecentErrors
from tests.server.running import FRIEND, Running, serving, settings
from tests.ui.operator_page import API_KEY, OPERATOR_KEY, signed_in


def error(at: float, status: int = 503) -> RecentError:
    return RecentError(at=at, code="c", status=status, method="GET", route="/r", request_id=None, owner=None)


def test_newest_first_and_no_more_than_so_many() -> None:
    errors = RecentErrors(3)
    for at in range(5):
        errors.add(error(at))
    assert [one.at for one in errors.newest()] == [4, 3, 2]


def test_many_refusals_do_not_push_out_a_failure() -> None:
    errors = RecentErrors(3)
    errors.add(error(1))
    errors.add(error(2, 200))
    for at in range(10, 20):
        errors.add(error(at, 404))
    assert [one.at for one in errors.newest()] == [19, 18, 17, 2, 1]


async def shown(gateway: Running) -> list[dict[str, object]]:
    found: list[dict[str, object]] = (await (await signed_in(gateway)).ask("GET", "overview")).json()["errors"]
    return found


async def test_errors_of_clients_with_their_request_ids_and_nothing_they_wrote() -> None:
    async with serving(settings(operator_key=OPERATOR_KEY, api_keys=(API_KEY,))) as gateway:
        asked = {"X-Api-Key": API_KEY, "X-Request-Id": "mine-1"}
        assert (await gateway.chat("a canary", model="canary", headers=asked)).status == 404
        assert (await gateway.ask("GET", "/canary?canary=canary", {"X-Api-Key": "canary"})).status == 404
        newest, oldest = await shown(gateway)
        assert oldest | {"at": 0, "owner": ""} == {
            "at": 0,
            "code": "model_not_found",
            "status": 404,
            "method": "POST",
            "route": "/v1/chat/completions",
            "request_id": "mine-1",
            "owner": "",
        }
        assert str(oldest["owner"]).startswith("key_")
        assert (newest["code"], newest["route"]) == ("unknown_url", "other")
        assert "canary" not in repr((newest, oldest))


async def test_error_in_the_midst_of_a_stream() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.play(Script(steps=([TextDelta("Hel")], Break(UpstreamUnavailable()))))
    async with serving(settings(operator_key=OPERATOR_KEY), backend) as gateway:
        assert (await gateway.chat(stream=True)).status == 200
        (told,) = await shown(gateway)
        assert (told["code"], told["status"]) == ("upstream_unavailable", 200)
