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
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import structlog
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contextd.core.errors import (
    ContextdError,
    MessageClosed,
    MessageNotFound,
    Overloaded,
    ShuttingDown,
    StaleProducer,
)
from contextd.store.tables import chunks, heads, messages

log = structlog.get_logger(__name__)

T = TypeVar("T")

GROUP_MAX = 1000  # entries in one transaction: bounds both its length and the wait of the next
RECONNECT_WAIT_S = 0.5
CLOSE_S = 5.0


class Refused(Exception):
    """The root of expected refusals by a change that are not `ContextdError`s: not logged."""


class Unconfirmed(Overloaded):
    """The connection was lost before the answer: the write is durable, or it is not."""


class Appended(msgspec.Struct, frozen=True):
    """Where an append's chunks are: sequences `head` - len(texts) + 1 to `head`."""

    head: int
    ends: list[int]


class AppendHook(Protocol):
    """Called after the commit, in commit order; must not raise, block or await."""

    def __call__(self, texts: Sequence[str], appended: Appended) -> None: ...


class _Append:
    __slots__ = ("after", "error", "expected", "fence", "future", "message_key", "result", "texts")

    def __init__(
        self,
        message_key: int,
        fence: int,
        expected: int | None,
        texts: Sequence[str],
        after: AppendHook,
        future: asyncio.Future[Appended],
    ) -> None:
        self.message_key = message_key
        self.fence = fence
        self.expected = expected
        self.texts = texts
        self.after = after
        self.future = future
        self.result: Appended | None = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        if self.error is None and self.result is not None:
            self.after(self.texts, self.result)
        _resolve(self.future, self.result, self.error)


class _Change(Generic[T]):
    __slots__ = ("after", "error", "future", "result", "work")

    def __init__(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        after: Callable[[T], None],
        future: asyncio.Future[T],
    ) -> None:
        self.work = work
        self.after = after
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        if self.error is None:
            self.after(self.result)
        _resolve(self.future, self.result, self.error)


