"""What the live tests share: one Letta server of each kind per session, a demo model behind it, one agent per test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.letta.demo_model import RunningDemoModel
from tests.live.app_server import AppServer, running_app_server
from tests.live.letta_server import Agent, LettaServer
from tests.live.model_thread import demo_model_in_thread
from tests.live.v1_server import V1Server, running_v1

_HERE = Path(__file__).parent
_PATIENCE = 180
"""Seconds per test: the first one starts the server, and a restart takes some ten seconds."""


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker("live")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_PATIENCE))


@pytest.fixture(scope="session")
def demo_model() -> Iterator[RunningDemoModel]:
    """The model behind V1, which lets it talk on when a turn is cancelled."""
    with demo_model_in_thread() as model:
        yield model


@pytest.fixture(scope="session")
def v1(demo_model: RunningDemoModel) -> Iterator[V1Server]:
    with running_v1(demo_model.base_url) as server:
        yield server


@pytest.fixture(scope="session")
def app_server() -> Iterator[AppServer]:
    with demo_model_in_thread() as model, running_app_server(model) as server:
        yield server


@pytest.fixture(scope="session", params=["v1", "app_server"])
def letta(request: pytest.FixtureRequest) -> LettaServer:
    """Each of the two servers in turn; only what is asked for is started."""
    server: LettaServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def model(letta: LettaServer, request: pytest.FixtureRequest) -> RunningDemoModel:
    """The model behind that server."""
    if isinstance(letta, AppServer):
        return letta.model
    behind_v1: RunningDemoModel = request.getfixturevalue("demo_model")
    return behind_v1


@pytest.fixture
def agent(letta: LettaServer) -> Iterator[Agent]:
    letta.start()  # a test before this one may have killed it
    created = letta.create_agent()
    yield created
    letta.delete_agent(created.id)
