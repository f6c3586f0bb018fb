"""Which errors of a database may pass: only what is known to, on both databases."""

import asyncio
import sqlite3

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import InternalError, Overloaded
from contextd.store.engines import make_engines, wrapped
from contextd.store.tables import tombstones
from contextd.store.trouble import DatabaseMovedError, Kind, translated, trouble_of
from contextd.store.upgrade import upgrade
from contextd.store.writer import Writer


class PostgresqlError(Exception):
    """As asyncpg's are: with a SQLSTATE."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__('Failing row contains ("chat text")')
        self.sqlstate = sqlstate


def sqlite_error(name: str) -> Exception:
    error = sqlite3.OperationalError("chat text")
    error.sqlite_errorname = name
    return wrapped(error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SQLITE_BUSY", Kind.BUSY),
        ("SQLITE_BUSY_SNAPSHOT", Kind.BUSY),
        ("SQLITE_LOCKED_SHAREDCACHE", Kind.BUSY),
        ("SQLITE_FULL", Kind.FULL),
        ("SQLITE_IOERR_FSYNC", Kind.FULL),
        ("SQLITE_CANTOPEN", Kind.AWAY),
        ("SQLITE_CORRUPT_VTAB", Kind.BROKEN),
        ("SQLITE_NOTADB", Kind.BROKEN),
        ("SQLITE_READONLY", Kind.BROKEN),
        ("SQLITE_READONLY_DBMOVED", Kind.BROKEN),
        ("SQLITE_CONSTRAINT_NOTNULL", Kind.DEFECT),
        ("SQLITE_TOOBIG", Kind.DEFECT),
        ("SQLITE_MISMATCH", Kind.DEFECT),
        ("SQLITE_ERROR", Kind.DEFECT),
        ("SQLITE_UNHEARD_OF", Kind.DEFECT),
    ],
)
def test_sqlite_errors(name: str, kind: Kind) -> None:
    """The extended code decides; one that nobody has heard of never passes."""
    trouble = trouble_of(sqlite_error(name))
    assert trouble is not None
    assert (trouble.kind, trouble.code) == (kind, name)


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("08006", Kind.AWAY),
        ("57P01", Kind.AWAY),
        ("57P03", Kind.AWAY),
        ("53300", Kind.AWAY),
        ("40001", Kind.BUSY),
        ("40P01", Kind.BUSY),
        ("55P03", Kind.BUSY),
        ("57014", Kind.BUSY),
        ("25P03", Kind.BUSY),
        ("53100", Kind.FULL),
        ("58030", Kind.FULL),
        ("25006", Kind.BROKEN),
        ("28P01", Kind.BROKEN),
        ("3D000", Kind.BROKEN),
        ("42P01", Kind.BROKEN),
        ("XX001", Kind.BROKEN),
        ("22000", Kind.DEFECT),
        ("22003", Kind.DEFECT),
        ("22021", Kind.DEFECT),
        ("23502", Kind.DEFECT),
        ("23505", Kind.DEFECT),
        ("42601", Kind.DEFECT),
        ("XX000", Kind.DEFECT),
    ],
)
def test_postgresql_errors(sqlstate: str, kind: Kind) -> None:
    """SQLSTATE decides, whether SQLAlchemy wrapped the error or not."""
    bare = PostgresqlError(sqlstate)
    for error in (bare, DBAPIError("INSERT", None, bare, hide_parameters=True)):
        trouble = trouble_of(error)
        assert trouble is not None
        assert (trouble.kind, trouble.code) == (kind, sqlstate)


def test_errors_without_a_code() -> None:
    """A connection that broke may come back, a file that was replaced does not; a defect is ours."""
    assert [
        found and found.kind
        for found in map(
            trouble_of,
            (ConnectionResetError(), TimeoutError(), DatabaseMovedError(), KeyError("x")),
        )
    ] == [Kind.AWAY, Kind.AWAY, Kind.BROKEN, None]


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (sqlite_error("SQLITE_BUSY"), Overloaded),
        (sqlite_error("SQLITE_READONLY"), InternalError),
        (PostgresqlError("40001"), Overloaded),
        (PostgresqlError("23502"), InternalError),
    ],
)
def test_a_refusal_says_nothing_of_the_row(error: Exception, refusal: type[Exception]) -> None:
    """Neither the answer nor what a traceback would print of it holds the driver's words."""
    found = translated(error, event="x")
    assert type(found) is refusal
    assert "chat" not in str(found)
    assert found.__cause__ is None
    assert found.__context__ is None


async def test_a_poisoned_entry_fails_alone(database_url: str) -> None:
    """Its neighbours in the group are stored; it gets a 500 at once, and the server stays ready."""
    await upgrade(database_url)
    engines = make_engines(database_url, readers=1)
    writer = Writer(engines.writer, clock_ms=lambda: 0, queue_max=100)

    def bury(number: int, deleted_at: int | None) -> asyncio.Task[None]:
        async def work(connection: AsyncConnection) -> None:
            values = {"context_id": f"c{number}", "context_key": number, "purged": True}
            await connection.execute(insert(tombstones).values(deleted_at=deleted_at, **values))

        return asyncio.create_task(writer.change(work))

    poison = {3: None, 7: 2**80}  # NOT NULL, and a number that no column takes
    writes = [bury(number, poison.get(number, number)) for number in range(10)]
    await asyncio.sleep(0)  # all of them are in the queue: one group
    writer.start()
    results = await asyncio.gather(*writes, return_exceptions=True)
    async with engines.reader.connect() as connection:
        stored = await connection.scalars(text("SELECT context_key FROM tombstones"))
        assert sorted(stored) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert [n for n, result in enumerate(results) if result is not None] == [3, 7]
    assert isinstance(results[3], InternalError)
    assert not isinstance(results[7], Overloaded)
    assert writer.readiness.reason is None
    await writer.close()
    await engines.dispose()
