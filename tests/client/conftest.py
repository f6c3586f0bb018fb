"""A misbehaving server on a free port, in the test's own event loop."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fake_contextd import FakeContextd

from contextd.client import Client


@pytest.fixture
async def fake() -> AsyncIterator[FakeContextd]:
    app = FakeContextd()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it is told to cut connections
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, lifespan="off", log_level="critical", ws="none"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0)
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield app
    for context in app.contexts.values():
        app.disconnect(context)
    server.should_exit = server.force_exit = True
    await serving


@pytest.fixture
async def client(fake: FakeContextd) -> AsyncIterator[Client]:
    async with Client(fake.url, heartbeat_s=4.0) as client:
        yield client
