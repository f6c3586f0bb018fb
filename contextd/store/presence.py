"""Is this the only process on its database?

Who starts alone may take over at once what the process before it left running; who does not must
wait until leases run out (§6). Each process holds a shared mark for its whole life, which the
system takes back when it dies, however it dies. A starter tries to get the mark for itself alone:
that succeeds only when nobody holds it. Starters go one at a time through a gate, because turning
one's own mark into a shared one is not atomic everywhere: in between, a second one would get it.

SQLite: `flock` on two empty files beside the database, which stay there. Not on the database
itself, because closing that file once more would drop the locks that SQLite holds on it.
PostgreSQL: advisory locks of a connection that does nothing else.
"""

import asyncio
import errno
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import structlog
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.store.engines import (
    StoreError,
    dialect_of,
    parse_url,
    postgresql_engine,
    reason,
    shown,
    sqlite_path,
)
from contextd.store.upgrade import ADVISORY_CLASS

if sys.platform != "win32":
    import fcntl

log = structlog.get_logger(__name__)

GATE_WAIT_S = 60  # for starters before this one; then this start fails
GATE_POLL_S = 0.02
REMARK_S = 0.5
ADVISORY_GATE = 1
ADVISORY_MARK = 2

# What `flock` says on a file system that has no locks.
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


class Presence:
    """This process's mark on one database. Used once: `enter`, and `leave` at the end."""

    def __init__(self, database_url: str) -> None:
        """Raises `StoreError` for a URL that contextd cannot use."""
        url = parse_url(database_url)
        self._name = shown(url)
        self._marks: _Marks = (
            _FileMarks(sqlite_path(url)) if dialect_of(url) == "sqlite" else _AdvisoryMarks(url)
        )

    async def enter(self, when_sole: Callable[[], Awaitable[None]]) -> bool:
        """Mark this process as present until `leave` or its death; says if it was the only one.

        If it is, `when_sole` runs before any other process can enter. Waits for starters before
        this one, up to a minute. Without file locks (on Windows, on some network file systems)
        nobody can know, so the answer is False. What `when_sole` raises is passed on, and
        `StoreError` is raised when the mark cannot be taken; then this process is not present.
        """
        try:
            return await self._enter(when_sole)
        except _NoLocksError:
            await self._marks.close()
            return False
        except BaseException:
            await self._marks.close()
            raise

    async def leave(self) -> None:
        """Take the mark away. Harmless when there is none."""
        await self._marks.close()

    async def _enter(self, when_sole: Callable[[], Awaitable[None]]) -> bool:
        with self._explained():
            await self._marks.open()
            await self._pass_gate()
            sole = await self._marks.try_alone()
        if sole:
            await when_sole()
        with self._explained():
            await self._marks.share()
            await self._marks.leave_gate()
        return sole

    async def _pass_gate(self) -> None:
        deadline = time.monotonic() + GATE_WAIT_S
        while not await self._marks.try_gate():
            if time.monotonic() > deadline:
                raise StoreError(f"Another contextd has been starting on {self._name} for too long")
            await asyncio.sleep(GATE_POLL_S)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Locking fails as systems and networks do; whatever it is, it becomes one sentence."""
        try:
            yield
        except (StoreError, _NoLocksError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _UNSUPPORTED:
                raise _NoLocksError from error
            what = f"This process cannot be marked as present on {self._name}: it"
            raise StoreError(f"{what} {reason(error)}") from error


class _NoLocksError(Exception):
    """This system, or the database's file system, has no locks that could be asked."""


class _Marks(Protocol):
    """The two locks. All but `open` and `close` are called between `try_gate` and `leave_gate`."""

    async def open(self) -> None: ...
    async def try_gate(self) -> bool: ...
    async def try_alone(self) -> bool: ...
    async def share(self) -> None: ...
    async def leave_gate(self) -> None: ...
    async def close(self) -> None: ...


class _FileMarks:
    """`flock` on files that belong to nobody else. None of these calls waits."""

    def __init__(self, database: Path) -> None:
        self._mark_path = database.with_name(f"{database.name}.lock")
        self._gate_path = database.with_name(f"{database.name}.start.lock")
        self._files: dict[Path, int] = {}

    async def open(self) -> None:
        if sys.platform == "win32":
            raise _NoLocksError
        # Mark first, here and in `close`, because a dying process closes its files in this order:
        # who then finds the gate free finds the mark free as well.
        for path in (self._mark_path, self._gate_path):
            self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    async def try_gate(self) -> bool:
        return self._lock(self._gate_path, alone=True)

    async def try_alone(self) -> bool:
        return self._lock(self._mark_path, alone=True)

    async def share(self) -> None:
        if not self._lock(self._mark_path, alone=False):
            raise StoreError(f"Another program has locked {self._mark_path}")

    async def leave_gate(self) -> None:
        os.close(self._files.pop(self._gate_path))

    async def close(self) -> None:
        for path in tuple(self._files):
            os.close(self._files.pop(path))

    def _lock(self, path: Path, *, alone: bool) -> bool:
        if sys.platform == "win32":
            raise _NoLocksError
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(self._files[path], kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class _AdvisoryMarks:
    """Locks of one session. If its connection breaks, a new one takes the mark again."""

    def __init__(self, url: URL) -> None:
        self._engine = postgresql_engine(url, connections=1)
        self._connection: AsyncConnection | None = None
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._alone = False

    async def open(self) -> None:
        connection = await self._engine.connect()
        self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        # The server is to notice within a minute when this machine is gone without a word.
        await connection.execute(text("SET tcp_keepalives_idle = 30"))
        await connection.execute(text("SET tcp_keepalives_interval = 10"))
        await connection.execute(text("SET tcp_keepalives_count = 3"))
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None  # noqa: S101 - a connection that is open has one
        self._lost.clear()
        raw.add_termination_listener(lambda _: self._lost.set())

    async def try_gate(self) -> bool:
        return await self._call("pg_try_advisory_lock", ADVISORY_GATE)

    async def try_alone(self) -> bool:
        self._alone = await self._call("pg_try_advisory_lock", ADVISORY_MARK)
        return self._alone

    async def share(self) -> None:
        await self._call("pg_advisory_lock_shared", ADVISORY_MARK)
        if self._alone:
            await self._call("pg_advisory_unlock", ADVISORY_MARK)
        self._keeper = asyncio.create_task(self._keep(), name="presence")

    async def leave_gate(self) -> None:
        await self._call("pg_advisory_unlock", ADVISORY_GATE)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        await self._drop()

    async def _call(self, function: str, lock: int) -> bool:
        assert self._connection is not None  # noqa: S101 - the order of calls is Presence's
        statement = text(f"SELECT {function}({ADVISORY_CLASS}, {lock})")
        return bool((await self._connection.execute(statement)).scalar())

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # it may be broken, and nothing of it is needed any more
                await connection.close()
        await self._engine.dispose()

    async def _keep(self) -> None:
        while True:
            await self._lost.wait()
            log.warning("presence_lost")
            await self._mark_again()
            log.info("presence_regained")

    async def _mark_again(self) -> None:
        while True:
            await self._drop()
            try:
                await self.open()
                await self._call("pg_advisory_lock_shared", ADVISORY_MARK)
            except Exception as error:
                log.warning("presence_not_regained", reason=reason(error))
            else:
                return
            await asyncio.sleep(REMARK_S)
