from collections.abc import AsyncIterator
from importlib.metadata import entry_points

import pytest

from gateway.settings import SettingError
from middleware.chain import DEFAULT, REQUIRED, build_chain
from middleware.contract import ENTRY_POINTS
from tests.server.recorded_logs import recorded_logs
from tests.server.running import Running, chat_body, serving, settings
from tests.server.wire import request


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving(settings(api_keys=("sk-one",), rate_limit="1/minute")) as running:
        yield running


def refusal(**changes: object) -> str:
    with pytest.raises(SettingError) as refused:
        build_chain(settings(**changes))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_names_mean_the_default_chain() -> None:
    assert len(build_chain(settings())) == len(DEFAULT)


def test_default_chain_is_the_one_of_the_design() -> None:
    observers = ("request_id", "access_log", "metrics")
    assert (*observers, "error_boundary", "body_guard", "auth", "rate_limit") == DEFAULT
    assert set(DEFAULT) >= REQUIRED


def test_built_ins_come_in_by_the_door_for_all() -> None:
    assert {entry.name for entry in entry_points(group=ENTRY_POINTS)} >= set(DEFAULT)


def test_own_order_and_choice() -> None:
    assert len(build_chain(settings(middleware=("error_boundary", "auth", "body_guard")))) == 3


def test_name_twice() -> None:
    assert "twice" in refusal(middleware=(*DEFAULT, "auth"))


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_required_one_left_out(name: str) -> None:
    assert name in refusal(middleware=tuple(other for other in DEFAULT if other != name))


def test_name_that_nothing_installed_has() -> None:
    assert "'autth'" in refusal(middleware=(*DEFAULT, "autth"))


def test_config_of_one_that_is_not_in_the_chain() -> None:
    assert "curfew" in refusal(middleware_config={"curfew": {}})


def test_unknown_key_of_a_config() -> None:
    assert "louder" in refusal(middleware_config={"access_log": {"louder": True}})
    assert "auth" in refusal(middleware_config={"auth": {"anything": 1}})


def test_wrong_type_in_a_config() -> None:
    assert "access_log" in refusal(middleware_config={"access_log": {"quiet": 1}})


async def test_head_is_judged_before_the_key_and_the_key_before_the_limit(gateway: Running) -> None:
    url = "/v1/chat/completions"
    assert (await gateway.ask("POST", url, {"Content-Type": "text/plain"}, b"x")).status == 415
    assert (await gateway.ask("POST", url, {"Content-Type": "application/json"}, chat_body())).status == 401
    headers = {"Content-Type": "application/json", "X-Api-Key": "sk-one"}
    assert (await gateway.ask("POST", url, headers, b"not json")).status == 400
    assert (await gateway.ask("POST", url, headers, chat_body())).status == 429


async def test_observers_see_what_the_client_sees(gateway: Running) -> None:
    with recorded_logs() as logs:
        answer = await gateway.raw(request("GET", "/v1/models"))
        (line,) = logs.requests
    assert answer.status == line["status"] == 401
    assert line["request_id"] == answer.header("x-request-id")
    assert 'status="401"' in gateway.exposed()
