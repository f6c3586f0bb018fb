"""Group commit: the one way into the database.

Theory of operation. One task owns one connection. It takes whatever has queued while the last commit
was under way (no timer: an idle writer commits at once, a busy one in large groups), runs it in one
transaction, and commits. Only then, synchronously and in the order of the queue, each entry's `after`
hook runs (the tail and the hub learn of it there) and its future resolves. So nothing is answered,
signalled or readable before it is durable, and what is told is told in commit order.

Two kinds of work: *appends* of chunks, thousands of which become two statements, and *changes*, which
are small functions over the connection. Neighbours do not hurt each other: a refused append is a row
that an UPDATE did not match, a failed change is rolled back to its savepoint, and if the commit as
a whole fails each entry runs again by itself, so that only the guilty one gets the error.

Where several servers share a database, no group waits for a row that another one holds: the entry that
meets it waits in `lanes`, and its neighbours go on. So no two groups can wait for each other, either. A
connection that is lost before its COMMIT was sent has stored nothing: its group goes again, once.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy import update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contextd.core.errors import ContextdError, Overloaded, ShuttingDown
from contextd.store.appends import Append, Appended, Appender, AppendHook, utf8_bytes
from contextd.store.database_file import DatabaseFile
from contextd.store.lanes import Lanes, refuse
from contextd.store.locks import is_closed, is_locked, wait_for_rows
from contextd.store.readiness import DISK, WRITES, Readiness
from contextd.store.tables import database
from contextd.store.trouble import DatabaseMovedError, Kind, Trouble, translated, trouble_of

log = structlog.get_logger(__name__)

T = TypeVar("T")

GROUP_MAX = 1000  # entries in one transaction: bounds both its length and the wait of the next
GROUP_BYTES_MAX = 4 * 1024 * 1024
GROUP_CHUNKS_MAX = 10_000  # the same for chunks, of which an entry may have many
RECONNECT_WAIT_S = 0.5
CLOSE_S = 5.0
_OF_ONE_ENTRY = (Kind.DEFECT, Kind.HELD)  # troubles that say nothing of other writes
STUCK_S = 5.0  # a commit that takes longer: the server is not ready
PROBE_CHARS = 16_384  # of a probe: several pages, so that it fails where a short answer would


class Refused(Exception):
    """The root of expected refusals by a change that are not `ContextdError`s: not logged."""


class Unconfirmed(Overloaded):
    """The connection was lost before the answer: the write is durable, or it is not."""


class _Change(Generic[T]):
    __slots__ = (
        "after", "context_id", "error", "future", "held", "held_at", "lost", "repeated", "result",
        "work",
    )  # fmt: skip

    def __init__(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        after: Callable[[T], None],
        context_id: str | None,
        future: asyncio.Future[T],
    ) -> None:
        self.work = work
        self.after = after
        self.context_id = context_id
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None
        self.held = self.lost = self.repeated = False
        self.held_at: float | None = None

    @property
    def rows(self) -> Hashable:
        return self if self.context_id is None else self.context_id

    def tell(self) -> None:
        if self.error is None:
            self.after(self.result)


_Entry = Append | _Change[Any]


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """A caller that went away (its future is cancelled) does not undo what was committed."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Writer:
    """Owns the writing connection. `append` and `change` may be called from any task of its loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        clock_ms: Callable[[], int],
        queue_max: int,
        readiness: Readiness | None = None,
        file: DatabaseFile | None = None,
        waiting: AsyncEngine | None = None,
    ) -> None:
        """`waiting` has the connections for writes that wait for rows of another server (§18)."""
        self._engine = engine
        self._file = file
        self._lanes = Lanes(waiting, commit=self._commit, settle=self._settle)
        self._renew = False
        self._clock_ms = clock_ms
        self._queue_max = queue_max
        self.readiness = readiness or Readiness()
        self.trouble: Trouble | None = None  # that the last write had with the database
        self._queue: list[_Entry] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._appender = Appender(engine.dialect)
        self._began_at: float | None = None  # of the commit that is under way, by the loop's clock
        # Called when something may be stored that nobody was told of: an answer that was lost with
        # the connection, a hook that failed.
        self.on_doubt: list[Callable[[], None]] = []
        self.commits = 0
        self.chunks_written = 0

    @property
    def alive(self) -> bool:
        """Whether writes are being taken."""
        return self._task is not None and not self._task.done() and not self._closing

    @property
    def queue_length(self) -> int:
        """Entries that wait for a commit."""
        return len(self._queue) + self._lanes.length

    @property
    def stuck(self) -> bool:
        """Whether a commit has been under way for longer than the database should need."""
        began_at = self._began_at
        return began_at is not None and asyncio.get_running_loop().time() > began_at + STUCK_S

    def start(self) -> None:
        """Starts the writing task."""
        self._task = asyncio.create_task(self._run(), name="contextd-writer")

    async def close(self, timeout_s: float = CLOSE_S) -> None:
        """Commits what has queued, then stops; later calls raise `ShuttingDown`.

        A database that hangs does not hold the process up for longer than `timeout_s`.
        """
        self._closing = True
        self._wake.set()
        if self._task is not None:
            began_at = asyncio.get_running_loop().time()
            await asyncio.wait([self._task], timeout=timeout_s)
            self._task.cancel()
            await self._lanes.close(began_at + timeout_s - asyncio.get_running_loop().time())

    def start_anew(self, error: Exception) -> None:
        """Refuses what waits with `error`, and lets go of connections: they lead to another database."""
        waiting, self._queue = self._queue, []
        refuse(waiting, error)
        self._settle(waiting)
        self._lanes.refuse_all(error)
        self._renew = True
        self._wake.set()

    def append(
        self,
        message_key: int,
        *,
        fence: int | None,
        texts: Sequence[str],
        after: AppendHook,
        sizes: Sequence[int] | None = None,
        first: int | None = None,
        sequences: Sequence[int | None] | None = None,
    ) -> asyncio.Future[Appended]:
        """Appends `texts` as chunks of an open message, all or none; resolves when durable.

        With `fence` only while the message is under it. `first` is the sequence of the first chunk:
        with it an append may be tried again, and what is stored already is not stored twice. For
        chunks that do not follow each other `sequences` has one for each (None: the next). `sizes`
        are their UTF-8 bytes, where the caller knows them.

        Raises `MessageClosed`, `StaleProducer`, `SequenceGap` or `SequenceConflict` through the
        future, and `Overloaded` at once when more than `queue_max` entries wait.
        """
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self._put(
            Append(
                message_key,
                fence=fence,
                first=first,
                texts=texts,
                sizes=[utf8_bytes(value) for value in texts] if sizes is None else sizes,
                sequences=sequences,
                after=after,
                future=future,
            )
        )
        return future

    async def change(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        after: Callable[[T], None] = lambda _: None,
        *,
        context_id: str | None = None,
        urgent: bool = False,
    ) -> T:
        """Runs `work` inside a group's transaction; returns its result once that is durable.

        `work` may run more than once (its effects were rolled back before), so it must touch nothing
        but the connection. An exception from it undoes only its own statements. `context_id` is that
        of the context which it locks: changes of one context keep their order. What is `urgent` is never
        refused for the length of the queue, and goes before it.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(_Change(work, after, context_id, future), urgent=urgent)
        return await future

    def look(self) -> None:
        """Notes what can be seen without a write: a file that is not there any more, a full disk."""
        if self._file is None:
            return
        try:
            self._file.check()
        except DatabaseMovedError as error:
            self._note(error)
        if self._file.disk_is_full():
            self.readiness.lack(DISK, "The disk of the database is full.")
        else:
            self.readiness.regain(DISK)

    async def probe(self) -> None:
        """A write that is of no consequence, to find out whether writes are taken. Raises as `change`."""

        async def work(connection: AsyncConnection) -> None:
            noise = secrets.token_hex(PROBE_CHARS // 2)
            await connection.execute(update(database).values(probe=noise))

        await self.change(work)

    def _put(self, entry: _Entry, *, urgent: bool = False) -> None:
        if self._closing:
            raise ShuttingDown
        if self.queue_length >= self._queue_max and not urgent:
            raise Overloaded("More writes are waiting than the server takes on.")
        self._queue.insert(0 if urgent else len(self._queue), entry)
        self._wake.set()

    async def _run(self) -> None:
        while not self._closing or self._queue:
            try:
                async with self._engine.connect() as connection:
                    if self._file is not None:
                        self._file.opened()
                    await self._serve(connection)
            except Exception as error:
                self._note(error)
                # Nobody waits for a database that is away: who wants to, tries again.
                waiting, self._queue = self._queue, []
                refuse(waiting, translated(error, event="the writing connection was lost"))
                self._settle(waiting)
                if self._closing:
                    return
                await asyncio.sleep(RECONNECT_WAIT_S)

    async def _serve(self, connection: AsyncConnection) -> None:
        self._renew = False
        while not connection.invalidated:
            if self._renew:
                await connection.invalidate()
                return
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._commit_next(connection)

    async def _commit_next(self, connection: AsyncConnection) -> None:
        group = self._take_group()
        self._began_at = asyncio.get_running_loop().time()
        try:
            if group:
                await self._commit(connection, group)
        except BaseException as error:
            for entry in group:
                entry.error = entry.error or error
            raise
        finally:
            self._began_at = None
            self._lanes.hold([entry for entry in group if entry.held])
            self._queue[:0] = [entry for entry in group if entry.lost]
            self._settle([entry for entry in group if not entry.held and not entry.lost])

    def _take_group(self) -> list[_Entry]:
        """The oldest entries, as many as one transaction should have, without those that have to wait."""
        count = chunk_count = byte_count = 0
        for entry in self._queue[:GROUP_MAX]:
            if isinstance(entry, Append):
                chunk_count += len(entry.texts)
                byte_count += sum(entry.sizes)
            if count and (chunk_count > GROUP_CHUNKS_MAX or byte_count > GROUP_BYTES_MAX):
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group if not self._lanes.length else [e for e in group if not self._lanes.join(e)]

    def _settle(self, group: Sequence[Any]) -> None:
        doubtful = False
        for entry in group:
            try:
                entry.tell()
            except Exception as error:
                log.exception("a hook after a commit failed")
                entry.error, doubtful = error, True
            doubtful |= isinstance(entry.error, Unconfirmed)
            _resolve(entry.future, entry.result, entry.error)
        if doubtful:
            for doubt in self.on_doubt:
                doubt()

    async def _commit(self, connection: AsyncConnection, group: Sequence[Any]) -> None:
        """Runs `group` in one transaction; where one entry may be at fault, each by itself."""
        error = await self._try(connection, group)
        if error is None:
            return
        # Of two processes that insert the same, one is refused; it looks again, once.
        alone = len(group) == 1 and not isinstance(error, IntegrityError)
        if alone or connection.invalidated or _concerns_all(error):
            _note_fault(connection, group, error)
            return
        for index, entry in enumerate(group):
            if connection.invalidated:
                _note_fault(connection, group[index:], error)
                return
            if (error := await self._try(connection, [entry])) is not None:
                _note_fault(connection, [entry], error)

    def _note(self, error: Exception | None) -> None:
        """What the last write says of the database. A defect of the write itself says nothing."""
        trouble = None if error is None else trouble_of(error)
        if error is not None and (trouble is None or trouble.kind in _OF_ONE_ENTRY):
            return
        self.trouble = trouble
        if trouble is None:
            self.readiness.regain(WRITES)
        else:
            self.readiness.lack(WRITES, trouble.sentence)

    async def _try(self, connection: AsyncConnection, group: Sequence[Any]) -> Exception | None:
        """One transaction; the error that it failed with. `Unconfirmed`: it may have succeeded."""
        for entry in group:
            entry.error = entry.result = None
            entry.held = entry.lost = False
        error = await self._transact(connection, group)
        if not is_locked(error) and not _is_lost(connection, error):
            self._note(error)
        return error

    async def _transact(
        self, connection: AsyncConnection, group: Sequence[Any]
    ) -> Exception | None:
        try:
            transaction = await connection.begin()
            await wait_for_rows(connection)
            chunks = await self._execute(connection, group)
            if self._file is not None:
                self._file.check()
        except Exception as error:
            await _undo(connection, error)
            return error
        try:
            await transaction.commit()
        except Exception as error:
            await _undo(connection, error)
            if connection.invalidated:
                return Unconfirmed("The database's answer was lost: this may be stored or not.")
            return error
        self.commits += 1
        self.chunks_written += chunks
        return None

    async def _execute(self, connection: AsyncConnection, group: Sequence[Any]) -> int:
        """Runs the entries; returns how many chunks were written."""
        appends = [entry for entry in group if isinstance(entry, Append)]
        locked: set[Hashable] = set()
        for entry in group:
            if isinstance(entry, _Change):
                entry.held = entry.rows in locked
                if not entry.held:
                    await self._execute_change(connection, entry, alone=len(group) == 1)
                if entry.held:
                    locked.add(entry.rows)
        if not appends:
            return 0
        return await self._appender.run(connection, appends, self._clock_ms())

    async def _execute_change(
        self, connection: AsyncConnection, change: _Change[Any], *, alone: bool
    ) -> None:
        if alone:
            change.result = await change.work(connection)
            return
        try:
            async with connection.begin_nested():
                change.result = await change.work(connection)
        except (ContextdError, Refused) as error:
            change.error = error
        except DBAPIError as error:
            if not is_locked(error):
                raise
            change.held = True


def _note_fault(connection: AsyncConnection, group: Sequence[Any], error: Exception) -> None:
    """What becomes of entries that were not committed: they wait, go again, or are refused."""
    if is_locked(error) and len(group) == 1:
        group[0].held = True
        return
    lost = _is_lost(connection, error)
    refused = [entry for entry in group if entry.repeated or not lost]
    refuse(refused, translated(error, event="the database did not take a write"))
    for entry in group:
        entry.lost = lost and not entry.repeated
        entry.repeated |= entry.lost


def _is_lost(connection: AsyncConnection, error: Exception | None) -> bool:
    """Whether the connection went before COMMIT was sent, so that nothing can have been stored."""
    return error is not None and connection.invalidated and not isinstance(error, Unconfirmed)


async def _undo(connection: AsyncConnection, error: Exception) -> None:
    """Rolls back, or throws a connection away that is closed, or from which no answer came."""
    with suppress(Exception):
        if isinstance(error, TimeoutError) or await is_closed(connection, error):
            await connection.invalidate()
        else:
            await connection.rollback()


def _concerns_all(error: Exception) -> bool:
    """Whether nobody else in the group would fare better by itself."""
    if isinstance(error, Overloaded):
        return True
    if is_locked(error):
        return False
    trouble = trouble_of(error)
    return trouble is not None and trouble.kind not in _OF_ONE_ENTRY
