"""Engines: which databases are taken, and what a connection to one can be relied on for."""

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from contextd.store.engines import Engines, StoreError, make_engines, parse_url, shown, sqlite_path


def engines_on(database_url: str) -> Engines:
    """SQLite's never make the file: `upgrade` does."""
    url = parse_url(database_url)
    if url.get_backend_name() == "sqlite":
        sqlite_path(url).touch()
    return make_engines(database_url, readers=2)


@pytest.fixture
async def engines(database_url: str) -> AsyncIterator[Engines]:
    """Engines on a database with one empty table `t`."""
    made = engines_on(database_url)
    await execute(made.writer, "CREATE TABLE t (a INTEGER)")
    yield made
    await made.dispose()


@pytest.fixture
async def sqlite_engines(sqlite_url: str) -> AsyncIterator[Engines]:
    made = engines_on(sqlite_url)
    await execute(made.writer, "CREATE TABLE t (a INTEGER)")
    yield made
    await made.dispose()


async def execute(engine: AsyncEngine, statement: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(statement))


async def values(engine: AsyncEngine, query: str) -> list[object]:
    async with engine.connect() as connection:
        return list((await connection.execute(text(query))).scalars())


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "not a URL"),
        ("contextd.db", "not a URL"),
        ("postgresql+asyncpg://user:secret@host:port/name", "not a URL"),
        ("sqlite:///contextd.db", "must begin with sqlite\\+aiosqlite:// or postgresql\\+asyncpg"),
        ("postgresql://user:secret@host/name", "got postgresql://user:\\*\\*\\*@host/name"),
        ("postgresql+psycopg://user@host/name?password=secret", "must begin with"),
        ("mysql+aiomysql://user:secret@host/name", "must begin with"),
        ("sqlite+aiosqlite://", "in memory"),
        ("sqlite+aiosqlite:///:memory:", "in memory"),
        ("sqlite+aiosqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite+aiosqlite:///file:contextd.db?uri=true", "plain path"),
        ("sqlite+aiosqlite:///contextd.db?timeout=5", "plain path"),
        ("sqlite+aiosqlite:///what?.db", "written as %3F"),
        ("sqlite+aiosqlite:///contextd.db?", "written as %3F"),
        ("sqlite+aiosqlite://contextd.db", "three slashes"),
        ("sqlite+aiosqlite://user:secret@host/contextd.db", "three slashes"),
        ("postgresql+asyncpg://user:secret@host", "names no database"),
    ],
)
def test_other_databases_are_refused_in_a_sentence(url: str, sentence: str) -> None:
    """One line that says what is wrong, without the password."""
    with pytest.raises(StoreError, match=sentence) as caught:
        make_engines(url, readers=1)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_printed_of_a_url_holds_no_secret() -> None:
    """Neither the password nor a parameter is shown: asyncpg takes a password as one, too."""
    url = parse_url("postgresql+asyncpg://user:secret@host:5432/name?password=secret")
    assert shown(url) == "postgresql+asyncpg://user:***@host:5432/name"


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL is optional, and the sentence says how to get it."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(StoreError, match=r"install contextd\[postgres\]"):
        make_engines("postgresql+asyncpg://user@host/name", readers=1)


def test_an_old_sqlite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older than 3.35 has no RETURNING; better said at the start than at the first append."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(StoreError, match=r"needs SQLite 3\.35"):
        make_engines("sqlite+aiosqlite:///contextd.db", readers=1)


def test_a_path_is_the_same_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute or through a link: one file has one path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real.db").touch()
    (tmp_path / "link.db").symlink_to("real.db")
    paths = {
        sqlite_path(parse_url(f"sqlite+aiosqlite:///{name}"))
        for name in ("real.db", "./real.db", "link.db", f"{tmp_path}/real.db")
    }
    assert paths == {(tmp_path / "real.db").resolve()}


async def test_the_writer_writes_and_the_readers_read(engines: Engines) -> None:
    """What is committed by one engine is seen by the other."""
    await execute(engines.writer, "INSERT INTO t VALUES (1)")
    assert await values(engines.reader, "SELECT a FROM t") == [1]


