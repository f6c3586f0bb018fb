"""Brings a database to the schema of this contextd, or refuses it and leaves it as it was.

Several processes may start at once on one database, also on one that is still empty. Each takes the
database's own lock (SQLite: the write lock; PostgreSQL: an advisory lock), looks, and migrates in
that one transaction; who comes second finds nothing to do. A SQLite file is looked at before that,
by a connection that cannot write: already the switch to WAL would change a file that is not ours.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from weakref import WeakKeyDictionary

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contextd.store import tables
from contextd.store.engines import (
    StoreError,
    dialect_of,
    parse_url,
    postgresql_engine,
    reason,
    shown,
    sqlite_engine,
    sqlite_error_name,
    sqlite_path,
    sqlite_uri,
)
from contextd.store.incarnation import identify
from contextd.store.trouble import AnotherDatabaseError

# How long a start waits for others that are starting; then it gives up with a `StoreError`.
LOCK_WAIT_S = 60
RETRY_S = 0.02
ADVISORY_CLASS = 0x63747864  # "ctxd": the first half of each advisory lock that contextd takes
ADVISORY_UPGRADE = 0
VERSION_TABLE = "alembic_version"


async def upgrade(database_url: str) -> str:
    """Bring the database to the newest schema, creating it if need be; answers its incarnation.

    That of SQLite is the id that is made once, with the database. By it a cursor of another database
    can be told (§4.1, §18).
    Raises `StoreError`, with the database untouched, when it was written by a newer contextd or by
    another program, when it is no database, or when it cannot be reached, written or locked.
    """
    url = parse_url(database_url)
    try:
        if dialect_of(url) == "sqlite":
            await _prepare_file(url)
        async with _one_at_a_time():
            return await _upgrade(url)
    except (DBAPIError, sqlite3.Error, OSError) as error:
        raise StoreError(f"The database {shown(url)} {reason(error)}") from error


def migration_engine(url: URL) -> AsyncEngine:
    """An engine for changing the schema: one connection that waits long for its lock.

    Foreign keys are off on SQLite, because Alembic changes a table there by copying and dropping
    it, and the drop would delete every row that refers to the table.
    """
    if dialect_of(url) == "sqlite":
        return sqlite_engine(
            url,
            connections=1,
            begin="BEGIN IMMEDIATE",
            pragmas={"foreign_keys": "OFF", "synchronous": "FULL"},
            busy_timeout_s=LOCK_WAIT_S,
        )
    return postgresql_engine(url, connections=1)


def migrations_folder() -> Path:
    """Where the migrations are: inside an installed package, at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if (installed / "env.py").is_file() else package.parent / "migrations"


_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def _one_at_a_time() -> asyncio.Lock:
    """Alembic keeps the running migration in a global, so upgrades of one process take turns."""
    return _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


async def _upgrade(url: URL) -> str:
    async with _connection(migration_engine(url), url) as connection, connection.begin():
        database_id = await connection.run_sync(_upgrade_locked, url)
        return await _incarnation(connection, database_id)


async def _incarnation(connection: AsyncConnection, database_id: str) -> str:
    if connection.dialect.name != "postgresql":
        return database_id
    try:
        return await identify((await connection.get_raw_connection()).driver_connection)
    except AnotherDatabaseError as error:
        raise StoreError(f"The database {shown(connection.engine.url)} {error}") from None


async def find_incarnation(database_url: str) -> str | None:
    """The incarnation of a PostgreSQL database that is whole and of this schema; None for any other.

    Changes nothing. Raises `StoreError` or the database's own error when it cannot be looked at.
    """
    url = parse_url(database_url)
    scripts = ScriptDirectory.from_config(_alembic_config())
    async with _connection(migration_engine(url), url) as connection:
        found = await connection.run_sync(_examine, url, scripts)
        if found != set(scripts.get_heads()):
            return None
        return await _incarnation(connection, "") or None


