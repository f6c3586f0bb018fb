"""Writes that wait for rows which another server holds, each kind of rows by itself.

Theory of operation. A group commit never waits for a row: whoever finds one locked is taken out of the
group, and its neighbours are committed without it. It goes on here, on a connection of its own that
does wait, in PostgreSQL's queue for the row, so that of two busy servers neither starves. All writes
to the same rows wait in one *line*, in their order, and each later one joins it.

A row may be held for a moment by a server at work, or for seconds by one that stands still until
PostgreSQL ends its transaction. So a line first waits for a moment; then it makes room for others, and
waits for longer among those that have waited as well.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contextd.core.errors import Overloaded, ShuttingDown
from contextd.store.locks import WAITS_MS
from contextd.store.trouble import translated

LINES_AT_ONCE = 2  # of the new ones, and as many of those that have waited
FIRST_WAIT_MS = 30  # longer than the commits of most servers at work
NEXT_WAIT_MS = 250
HELD_S = 4.5  # then a write is refused: with its last wait this is below 5 s


class Entry(Protocol):
    """A write. `held`: its rows were not to be had; `lost`: the connection was, before its COMMIT."""

    held: bool
    lost: bool
    held_at: float | None
    error: BaseException | None

    @property
    def rows(self) -> Hashable:
        """What it locks: alike for writes whose order matters."""
        ...


class _Line:
    """Writes to the same rows, in order; `tries` is how often the first has waited in vain."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.tries = 0


class Lanes:
    """Runs lines with `commit(connection, entries)` and then `settle(entries)`, as the writer does.

    Without an engine no write is ever held: a database with one write lock knows no such thing.
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        *,
        commit: Callable[[AsyncConnection, Sequence[Entry]], Awaitable[None]],
        settle: Callable[[Sequence[Entry]], None],
    ) -> None:
        self._engine = engine
        self._commit = commit
        self._settle = settle
        self._lines: dict[Hashable, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._new = asyncio.Semaphore(LINES_AT_ONCE)
        self._old = asyncio.Semaphore(LINES_AT_ONCE)

    @property
    def length(self) -> int:
        """Writes that wait here."""
        return sum(len(line.entries) for line in self._lines.values())

    def join(self, entry: Entry) -> bool:
        """Whether the entry now waits behind others to its rows."""
        line = self._lines.get(entry.rows)
        if line is None:
            return False
        _begin_to_wait(entry)
        line.entries.append(entry)
        return True

    def hold(self, entries: Sequence[Entry]) -> None:
        """Takes what a group could not commit, in its order."""
        for entry in entries:
            if self.join(entry):
                continue
            line = self._lines[entry.rows] = _Line()
            _begin_to_wait(entry)
            line.entries.append(entry)
            task = asyncio.create_task(self._run(entry.rows, line), name="contextd-writer-lane")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def refuse_all(self, error: Exception) -> None:
        """Refuses everything that waits and is not under way."""
        for line in self._lines.values():
            waiting, line.entries = line.entries, []
            refuse(waiting, error)
            self._settle(waiting)

    async def close(self, timeout_s: float) -> None:
        """Lets the lines come to their end, for as long as that; then nothing waits any more."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in tuple(self._tasks):
            task.cancel()
        self.refuse_all(ShuttingDown())

    async def _run(self, rows: Hashable, line: _Line) -> None:
        try:
            while line.entries:
                async with self._old if line.tries else self._new:
                    await self._wait(line)
        finally:
            del self._lines[rows]

    async def _wait(self, line: _Line) -> None:
        """One turn of a line: everything in it, in one transaction that waits for its rows."""
        group, line.entries = line.entries, []
        if not group:
            return
        try:
            await self._connect_and_commit(group, NEXT_WAIT_MS if line.tries else FIRST_WAIT_MS)
        except Exception as error:
            refuse(group, translated(error, event="a write that waited was not taken"))
        except BaseException:
            refuse(group, ShuttingDown())
            raise
        finally:
            again = [entry for entry in group if entry.held or entry.lost]
            _refuse_late(again)
            line.entries[:0] = [entry for entry in again if entry.error is None]
            self._settle([entry for entry in group if entry not in line.entries])
        line.tries = line.tries + 1 if again else 0

    async def _connect_and_commit(self, group: Sequence[Entry], waits_ms: int) -> None:
        assert self._engine is not None  # noqa: S101 - else nothing would be held
        connection = await self._engine.connect()
        try:
            await self._commit(await connection.execution_options(**{WAITS_MS: waits_ms}), group)
        finally:
            with suppress(Exception):  # what was committed was committed
                await connection.close()


def refuse(entries: Sequence[Entry], error: Exception) -> None:
    """None of these is tried again."""
    for entry in entries:
        entry.held = entry.lost = False
        entry.error = error


def _begin_to_wait(entry: Entry) -> None:
    if entry.held_at is None:
        entry.held_at = asyncio.get_running_loop().time()


def _refuse_late(entries: Sequence[Entry]) -> None:
    now = asyncio.get_running_loop().time()
    late = [
        entry for entry in entries if entry.held_at is not None and now > entry.held_at + HELD_S
    ]
    refuse(late, Overloaded("Another server holds this for too long; nothing was stored."))
