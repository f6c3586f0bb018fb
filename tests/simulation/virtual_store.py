"""The driver below SQLAlchemy: sqlite3 itself, with seeded pauses, failures and lost answers.

The code of contextd above it is the real one, its engines included. A statement runs at once, between
two pauses of the virtual clock; a transaction that has to wait for the lock waits by that clock too.
An answer can be lost as PostgreSQL loses them: the COMMIT is done or it is not, and the connection
is gone. What is committed stays, whatever happens to the process that did it.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from virtual_loop import EPOCH_S, PROCESS, Process

from contextd.store.sqlite_driver import Cursor, Done, execute_whole

BUSY_WAIT_S = 10.0
GONE = "no active connection"  # how SQLAlchemy's dialect knows a connection that was lost

Report = Callable[[Process | None, str], None]


class Weather:
    """How the store behaves. `storm` is the probability of a fault in a statement, `lost` in a COMMIT."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.slow = rng.choice((0.02, 0.1, 0.3))  # of the statements, how many take noticeable time
        self.slow_s = rng.choice((0.001, 0.01, 0.05))
        self.stall = rng.choice((0.0, 0.0, 0.002))
        self.storm = rng.choice((0.0, 0.0005, 0.003))
        self.lost = rng.choice((0.0, 0.01, 0.04))
        self.calm = False

    def fault(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability


class Database:
    """One SQLite file, all connections to it, and who hears of its commits."""

    def __init__(self, path: Path, rng: Random, report: Report) -> None:
        self.path = path
        self.weather = Weather(rng)
        self.report = report
        self.committed: Callable[[Process | None], None] = lambda _: None
        self.disturbed: Callable[[float], None] = lambda _: None
        self.connections: list[VirtualConnection] = []
        self._waiting: list[asyncio.Future[None]] = []
        self.away: set[Process | None] = set()  # whom it does not answer at all

    async def connect(self, *_: Any, **__: Any) -> "VirtualConnection":
        """What SQLAlchemy calls in place of `aiosqlite.connect`."""
        process = PROCESS.get()
        await self.pause()
        if process in self.away:
            raise refusal("unable to open database file", "SQLITE_CANTOPEN")
        connection = VirtualConnection(self, process)
        self.connections.append(connection)
        return connection

    async def pause(self) -> None:
        """The time that a trip to the database takes."""
        weather = self.weather
        drawn = weather.rng.random()
        if drawn < weather.slow:
            await asyncio.sleep(weather.rng.random() * weather.slow_s)
        elif weather.fault(weather.stall):
            seconds = weather.rng.choice((0.2, 1.0, 3.0))
            self.report(PROCESS.get(), f"the store stalls for {seconds} s")
            self.disturbed(seconds)
            await asyncio.sleep(seconds)
        elif drawn > 0.7:
            await asyncio.sleep(0)

    async def lock_given_back(self, deadline: float) -> None:
        """Waits until somebody ends a transaction, or for the time."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await waiter

    def give_back_lock(self) -> None:
        """A transaction has ended."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def cut(self, process: Process | None) -> None:
        """Every connection of a process is lost."""
        for connection in self.of(process):
            connection.lose()

    def kill(self, process: Process) -> None:
        """The process is gone. A COMMIT that was on its way arrives or does not."""
        for connection in self.of(process):
            if connection.committing and self.weather.rng.random() < 0.5:
                connection.commit_now()
                self.report(process, "its last COMMIT arrived after its death")
            connection.lose()

    def of(self, process: Process | None) -> list["VirtualConnection"]:
        """The open connections of a process."""
        self.connections = [one for one in self.connections if not one.lost]
        return [one for one in self.connections if one.process is process]

    def close(self) -> None:
        """Closes what is open."""
        for connection in self.connections:
            connection.lose()


def through(engine: AsyncEngine, database: Callable[[], Database]) -> None:
    """Makes a real engine of contextd connect by this driver."""

    @event.listens_for(engine.sync_engine, "do_connect")
    def use(_: Any, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
        parameters["async_creator_fn"] = database().connect


class VirtualConnection:
    """What of aiosqlite's connection is used by SQLAlchemy and by contextd."""

    def __init__(self, database: Database, process: Process | None) -> None:
        self._database = database
        self._raw = sqlite3.connect(database.path, timeout=0, isolation_level=None)
        self._raw.create_function("julianday", 1, lambda _: _julian_day())
        self._connection = self._raw  # SQLAlchemy looks whether it is there
        self._written = 0
        self.process = process
        self.committing = False
        self.lost = False

    def cursor(self) -> Cursor:
        """contextd's own cursor."""
        return Cursor(self)

    async def create_function(self, *arguments: Any, **options: Any) -> None:
        """A function in SQL."""
        self._raw.create_function(*arguments, **options)

    async def execute(self, sql: str) -> None:
        """A statement whose rows nobody reads: contextd's BEGIN."""
        if (
            sql.startswith("BEGIN") and not self.lost
        ):  # a lost connection is noticed at what follows
            await self._begin(sql)

    async def execute_fetchall(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        """A statement and its rows."""
        return (await self.whole(False, sql, parameters)).rows

    async def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """A statement for each row."""
        await self._between_pauses(lambda: self._raw.executemany(sql, rows))

    async def whole(self, many: bool, sql: str, parameters: Any) -> Done:
        """Executes and fetches at once, so that no statement is left open."""
        if sql.startswith("PRAGMA"):
            return execute_whole(self._raw, many, sql, parameters)
        done: Done = await self._between_pauses(
            lambda: execute_whole(self._raw, many, sql, parameters)
        )
        return done

    async def commit(self) -> None:
        """COMMIT, whose answer may be lost."""
        database, weather = self._database, self._database.weather
        self._check()
        writes = self._raw.total_changes != self._written
        self.committing = True
        try:
            await database.pause()
            self._check()
            if writes and weather.fault(weather.lost):
                self._fail_to_commit()
            self.commit_now()
            self.committing = False
            await database.pause()
        finally:
            self.committing = False

    def commit_now(self) -> None:
        """The database does it, whoever hears of it."""
        self._raw.commit()
        self._database.give_back_lock()
        if self._raw.total_changes != self._written:
            self._written = self._raw.total_changes
            self._database.committed(self.process)

    async def rollback(self) -> None:
        """ROLLBACK."""
        if not self.lost:
            self._raw.rollback()
            self._database.give_back_lock()
            self._written = self._raw.total_changes

    async def close(self) -> None:
        """Closes it, and rolls back what is open."""
        self.lose()

    def stop(self) -> None:
        """The same, for a garbage collector."""

    def lose(self) -> None:
        """The connection is gone, and what was not committed with it."""
        if not self.lost:
            self.lost = True
            self._raw.close()
            self._database.give_back_lock()

    def _fail_to_commit(self) -> None:
        how = self._database.weather.rng.choice(("done, its answer lost", "lost", "refused"))
        self._database.report(self.process, f"COMMIT {how}")
        self._database.disturbed(0)
        if how == "refused":  # SQLite and PostgreSQL both roll back what they cannot commit
            self._raw.rollback()
            self._database.give_back_lock()
            raise refusal("database or disk is full", "SQLITE_FULL")
        if how != "lost":
            self.commit_now()
        self.lose()
        self._check()

    async def _begin(self, sql: str) -> None:
        deadline = asyncio.get_running_loop().time() + BUSY_WAIT_S
        while True:
            await self._database.pause()
            if self.lost:
                return
            try:
                self._raw.execute(sql)
                self._written = self._raw.total_changes
                return
            except sqlite3.OperationalError as error:
                late = asyncio.get_running_loop().time() >= deadline
                if error.sqlite_errorname != "SQLITE_BUSY" or late:
                    raise
            await self._database.lock_given_back(deadline)

    async def _between_pauses(self, work: Callable[[], Any]) -> Any:
        database, weather = self._database, self._database.weather
        await database.pause()
        self._check()
        if weather.fault(weather.storm):
            self._fail()
        result = work()
        await database.pause()
        return result

    def _fail(self) -> None:
        how = self._database.weather.rng.choice(("refused", "lost"))
        self._database.report(self.process, f"a statement {how}")
        self._database.disturbed(0)
        if how == "refused":
            raise refusal("disk I/O error", "SQLITE_IOERR")
        self.lose()
        self._check()

    def _check(self) -> None:
        if self.lost:
            raise refusal(GONE, "SQLITE_CANTOPEN")


def refusal(words: str, name: str) -> sqlite3.OperationalError:
    """An error as SQLite raises it."""
    error = sqlite3.OperationalError(words)
    error.sqlite_errorname = name
    return error


def _julian_day() -> float:
    return 2440587.5 + (EPOCH_S + asyncio.get_running_loop().time()) / 86400.0
