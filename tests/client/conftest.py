"""A misbehaving server on a free port, in the test's own event loop."""

from collections.abc import AsyncIterator, Iterator

import pytest
from fake_contextd import FakeContextd, serving
from fake_wire import FakeContext
from serving import Server

from contextd.client import Client
from contextd.client import errors as client_errors


@pytest.fixture
async def fake() -> AsyncIterator[FakeContextd]:
    async with serving(FakeContextd()) as fake:
        yield fake


@pytest.fixture
async def client(fake: FakeContextd) -> AsyncIterator[Client]:
    async with Client(fake.url) as client:
        yield client


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are real, but short."""
    monkeypatch.setattr(client_errors, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(client_errors, "BACKOFF_MAX_S", 0.01)


@pytest.fixture
def context(fake: FakeContextd) -> FakeContext:
    return fake.add("c")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server, which all tests of this folder share."""
    database = tmp_path_factory.mktemp("client") / "contextd.db"
    with Server(database, settings={"scripted_rate": 0}) as running:
        yield running


@pytest.fixture
async def real(server: Server) -> AsyncIterator[Client]:
    async with Client(server.url) as client:
        yield client
