"""aiosqlite with one trip to its thread for each statement.

A trip costs about as much as a short statement. SQLAlchemy makes four of them for a query: it opens a
cursor, executes, fetches all rows and closes the cursor. The cursor here does all of that at once.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import aiosqlite


def connect(database: str, **options: Any) -> "Connection":
    """A connection that opens when it is awaited, with `options` of `sqlite3.connect`."""
    connection = Connection(lambda: sqlite3.connect(database, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy does with its own: it must not keep a process
    return connection


class Done(NamedTuple):
    """What a cursor has after a statement."""

    rows: list[Any]
    description: Any
    rowcount: int
    lastrowid: int | None


def execute_whole(connection: sqlite3.Connection, many: bool, sql: str, parameters: Any) -> Done:
    """Executes the statement, or once for each of `many` parameters, and fetches its rows."""
    with closing(connection.cursor()) as cursor:
        (cursor.executemany if many else cursor.execute)(sql, parameters)
        rows = cursor.fetchall() if cursor.description else []
        return Done(rows, cursor.description, cursor.rowcount, cursor.lastrowid)


class Executor(Protocol):
    """What a cursor needs of its connection."""

    async def whole(self, many: bool, sql: str, parameters: Any) -> Done:
        """As `execute_whole`."""
        ...


class Connection(aiosqlite.Connection):
    """A connection whose cursors make one trip."""

    def cursor(self) -> "Cursor":  # type: ignore[override]
        """A cursor; nothing is opened yet."""
        return Cursor(self)

    async def whole(self, many: bool, sql: str, parameters: Any) -> Done:
        """As `execute_whole`, in the thread."""
        done: Done = await self._execute(  # type: ignore[no-untyped-call]
            execute_whole, self._conn, many, sql, parameters
        )
        return done


class Cursor:
    """What SQLAlchemy uses of aiosqlite's cursor."""

    arraysize = 1

    def __init__(self, connection: Executor) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> "Cursor":
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "Cursor":
        """Runs a statement and keeps its rows."""
        return await self._run(False, sql, parameters)

    async def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> "Cursor":
        """Runs a statement once for each of the parameters."""
        return await self._run(True, sql, parameters)

    async def fetchall(self) -> list[Any]:
        """The rows of the last statement, once."""
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        """Nothing is open: the thread has closed it."""

    async def _run(self, many: bool, sql: str, parameters: Any) -> "Cursor":
        done = await self._connection.whole(many, sql, parameters)
        self._rows, self.description, self.rowcount, self.lastrowid = done
        return self
