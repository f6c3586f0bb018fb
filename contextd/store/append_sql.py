"""The two statements of a round of appends, in the way in which each driver runs them fastest.

aiosqlite runs each call on a thread of its own, and the way there and back costs more than the
statement: so here it is one call each, on the connection of the transaction that is open. An UPDATE
whose text repeats is prepared once, so its rows are filled up to the next power of two.
"""

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec
from sqlalchemy import insert, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.store.engines import wrapped
from contextd.store.locks import waits
from contextd.store.tables import chunks

# The message's key, how many chunks, bytes and characters it gains, its fence, the head it is at.
# Null for the last two: whatever they are.
HeadRow: TypeAlias = tuple[int, int, int, int, int | None, int | None]
# Key, head and bytes of a message that was moved.
MovedRow: TypeAlias = tuple[int, int, int]
# Key, sequence, content, end_bytes and created_at, as `chunks` has them.
ChunkRow: TypeAlias = tuple[int, int, str, int, int]


class AppendSql(Protocol):
    """What a round needs of a database. The row that comes back was written: the guard is inside."""

    async def advance_heads(
        self, connection: AsyncConnection, rows: Sequence[HeadRow], now: int
    ) -> Sequence[Sequence[Any]]:
        """Moves the heads that are where they are expected to be; returns their `MovedRow`s."""
        ...

    async def insert_chunks(self, connection: AsyncConnection, rows: Sequence[ChunkRow]) -> None:
        """Inserts chunks whose places are theirs by the heads that were moved."""
        ...


def append_sql(dialect: Dialect) -> AppendSql:
    """The statements for a database of this kind."""
    return SqliteAppendSql() if dialect.name == "sqlite" else PostgresqlAppendSql()


_SQLITE_ADVANCE = """UPDATE heads SET head = head + v.column2, bytes = bytes + v.column3,
    characters = characters + v.column4, written_at = max(?, written_at + 1)
FROM (VALUES {rows}) AS v
WHERE heads.message_key = v.column1 AND heads.is_open
    AND (v.column5 IS NULL OR heads.fence = v.column5)
    AND (v.column6 IS NULL OR heads.head = v.column6)
RETURNING message_key, head, bytes"""
_NO_ROW = (None,) * 6


class SqliteAppendSql:
    """On the driver's own connection. Its errors are wrapped as SQLAlchemy would."""

    def __init__(self) -> None:
        self._insert = str(insert(chunks).compile(dialect=sqlite.dialect()))
        self._advance: dict[int, str] = {}

    async def advance_heads(
        self, connection: AsyncConnection, rows: Sequence[HeadRow], now: int
    ) -> Sequence[Sequence[Any]]:
        width = 1 << (len(rows) - 1).bit_length()
        statement = self._advance.get(width)
        if statement is None:
            statement = _SQLITE_ADVANCE.format(rows=",".join(["(?,?,?,?,?,?)"] * width))
            self._advance[width] = statement
        values: list[int | None] = [now]
        for row in rows:
            values += row
        values += _NO_ROW * (width - len(rows))
        moved: Sequence[Sequence[Any]] = await self._run(
            connection, lambda driver: driver.execute_fetchall(statement, values)
        )
        return moved

    async def insert_chunks(self, connection: AsyncConnection, rows: Sequence[ChunkRow]) -> None:
        await self._run(connection, lambda driver: driver.executemany(self._insert, rows))

    async def _run(self, connection: AsyncConnection, call: Callable[[Any], Awaitable[Any]]) -> Any:
        driver = (await connection.get_raw_connection()).driver_connection
        try:
            return await call(driver)
        except sqlite3.Error as error:
            raise wrapped(error) from None


# Heads that another server has locked are left where they are, unless the connection waits for them.
_POSTGRESQL_ADVANCE = """WITH v AS (SELECT (value->>0)::bigint AS k, (value->>1)::bigint AS n,
                         (value->>2)::bigint AS b, (value->>3)::bigint AS c,
                         (value->>4)::bigint AS f, (value->>5)::bigint AS e
                  FROM jsonb_array_elements(CAST(:rows AS jsonb)) AS e(value)),
            locked AS (SELECT message_key FROM heads JOIN v ON v.k = message_key
                       ORDER BY message_key FOR UPDATE OF heads {how})
       UPDATE heads SET head = head + v.n, bytes = bytes + v.b, characters = characters + v.c,
              written_at = GREATEST(:now, written_at + 1)
       FROM v JOIN locked ON locked.message_key = v.k
       WHERE heads.message_key = v.k AND heads.is_open AND (v.f IS NULL OR heads.fence = v.f)
             AND (v.e IS NULL OR heads.head = v.e)
       RETURNING heads.message_key, heads.head, heads.bytes"""
_ADVANCE_FREE = text(_POSTGRESQL_ADVANCE.format(how="SKIP LOCKED"))
_ADVANCE_WAITING = text(_POSTGRESQL_ADVANCE.format(how=""))


class PostgresqlAppendSql:
    """Through SQLAlchemy: asyncpg has no thread to go to."""

    def __init__(self) -> None:
        self._insert = insert(chunks)
        self._names = [column.name for column in chunks.columns]

    async def advance_heads(
        self, connection: AsyncConnection, rows: Sequence[HeadRow], now: int
    ) -> Sequence[Sequence[Any]]:
        values = {"rows": msgspec.json.encode(rows).decode(), "now": now}
        statement = _ADVANCE_WAITING if waits(connection) else _ADVANCE_FREE
        return (await connection.execute(statement, values)).all()

    async def insert_chunks(self, connection: AsyncConnection, rows: Sequence[ChunkRow]) -> None:
        named = [dict(zip(self._names, row, strict=True)) for row in rows]
        await connection.execute(self._insert, named)