async def test_a_savepoint_undoes_only_its_own(engines: Engines) -> None:
    """A refused change in a group must not take its neighbours with it."""
    async with engines.writer.begin() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        savepoint = await connection.begin_nested()
        await connection.execute(text("INSERT INTO t VALUES (2)"))
        await savepoint.rollback()
        await connection.execute(text("INSERT INTO t VALUES (3)"))
    assert await values(engines.reader, "SELECT a FROM t ORDER BY a") == [1, 3]


async def test_a_rollback_undoes_a_change_of_schema(engines: Engines) -> None:
    """DDL is part of the transaction on both databases, so a migration is all or nothing."""
    async with engines.writer.connect() as connection:
        await connection.execute(text("CREATE TABLE u (a INTEGER)"))
        await connection.execute(text("INSERT INTO u VALUES (1)"))
        await connection.rollback()
    with pytest.raises(DBAPIError):
        await values(engines.reader, "SELECT a FROM u")


async def test_the_writer_has_one_connection(engines: Engines) -> None:
    """Who asks while it is taken waits, and gets it when it is given back."""
    async with engines.writer.connect():
        second = asyncio.ensure_future(values(engines.writer, "SELECT 1"))
        done, _ = await asyncio.wait([second], timeout=0.05)
        assert not done
    assert await second == [1]


async def test_readers_do_not_wait_for_an_open_write(engines: Engines) -> None:
    """They go on with what was committed before."""
    async with engines.writer.begin() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        assert await values(engines.reader, "SELECT a FROM t") == []
    assert await values(engines.reader, "SELECT a FROM t") == [1]


async def test_disposed_engines_open_again(engines: Engines) -> None:
    """Disposing closes connections and forbids nothing."""
    await engines.dispose()
    assert await values(engines.reader, "SELECT a FROM t") == []


async def test_sqlite_readers_cannot_write(sqlite_engines: Engines) -> None:
    """A reader that writes is a defect, and is told so by the database."""
    with pytest.raises(DBAPIError, match="readonly"):
        await execute(sqlite_engines.reader, "INSERT INTO t VALUES (1)")


async def test_a_sqlite_reader_sees_one_snapshot(sqlite_engines: Engines) -> None:
    """From its first read to the end of its transaction nothing changes for it."""
    async with sqlite_engines.reader.connect() as connection:
        before = (await connection.execute(text("SELECT count(*) FROM t"))).scalar()
        await execute(sqlite_engines.writer, "INSERT INTO t VALUES (1)")
        after = (await connection.execute(text("SELECT count(*) FROM t"))).scalar()
    assert (before, after) == (0, 0)


async def test_a_sqlite_write_transaction_begins_with_the_lock(
    sqlite_engines: Engines, sqlite_url: str
) -> None:
    """Also before its first write: read and then write cannot be refused half-way."""
    path = sqlite_path(parse_url(sqlite_url))
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    async with sqlite_engines.writer.begin() as connection:
        await connection.execute(text("SELECT a FROM t"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


async def test_sqlite_is_durable_and_checks_foreign_keys(sqlite_engines: Engines) -> None:
    """§1: nothing is visible before it is durable: WAL with synchronous=FULL (2)."""
    expected = {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
        "temp_store": 2,
    }
    found = {name: (await values(sqlite_engines.writer, f"PRAGMA {name}"))[0] for name in expected}
    assert found == expected


async def test_postgresql_knows_who_is_connected(postgresql_url: str) -> None:
    """The operator sees the name in pg_stat_activity, and short queries are not compiled."""
    engines = make_engines(postgresql_url, readers=1)
    query = "SELECT current_setting('application_name') || ' ' || current_setting('jit')"
    assert await values(engines.reader, query) == ["contextd off"]
    assert await values(engines.writer, query) == ["contextd off"]
    await engines.dispose()


async def test_a_broken_postgresql_connection_is_replaced(postgresql_url: str) -> None:
    """A restart of the server costs the next request a reconnect, not a failure."""
    engines = make_engines(postgresql_url, readers=1)
    (pid,) = await values(engines.reader, "SELECT pg_backend_pid()")
    await values(engines.writer, f"SELECT pg_terminate_backend({pid})")
    assert await values(engines.reader, "SELECT 1") == [1]
    await engines.dispose()
