"""Looks into the database itself, past the server: what is committed, and whether it is whole.

On SQLite it reads the file with the standard library, never writing; on PostgreSQL with asyncpg. It
must be closed before a server starts after a crash: an open connection would keep alive the shared
memory of SQLite's log, and the start would have nothing to recover.
"""

import asyncio
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SQLITE_PREFIX = "sqlite+aiosqlite:///"
BUSY_S = 10.0
BACK_S_MAX = 60.0  # for a database that is stopped and started again


@dataclass(frozen=True)
class StoredMessage:
    """A message's row with its head and its chunks."""

    key: int
    id: str
    turn_id: str | None
    parent_id: str | None
    depth: int | None
    superseded: bool
    revision: int
    role: str
    kind: str
    status: str
    final_sequence: int | None
    head: int
    chunks: tuple[str, ...]

    @property
    def text(self) -> str:
        """The chunks, joined."""
        return "".join(self.chunks)


@dataclass(frozen=True)
class StoredTurn:
    """A turn's row."""

    key: int
    id: str
    user_message_key: int
    status: str
    attempt: int
    retry_of: str | None
    error: str | None


@dataclass(frozen=True)
class Step:
    """A row of the journal."""

    revision: int
    turn_id: str | None
    trigger: str
    from_state: str
    to_state: str


@dataclass(frozen=True)
class StoredContext:
    """A context's row."""

    key: int
    id: str
    state: str
    revision: int
    record_revision: int
    title: str | None
    message_count: int


class Witness:
    """Reads one database. `url` as the server is given it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._sqlite: sqlite3.Connection | None = None
        self._postgresql: Any = None
        self._turn = asyncio.Lock()  # asyncpg does one thing at a time

    @property
    def sqlite_path(self) -> Path | None:
        """The database's file; None on PostgreSQL."""
        known = self.url.startswith(SQLITE_PREFIX)
        return Path(self.url.removeprefix(SQLITE_PREFIX)) if known else None

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._sqlite is not None or self._postgresql is not None

    async def open(self) -> "Witness":
        """The database must exist."""
        path = self.sqlite_path
        if path is not None:
            self._sqlite = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_S)
        else:
            self._postgresql = await self._connect()
        return self

    async def close(self) -> None:
        """Repeatable."""
        if self._sqlite is not None:
            self._sqlite.close()
            self._sqlite = None
        if self._postgresql is not None:
            await self._postgresql.close()
            self._postgresql = None

    async def rows(self, sql: str, *values: Any) -> list[Any]:
        """The rows of a query with `$1`, `$2` … for `values`."""
        if self._sqlite is not None:
            return self._sqlite.execute(sql.replace("$", "?"), values).fetchall()
        async with self._turn:
            return list(await self._fetch(sql, values))

    async def _connect(self) -> Any:
        import asyncpg  # noqa: PLC0415 - only with PostgreSQL

        return await asyncpg.connect(self.url.replace("+asyncpg", ""))

    async def _fetch(self, sql: str, values: Any) -> Any:
        """Where the database is stopped meanwhile, the answer is that of the one that comes back."""
        deadline = asyncio.get_running_loop().time() + BACK_S_MAX
        while True:
            try:
                if self._postgresql.is_closed():
                    self._postgresql = await self._connect()
                return await self._postgresql.fetch(sql, *values)
            except Exception as error:
                late = asyncio.get_running_loop().time() > deadline
                if late or not _is_away(error):
                    raise
            await asyncio.sleep(0.05)

    async def head(self, context_id: str, message_id: str) -> int | None:
        """The committed head of a message; None when it is not there."""
        found = await self.rows(
            """SELECT h.head FROM contexts c JOIN messages m ON m.context_key = c.key
               JOIN heads h ON h.message_key = m.key WHERE c.id = $1 AND m.id = $2""",
            context_id,
            message_id,
        )
        return int(found[0][0]) if found else None

    async def end(self, context_id: str, message_id: str) -> tuple[str, int | None, int] | None:
        """A message's status, final sequence and head; None when it is not there."""
        found = await self.rows(
            """SELECT m.status, m.final_sequence, h.head FROM contexts c
               JOIN messages m ON m.context_key = c.key
               JOIN heads h ON h.message_key = m.key WHERE c.id = $1 AND m.id = $2""",
            context_id,
            message_id,
        )
        return (str(found[0][0]), found[0][1], int(found[0][2])) if found else None

    async def states(self) -> dict[str, tuple[str, int]]:
        """Of each context its state and how many turns it has queued."""
        found = await self.rows(
            """SELECT c.id, c.state, (SELECT count(*) FROM turns t
               WHERE t.context_key = c.key AND t.status = 'queued') FROM contexts c"""
        )
        return {row[0]: (row[1], row[2]) for row in found}

    async def context(self, context_id: str) -> StoredContext | None:
        """None when it is not there."""
        found = await self.rows(
            """SELECT key, id, state, revision, record_revision, title, message_count
               FROM contexts WHERE id = $1""",
            context_id,
        )
        return StoredContext(*found[0]) if found else None

    async def messages(self, context_key: int) -> list[StoredMessage]:
        """All of a context, also those that have left its lists, in the order of their making."""
        found = await self.rows(
            """SELECT m.key, m.id, m.turn_id, m.parent_id, m.depth, m.superseded, m.revision,
                      m.role, m.kind, m.status, m.final_sequence, h.head
               FROM messages m JOIN heads h ON h.message_key = m.key
               WHERE m.context_key = $1 ORDER BY m.key""",
            context_key,
        )
        chunks: dict[int, list[str]] = {}
        for key, content in await self.rows(
            """SELECT k.message_key, k.content FROM chunks k JOIN messages m ON m.key = k.message_key
               WHERE m.context_key = $1 ORDER BY k.message_key, k.sequence""",
            context_key,
        ):
            chunks.setdefault(key, []).append(content)
        return [StoredMessage(*(*row, tuple(chunks.get(row[0], ())))) for row in found]

    async def turns(self, context_key: int) -> list[StoredTurn]:
        """In the order in which they were asked for."""
        found = await self.rows(
            """SELECT key, id, user_message_key, status, attempt, retry_of, error
               FROM turns WHERE context_key = $1 ORDER BY key""",
            context_key,
        )
        return [StoredTurn(*row) for row in found]

    async def journal(self, context_key: int) -> list[Step]:
        """By revision."""
        found = await self.rows(
            """SELECT revision, turn_id, trigger, from_state, to_state
               FROM journal WHERE context_key = $1 ORDER BY revision""",
            context_key,
        )
        return [Step(*row) for row in found]


def _is_away(error: Exception) -> bool:
    """Whether the database was stopped, or is not up again yet."""
    state = getattr(error, "sqlstate", None) or ""
    return isinstance(error, OSError) or state[:2] in ("57", "08") or "connection" in str(error)


async def copy_of(witness: Witness, folder: Path) -> Witness:
    """A witness of a copy of the SQLite database as the crash left it: the file and its log.

    SQLite recovers the copy by itself, so this sees what was durable without any of the server's help.
    """
    path = witness.sqlite_path
    assert path is not None
    for suffix in ("", "-wal"):
        source, target = path.with_name(path.name + suffix), folder / f"copy.db{suffix}"
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copyfile(source, target)
    recovering = sqlite3.connect(folder / "copy.db")
    recovering.execute("SELECT count(*) FROM contexts").fetchone()
    recovering.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    recovering.close()
    return await Witness(f"{SQLITE_PREFIX}{folder / 'copy.db'}").open()