_Entry = _Append | _Change[Any]


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """A caller that went away (its future is cancelled) does not undo what was committed."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def utf8_bytes(value: str) -> int:
    """The length of `value` in UTF-8."""
    return len(value) if value.isascii() else len(value.encode())


# One statement for all appends of a group. The guard is in it: a row that comes back was written.
_ADVANCE_HEADS = {
    "sqlite": text(
        """UPDATE heads SET head = head + v.n, bytes = bytes + v.b, characters = characters + v.c,
               written_at = :now
           FROM (SELECT json_extract(value, '$[0]') AS k, json_extract(value, '$[1]') AS n,
                        json_extract(value, '$[2]') AS b, json_extract(value, '$[3]') AS c,
                        json_extract(value, '$[4]') AS f, json_extract(value, '$[5]') AS e
                 FROM json_each(:rows)) AS v
           WHERE heads.message_key = v.k AND heads.is_open AND heads.fence = v.f
                 AND (v.e IS NULL OR heads.head = v.e)
           RETURNING message_key, head, bytes"""
    ),
    # Rows are locked in the order of their keys first: two processes would deadlock otherwise.
    "postgresql": text(
        """WITH v AS (SELECT (value->>0)::bigint AS k, (value->>1)::bigint AS n,
                             (value->>2)::bigint AS b, (value->>3)::bigint AS c,
                             (value->>4)::integer AS f, (value->>5)::bigint AS e
                      FROM jsonb_array_elements(CAST(:rows AS jsonb)) AS e(value)),
                locked AS (SELECT message_key FROM heads JOIN v ON v.k = message_key
                           ORDER BY message_key FOR UPDATE OF heads)
           UPDATE heads SET head = head + v.n, bytes = bytes + v.b, characters = characters + v.c,
                  written_at = :now
           FROM v JOIN locked ON locked.message_key = v.k
           WHERE heads.message_key = v.k AND heads.is_open AND heads.fence = v.f
                 AND (v.e IS NULL OR heads.head = v.e)
           RETURNING heads.message_key, heads.head, heads.bytes"""
    ),
}

_INSERT_CHUNKS = insert(chunks)


class Writer:
    """Owns the writing connection. `append` and `change` may be called from any task of its loop."""

    def __init__(self, engine: AsyncEngine, *, clock_ms: Callable[[], int], queue_max: int) -> None:
        self._engine = engine
        self._clock_ms = clock_ms
        self._queue_max = queue_max
        self._queue: list[_Entry] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._advance_heads = _ADVANCE_HEADS[engine.dialect.name]
        self.commits = 0
        self.chunks_written = 0

    @property
    def alive(self) -> bool:
        """Whether writes are being taken."""
        return self._task is not None and not self._task.done() and not self._closing

    @property
    def queue_length(self) -> int:
        """Entries that wait for the next commit."""
        return len(self._queue)

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
            await asyncio.wait([self._task], timeout=timeout_s)
            self._task.cancel()

    def append(
        self,
        message_key: int,
        *,
        fence: int,
        texts: Sequence[str],
        after: AppendHook,
        expected: int | None = None,
    ) -> asyncio.Future[Appended]:
        """Appends `texts` as chunks of an open message, all or none; resolves when durable.

        `expected` is the head that the caller knows. With it an append may be tried again after an
        outcome that was lost with the connection: what is stored already is not stored twice.

        Raises `MessageClosed` or `StaleProducer` through the future, and `Overloaded` at once when
        more than `queue_max` entries wait.
        """
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self._put(_Append(message_key, fence, expected, texts, after, future))
        return future

    async def change(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        after: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Runs `work` inside a group's transaction; returns its result once that is durable.

        `work` may run more than once (its effects were rolled back before), so it must touch nothing
        but the connection. An exception from it undoes only its own statements.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(_Change(work, after, future))
        return await future

    def _put(self, entry: _Entry) -> None:
        if self._closing:
            raise ShuttingDown
        if len(self._queue) >= self._queue_max:
            raise Overloaded("More writes are waiting than the server takes on.")
        self._queue.append(entry)
        self._wake.set()

    async def _run(self) -> None:
        while not self._closing or self._queue:
            try:
                async with self._engine.connect() as connection:
                    await self._serve(connection)
            except Exception as error:
                log.error("the writing connection was lost", kind=type(error).__name__)
                # Nobody waits for a database that is away: who wants to, tries again.
                waiting, self._queue = self._queue, []
                for entry in waiting:
                    entry.error = Overloaded("The database does not answer.")
                self._settle(waiting)
                if self._closing:
                    return
                await asyncio.sleep(RECONNECT_WAIT_S)

    async def _serve(self, connection: AsyncConnection) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            group, self._queue = self._queue[:GROUP_MAX], self._queue[GROUP_MAX:]
            try:
                await self._commit(connection, group)
            except BaseException as error:
                for entry in group:
                    entry.error = entry.error or error
                raise
            finally:
                self._settle(group)
            if connection.invalidated:
                return

    def _settle(self, group: Sequence[_Entry]) -> None:
        for entry in group:
            try:
                entry.settle()
            except Exception as error:
                log.exception("a hook after a commit failed")
                _resolve(entry.future, None, error)

    async def _commit(self, connection: AsyncConnection, group: Sequence[_Entry]) -> None:
        """Runs `group` in one transaction; where one entry may be at fault, each by itself."""
        error = await self._try(connection, group)
        if error is None:
            return
        alone = len(group) == 1 and not isinstance(error, IntegrityError)
        if alone or connection.invalidated or isinstance(error, Overloaded | OperationalError):
            for entry in group:
                entry.error = _translate(error)
            return
        for entry in group:
            entry.error = entry.result = None
            if (fault := await self._try(connection, [entry])) is not None:
                entry.error = _translate(fault)

    async def _try(self, connection: AsyncConnection, group: Sequence[_Entry]) -> Exception | None:
        """One transaction; the error that it failed with. `Unconfirmed`: it may have succeeded."""
        try:
            transaction = await connection.begin()
        except Exception as error:
            return error
        try:
            await self._execute(connection, group)
        except Exception as error:
            with suppress(Exception):
                await transaction.rollback()
            return error
        try:
            await transaction.commit()
        except Exception as error:
            if connection.invalidated:
                return Unconfirmed("The database's answer was lost: this may be stored or not.")
            with suppress(Exception):
                await transaction.rollback()
            return error
        self.commits += 1
        return None

    async def _execute(self, connection: AsyncConnection, group: Sequence[_Entry]) -> None:
        appends = [entry for entry in group if isinstance(entry, _Append)]
        for entry in group:
            if isinstance(entry, _Change):
                await self._execute_change(connection, entry, alone=len(group) == 1)
        while appends:
            appends = await self._execute_appends(connection, appends)

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

    async def _execute_appends(
        self, connection: AsyncConnection, appends: Sequence[_Append]
    ) -> list[_Append]:
        """Writes the appends; returns those left over for another round.

        All of a message go together, under one fence and after one expected head; one with its own
        waits for the next round.
        """
        by_message: dict[int, list[_Append]] = {}
        left_over: list[_Append] = []
        for entry in appends:
            entries = by_message.setdefault(entry.message_key, [])
            alike = not entries or (entries[0].fence, None) == (entry.fence, entry.expected)
            if not alike:
                left_over.append(entry)
            else:
                entries.append(entry)
        sizes = {
            key: [[utf8_bytes(value) for value in entry.texts] for entry in entries]
            for key, entries in by_message.items()
        }
        rows = [
            [
                key,
                sum(len(entry.texts) for entry in entries),
                sum(sum(size) for size in sizes[key]),
                sum(len(value) for entry in entries for value in entry.texts),
                entries[0].fence,
                entries[0].expected,
            ]
            for key, entries in sorted(by_message.items())
        ]
        now = self._clock_ms()
        written = await connection.execute(
            self._advance_heads, {"rows": msgspec.json.encode(rows).decode(), "now": now}
        )
        chunk_rows: list[dict[str, Any]] = []
        for key, head, end in written.all():
            _number(by_message.pop(key), sizes[key], head, end, now, chunk_rows)
        if chunk_rows:
            await connection.execute(_INSERT_CHUNKS, chunk_rows)
            self.chunks_written += len(chunk_rows)
        for entries in by_message.values():
            await _refuse(connection, entries)
        return left_over


def _number(
    entries: Sequence[_Append],
    sizes: Sequence[Sequence[int]],
    head: int,
    end: int,
    now: int,
    chunk_rows: list[dict[str, Any]],
) -> None:
    """Gives the entries of one message their sequences, now that its head has moved to `head`."""
    sequence = head - sum(len(entry.texts) for entry in entries)
    end -= sum(sum(size) for size in sizes)
    for entry, entry_sizes in zip(entries, sizes, strict=True):
        ends = []
        for content, size in zip(entry.texts, entry_sizes, strict=True):
            sequence += 1
            end += size
            ends.append(end)
            chunk_rows.append(
                {
                    "message_key": entry.message_key,
                    "sequence": sequence,
                    "content": content,
                    "end_bytes": end,
                    "created_at": now,
                }
            )
        entry.result = Appended(sequence, ends)


async def _refuse(connection: AsyncConnection, entries: Sequence[_Append]) -> None:
    """Says why appends to one message were not taken, unless they are stored already."""
    row = (
        await connection.execute(
            select(heads.c.is_open, heads.c.head, heads.c.fence, messages.c.status)
            .join(messages, messages.c.key == heads.c.message_key)
            .where(heads.c.message_key == entries[0].message_key)
        )
    ).one_or_none()
    for entry in entries:
        if row is None:
            entry.error = MessageNotFound("")
        elif entry.expected is not None and row.fence == entry.fence:
            entry.result = await _stored_before(connection, entry)
        if entry.result is None and row is not None:
            entry.error = (
                StaleProducer(row.fence)
                if row.is_open
                else MessageClosed(message_status=row.status, final_sequence=row.head)
            )


async def _stored_before(connection: AsyncConnection, entry: _Append) -> Appended | None:
    """Where the chunks of an append are, if an earlier try of it was committed after all."""
    expected = entry.expected or 0
    rows = (
        await connection.execute(
            select(chunks.c.content, chunks.c.end_bytes)
            .where(chunks.c.message_key == entry.message_key)
            .where(chunks.c.sequence > expected)
            .where(chunks.c.sequence <= expected + len(entry.texts))
            .order_by(chunks.c.sequence)
        )
    ).all()
    if [row.content for row in rows] != list(entry.texts):
        return None
    return Appended(expected + len(rows), [row.end_bytes for row in rows])


def _translate(error: Exception) -> Exception:
    """The database's own trouble (locked, full, gone) is not the caller's: nothing was stored."""
    if not isinstance(error, DBAPIError):
        return error
    # Its words may quote the row, and a row is chat: only what kind of trouble it is.
    log.error(
        "the database did not take a write",
        kind=type(error.orig).__name__,
        code=getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", None),
    )
    return Overloaded("The database did not take the write; nothing was stored.")
