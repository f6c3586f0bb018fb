"""A misbehaving server on a free port, in the test's own event loop."""

from collections.abc import AsyncIterator

import pytest
from fake_contextd import FakeContextd, serving
from fake_wire import FakeContext

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
