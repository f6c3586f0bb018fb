"""contextd in this process, without a socket, over both databases."""

import asyncio
import shutil
import sqlite3
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path

import pytest

from contextd.app import Contextd, now_ms, running
from contextd.provider import Event, Finished, ModelRequest, TextDelta
from contextd.settings import Settings


class HeldProvider:
    """Writes what the test hands it, when the test hands it; the stream ends with None."""

    name = "scripted"

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    def say(self, *events: Event | Exception | str | None) -> None:
        """A string is a text delta; an exception is raised; None ends the stream."""
        for event in events:
            self._events.put_nowait(TextDelta(event) if isinstance(event, str) else event)

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.closed.clear()
        self.asked.set()
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
            yield Finished("stop")
        finally:
            self.asked.clear()
            self.closed.set()

    async def aclose(self) -> None:
        """Nothing is held."""


NEW_ID = "UPDATE contextd_database SET id = '{}'"


@pytest.fixture
def sqlite_url(tmp_path: Path, upgraded_sqlite: Path) -> str:
    """A SQLite database with contextd's schema and an id of its own."""
    path = tmp_path / "contextd.db"
    shutil.copyfile(upgraded_sqlite, path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(NEW_ID.format(uuid.uuid4().hex[:8]))
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
def postgresql_template(upgraded_postgresql: str) -> str:
    """With contextd's schema. The incarnation of each copy is its own."""
    return upgraded_postgresql


Start = Callable[..., AbstractAsyncContextManager[Contextd]]


@pytest.fixture
def provider() -> HeldProvider:
    """The model of the test."""
    return HeldProvider()


@pytest.fixture
def start(database_url: str, provider: HeldProvider) -> Start:
    """Starts contextd on the test's database; again for a restart, or twice for two processes."""

    @asynccontextmanager
    async def start_one(
        provider: HeldProvider = provider,
        clock_ms: Callable[[], int] = now_ms,
        **settings: object,
    ) -> AsyncIterator[Contextd]:
        values = {"database": database_url, "backoff_initial_s": 0.0, "poll_s": 0.1, **settings}
        async with running(
            Settings(**values),  # type: ignore[arg-type]
            providers={"scripted": provider},
            clock_ms=clock_ms,
        ) as contextd:
            yield contextd

    return start_one
