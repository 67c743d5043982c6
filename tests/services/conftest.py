"""What the services' tests share: real Letta servers, a gateway before each with a key, and agents on them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from gateway.letta.demo_model import RunningDemoModel
from tests.live.app_server import AppServer
from tests.live.conftest import app_server, demo_model, v1
from tests.live.gateways import gateway_before
from tests.live.letta_server import Agent, LettaServer
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.surroundings import API_KEY, Client, base_url

__all__ = ["app_server", "demo_model", "v1"]  # fixtures that are asked for by name

_HERE = Path(__file__).parent
_PATIENCE = 480
"""Seconds per test: the first one of a client runs all of its steps, and may start a server before."""


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker("services")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_PATIENCE))


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    if problem := installs.missing():
        pytest.fail(problem)


@pytest.fixture(scope="session", params=["app_server", "v1"])
def letta(request: pytest.FixtureRequest) -> LettaServer:
    """Each of the two servers in turn; only what is asked for is started."""
    server: LettaServer = request.getfixturevalue(request.param)
    return server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(letta: LettaServer) -> AsyncIterator[GatewayProcess]:
    async with gateway_before(letta, LETTA_GATEWAY_API_KEYS=API_KEY) as running:
        yield running


@pytest.fixture
def model(letta: LettaServer, request: pytest.FixtureRequest) -> RunningDemoModel:
    """The model behind that server."""
    if isinstance(letta, AppServer):
        return letta.model
    behind_v1: RunningDemoModel = request.getfixturevalue("demo_model")
    return behind_v1


@pytest.fixture
def agent(letta: LettaServer) -> Iterator[Agent]:
    created = letta.create_agent()
    yield created
    letta.delete_agent(created.id)


@pytest.fixture
def client(gateway: GatewayProcess, agent: Agent) -> Client:
    """A client of the gateway that asks for an agent of its own."""
    return Client(base_url(gateway), agent.name)
