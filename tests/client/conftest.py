"""A misbehaving server on a free port, in the test's own event loop."""

from collections.abc import AsyncIterator

import pytest
from fake_contextd import FakeContextd, serving

from contextd.client import Client


@pytest.fixture
async def fake() -> AsyncIterator[FakeContextd]:
    async with serving(FakeContextd()) as fake:
        yield fake


@pytest.fixture
async def client(fake: FakeContextd) -> AsyncIterator[Client]:
    async with Client(fake.url) as client:
        yield client