@asynccontextmanager
async def _connection(engine: AsyncEngine, url: URL) -> AsyncIterator[AsyncConnection]:
    """The only connection of `engine`, closed at the end.

    Connecting fails in as many ways as a network does, and asyncpg's own errors come unwrapped.
    """
    try:
        connection = await engine.connect()
    except DBAPIError:
        raise
    except Exception as error:
        raise StoreError(f"The database {shown(url)} {reason(error)}") from error
    try:
        yield connection
    finally:
        await connection.close()
        await engine.dispose()


def _upgrade_locked(connection: Connection, url: URL) -> str:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"))
        key = f"{ADVISORY_CLASS}, {ADVISORY_UPGRADE}"
        connection.execute(text(f"SELECT pg_advisory_xact_lock({key})"))
    config = _alembic_config()
    scripts = ScriptDirectory.from_config(config)
    found = _examine(connection, url, scripts)
    if found != set(scripts.get_heads()):
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return _database_id(connection, url)


def _alembic_config() -> Config:
    """No file is read, so Alembic finds no logging to set up and prints nothing."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _examine(connection: Connection, url: URL, scripts: ScriptDirectory) -> set[str]:
    """The revisions that the database is at: none if it is empty. Only reads.

    Raises `StoreError` when the tables are not contextd's, or of a revision that is not known here.
    """
    names = set(inspect(connection).get_table_names())
    found: set[str] = set()
    if VERSION_TABLE in names:
        found = set(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars())  # noqa: S608
    if not found and not names - {VERSION_TABLE}:
        return found
    if not found or tables.database.name not in names:
        raise StoreError(
            f"The database {shown(url)} has tables of another program; it was left as it is"
        )
    unknown = found - {script.revision for script in scripts.walk_revisions()}
    if unknown:
        raise StoreError(
            f"The database {shown(url)} was written by a newer contextd "
            f"(revision {', '.join(sorted(unknown))}); it was left as it is"
        )
    return found


def _database_id(connection: Connection, url: URL) -> str:
    ids = connection.execute(select(tables.database.c.id)).scalars().all()
    if len(ids) != 1:
        raise StoreError(f"The database {shown(url)} is damaged: it has {len(ids)} ids, not one")
    return str(ids[0])


async def _prepare_file(url: URL) -> None:
    """Find out whether the file is one to use, without changing it; then switch it to WAL."""
    path = sqlite_path(url)
    _check_path(path)
    if path.exists():
        await _look(url, path)
    # SQLite does not always wait for its lock here, whatever the busy timeout says.
    deadline = time.monotonic() + LOCK_WAIT_S
    while not await asyncio.to_thread(_switch_to_wal, path):
        if time.monotonic() > deadline:
            raise StoreError(f"The database {path} is locked by another program")
        await asyncio.sleep(RETRY_S)


def _check_path(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise StoreError(f"The folder {folder} for the database does not exist")
    if path.is_dir():
        raise StoreError(f"The database {path} is a folder; it must be a file")
    if path.exists() and not path.is_file():
        raise StoreError(f"The database {path} is a device or a pipe; it must be a file")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"The database {path} cannot be read and written by this user")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"The folder {folder} cannot be written, and SQLite keeps its log there")


async def _look(url: URL, path: Path) -> None:
    """Examine the file over a connection that cannot write.

    After a crash SQLite may have to roll a transaction back before anyone can read, and needs to
    write for that; then it is allowed to, which changes nothing that was ever committed.
    """
    try:
        await _look_in_mode("ro", url, path)
    except DBAPIError as error:
        if not sqlite_error_name(error).startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
            raise
        await _look_in_mode("rw", url, path)


async def _look_in_mode(mode: str, url: URL, path: Path) -> None:
    engine = sqlite_engine(
        sqlite_uri(path, mode=mode),
        connections=1,
        begin="BEGIN",
        pragmas={},
        busy_timeout_s=LOCK_WAIT_S,
    )
    async with _connection(engine, url) as connection:
        await connection.run_sync(_examine, url, ScriptDirectory.from_config(_alembic_config()))


def _switch_to_wal(path: Path) -> bool:
    """False when others are at the file just now. WAL is kept in the file: this is done once."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if sqlite_error_name(error).startswith("SQLITE_BUSY"):
                return False
            raise
    if mode != "wal":
        raise StoreError(f"The database {path} is on a file system that cannot do SQLite's WAL")
    return True
