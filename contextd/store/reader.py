"""The one way out of the database: every read of contexts, messages, chunks, turns and the journal.

Connections are held, not checked out per read: a checkout costs more than most of the reads. Each
method is one snapshot. Every scan is bounded by a limit that the caller names.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import msgspec
from sqlalchemy import ColumnElement, Select, bindparam, func, select, text, tuple_, union_all
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contextd.core.errors import ContextNotFound, MessageNotFound, Overloaded
from contextd.store.tables import (
    AnyRow,
    chunks,
    contexts,
    database_now_ms,
    heads,
    messages,
    tool_calls,
    turns,
)
from contextd.store.text import in_slice, read_text
from contextd.store.tree import find_path
from contextd.store.trouble import translated, trouble_of

PULL_CHUNKS_MAX = 65_536  # of one answer; sequences are dense, so this bounds the scan as well
ACQUIRE_S = 30.0
PRODUCED_PAGE = 1000  # rows of one query, so that others have their turn in between

MESSAGE_COLUMNS = (
    messages,
    heads.c.head,
    heads.c.bytes,
    heads.c.characters,
    heads.c.fence,
    heads.c.producer_id,
)
_WITH_HEAD = messages.join(heads, heads.c.message_key == messages.c.key)


_ONE_MOMENT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


class ContextSnapshot(msgspec.Struct, frozen=True):
    """A context's row with what belongs to its wire form."""

    row: AnyRow
    open_messages: Sequence[AnyRow]
    queued: int
    pending_call_ids: Sequence[str]


class ContentSlice(msgspec.Struct, frozen=True):
    """A piece of a message's text and where its message stands in the same snapshot."""

    message_key: int
    sequence: int
    content: str
    head: int
    status: str


class Changes(msgspec.Struct, frozen=True):
    """What changed of a context after a revision, with the context as it was just then."""

    context: AnyRow
    messages: Sequence[AnyRow]
    open_messages: Sequence[AnyRow]
    complete: bool  # false: more follow after the last message's revision


def select_messages(context_key: int) -> Select[Any]:
    """Messages of a context with their heads."""
    return select_placed().where(messages.c.context_key == context_key)


def select_placed() -> Select[Any]:
    """Messages with their heads, for a `Path` that says which."""
    return select(*MESSAGE_COLUMNS).select_from(_WITH_HEAD)


def select_contexts(
    states: Sequence[str], *, before: tuple[int, int] | None, limit: int
) -> Select[Any]:
    """Contexts in any of these states (none: in all), newest activity first.

    Each state has its own page, read in the order of its index, and of those the newest are taken: so
    neither states that few contexts are in nor ones that all are in make the database read them all.
    """
    page = select(contexts)
    if before is not None:
        page = page.where(tuple_(contexts.c.changed_at, contexts.c.key) < tuple_(*before))
    pages = [page.where(contexts.c.state == state) for state in dict.fromkeys(states)]
    if len(pages) < 2:
        return _newest(next(iter(pages), page), contexts.c, limit)
    newest = [select(_newest(one, contexts.c, limit).subquery()) for one in pages]
    found = union_all(*newest).subquery()
    return _newest(select(found), found.c, limit)


def _newest(query: Select[Any], columns: Any, limit: int) -> Select[Any]:
    return query.order_by(columns.changed_at.desc(), columns.key.desc()).limit(limit)


def _of_contexts(column: Any) -> ColumnElement[bool]:
    """Of the contexts that are named when the statement runs."""
    return cast("ColumnElement[bool]", column.in_(bindparam("of_contexts", expanding=True)))


_QUEUED = (
    select(turns.c.context_key, func.count())
    .where(_of_contexts(turns.c.context_key), turns.c.status == "queued")
    .group_by(turns.c.context_key)
)
_PENDING = (
    select(tool_calls.c.context_key, tool_calls.c.id)
    .where(_of_contexts(tool_calls.c.context_key), tool_calls.c.status == "pending")
    .order_by(tool_calls.c.key)
)
_OPEN = (
    select_placed()
    .where(_of_contexts(messages.c.context_key), messages.c.status == "streaming")
    .order_by(messages.c.revision, messages.c.key)
)
_PRODUCED = (
    select(
        messages.c.key,
        messages.c.context_key,
        contexts.c.id.label("context_id"),
        heads.c.written_at,
    )
    .select_from(_WITH_HEAD.join(contexts, contexts.c.key == messages.c.context_key))
    .where(messages.c.status == "streaming", heads.c.producer_id.is_not(None))
    .where(
        tuple_(messages.c.context_key, messages.c.key)
        > tuple_(
            bindparam("after_context", type_=messages.c.context_key.type),
            bindparam("after_message", type_=messages.c.key.type),
        )
    )
    .order_by(messages.c.context_key, messages.c.key)
    .limit(PRODUCED_PAGE)
)
_CONTEXT = select(contexts).where(contexts.c.id == bindparam("context_id"))


class Reader:
    """Reads, each in one snapshot on a held connection."""

    def __init__(self, engine: AsyncEngine, *, connections: int) -> None:
        self._engine = engine
        self._count = connections
        self._free: asyncio.Queue[AsyncConnection | None] = asyncio.Queue()
        for _ in range(connections):
            self._free.put_nowait(None)
        self._beginnings = 0  # connections of an earlier one lead to another database
        self._looking: AsyncConnection | None = None
        self._look_lock = asyncio.Lock()

    def start_anew(self) -> None:
        """No connection that was made before is used for another read."""
        self._beginnings += 1

    async def look(self, query: Select[Any]) -> Sequence[AnyRow]:
        """One statement by itself, for what is looked at again and again: one trip to PostgreSQL."""
        if self._engine.dialect.name == "sqlite":
            async with self.snapshot() as connection:
                rows: Sequence[AnyRow] = (await connection.execute(query)).all()
            return rows
        async with self._look_lock:
            try:
                return await self._look(query)
            except BaseException as error:
                looking, self._looking = self._looking, None
                await asyncio.shield(_let_go(looking))
                if isinstance(error, Exception):
                    raise translated(error, event="the database did not answer a look") from None
                raise

    async def _look(self, query: Select[Any]) -> Sequence[AnyRow]:
        if self._looking is not None and self._is_of_before(self._looking):
            await _let_go(self._looking)
            self._looking = None
        if self._looking is None:
            connection = await self._engine.connect()
            self._looking = await connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.info["beginnings"] = self._beginnings
        rows: Sequence[AnyRow] = (await self._looking.execute(query)).all()
        await self._looking.rollback()  # nothing is sent: it only ends what SQLAlchemy has begun
        return rows

    async def heads_of(self, keys: Sequence[int]) -> dict[int, tuple[int, bool]]:
        """The head of each of these messages, and whether it is open; of a deleted one nothing."""
        query = select(heads.c.message_key, heads.c.head, heads.c.is_open)
        rows = await self.look(query.where(heads.c.message_key.in_(keys)))
        return {row.message_key: (row.head, row.is_open) for row in rows}

    async def close(self) -> None:
        """Gives back the connections that are free; who still reads loses its own with the engine."""
        looking, self._looking = self._looking, None
        await _let_go(looking)
        while not self._free.empty():
            connection = self._free.get_nowait()
            if connection is not None:
                await connection.close()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose statements all see the same moment.

        Raises `Overloaded` when none is free in time, or for trouble of the database that may pass,
        and `InternalError` for trouble that never does.
        """
        connection = await self._take()
        beginnings = self._beginnings
        try:
            connection = await self._begin(connection)
            yield connection
            await connection.rollback()
        except Exception as error:
            if trouble_of(error) is None:
                if connection is not None:
                    await connection.rollback()
                raise
            await _let_go(connection)
            raise translated(error, event="the database did not answer a read") from None
        except asyncio.CancelledError:
            # Cut in the middle of a statement: what the connection would answer next is unknown.
            await asyncio.shield(_let_go(connection))
            raise
        finally:
            if connection is not None and beginnings != self._beginnings:
                await _let_go(connection)
            self._free.put_nowait(connection)

    async def _take(self) -> AsyncConnection | None:
        try:
            # Not `wait_for`: in Python 3.11 it forgets a cancel that comes together with the connection.
            async with asyncio.timeout(ACQUIRE_S):
                return await self._free.get()
        except TimeoutError:
            raise Overloaded("More reads are waiting than the server takes on.") from None

    async def _begin(self, connection: AsyncConnection | None) -> AsyncConnection:
        """A held connection may have died in the meantime: then a new one, once."""
        for last_try in (False, True):
            if connection is not None and self._is_of_before(connection):
                await _let_go(connection)
            if connection is None or connection.closed:
                connection = await self._engine.connect()
            try:
                await connection.begin()
                if self._engine.dialect.name == "postgresql":
                    await connection.execute(_ONE_MOMENT)
                connection.info["beginnings"] = self._beginnings
                return connection
            except DBAPIError:
                if last_try or not connection.invalidated:
                    raise
                await _let_go(connection)
        raise AssertionError("the last try returns or raises")

    def _is_of_before(self, connection: AsyncConnection) -> bool:
        if connection.closed or connection.invalidated:
            return False
        return bool(connection.info.get("beginnings") != self._beginnings)

    async def context(self, context_id: str) -> ContextSnapshot:
        """Raises `ContextNotFound`."""
        async with self.snapshot() as connection:
            row = await find_context(connection, context_id)
            return (await _complete_contexts(connection, [row]))[0]

    async def contexts(
        self, *, states: Sequence[str], before: tuple[int, int] | None, limit: int
    ) -> list[ContextSnapshot]:
        """Newest activity first, strictly after the position `before` (changed_at, key)."""
        query = select_contexts(states, before=before, limit=limit)
        async with self.snapshot() as connection:
            rows = (await connection.execute(query)).all()
            return await _complete_contexts(connection, rows)

    async def message(self, context_id: str, message_id: str) -> AnyRow:
        """Raises `ContextNotFound` or `MessageNotFound`."""
        async with self.snapshot() as connection:
            context = await find_context(connection, context_id)
            row: AnyRow | None = (
                await connection.execute(
                    select_messages(context.key).where(messages.c.id == message_id)
                )
            ).one_or_none()
        if row is None:
            raise MessageNotFound(message_id)
        return row

    async def conversation(
        self,
        context_id: str,
        *,
        branch: str | None,
        after_depth: int,
        after_queued_key: int,
        limit: int,
    ) -> tuple[AnyRow, list[AnyRow]]:
        """The context's row and a page of a branch in conversation order, the queued ones last."""
        async with self.snapshot() as connection:
            context = await find_context(connection, context_id)
            name = branch or context.active_branch
            path = await find_path(connection, context.key, name)
            rows = await path.after(connection, select_placed(), after_depth, limit=limit)
            if len(rows) < limit:
                queued = await connection.execute(
                    select_messages(context.key)
                    .where(messages.c.queued_branch == name, ~messages.c.superseded)
                    .where(messages.c.key > after_queued_key)
                    .order_by(messages.c.key)
                    .limit(limit - len(rows))
                )
                rows += queued.all()
        return context, rows

    async def changes(self, context_id: str, *, after: tuple[int, int], limit: int) -> Changes:
        """Messages whose last change is after (revision, key), by revision, of all branches."""
        async with self.snapshot() as connection:
            context = await find_context(connection, context_id)
            rows = (
                await connection.execute(
                    select_messages(context.key)
                    .where(tuple_(messages.c.revision, messages.c.key) > tuple_(*after))
                    .order_by(messages.c.revision, messages.c.key)
                    .limit(limit + 1)
                )
            ).all()
            open_messages = await _open_messages(connection, context.key)
        return Changes(context, rows[:limit], open_messages, len(rows) <= limit)

    async def newest_turn(self, context_id: str) -> Changes:
        """The assistant's and tools' messages of the newest started turn, by revision (§4.1)."""
        async with self.snapshot() as connection:
            context = await find_context(connection, context_id)
            rows: Sequence[AnyRow] = ()
            if context.active_turn_key is not None:
                turn_id = select(turns.c.id).where(turns.c.key == context.active_turn_key)
                rows = (
                    await connection.execute(
                        select_messages(context.key)
                        .where(messages.c.turn_id == turn_id.scalar_subquery())
                        .where(messages.c.role.in_(("assistant", "tool")))
                        .order_by(messages.c.revision, messages.c.key)
                    )
                ).all()
            open_messages = await _open_messages(connection, context.key)
        return Changes(context, rows, open_messages, complete=True)

    async def content(
        self, context_id: str, message_id: str, *, start: int, end: int | None, bytes_max: int
    ) -> ContentSlice:
        """Text after chunk `start`, up to chunk `end`; at most `bytes_max`, at least one chunk."""
        async with self.snapshot() as connection:
            message = await _find_head(connection, context_id, message_id)
            last = min(message.head, start + PULL_CHUNKS_MAX, message.head if end is None else end)
            sequence, content = start, ""
            if last > start:
                sequence, content = await read_text(
                    connection, message.key, start=start, end=last, bytes_max=bytes_max
                )
        return ContentSlice(message.key, sequence, content, message.head, message.status)

    async def chunks(
        self, context_id: str, message_id: str, *, start: int, limit: int, bytes_max: int
    ) -> tuple[AnyRow, Sequence[AnyRow]]:
        """The message's (key, head, status) and its chunks after `start`, each by itself."""
        async with self.snapshot() as connection:
            message = await _find_head(connection, context_id, message_id)
            rows = (
                await connection.execute(
                    select(chunks.c.sequence, chunks.c.content, chunks.c.created_at)
                    .where(in_slice(message.key, start, start + limit, bytes_max))
                    .order_by(chunks.c.sequence)
                )
            ).all()
        return message, rows

    async def contents(
        self, rows: Sequence[AnyRow], *, bytes_max: int
    ) -> dict[int, tuple[int, str]]:
        """By key, for each message in order, its last sequence read and its text, up to its row's head.

        Until `bytes_max` is full: then a message is cut, and those after it are left out.
        """
        result: dict[int, tuple[int, str]] = {}
        left = bytes_max
        async with self.snapshot() as connection:
            for row in rows:
                if left <= 0:
                    break
                sequence, content = await read_text(
                    connection,
                    row.key,
                    start=0,
                    end=min(row.head, PULL_CHUNKS_MAX),
                    bytes_max=left,
                    at_least=0,
                )
                result[row.key] = sequence, content
                left -= len(content.encode())
        return result

    async def open_heads(self, context_ids: Sequence[str]) -> Sequence[AnyRow]:
        """The open messages of these contexts with their heads, and `context_id`."""
        async with self.snapshot() as connection:
            rows: Sequence[AnyRow] = (
                await connection.execute(
                    select(
                        contexts.c.id.label("context_id"),
                        messages.c.id,
                        messages.c.role,
                        messages.c.kind,
                        messages.c.opened_revision,
                        heads.c.head,
                    )
                    .select_from(
                        _WITH_HEAD.join(contexts, contexts.c.key == messages.c.context_key)
                    )
                    .where(contexts.c.id.in_(context_ids), messages.c.status == "streaming")
                )
            ).all()
        return rows

    async def produced(self) -> Sequence[AnyRow]:
        """Every open produced message: `key`, `context_id`, `written_at`."""
        found: list[AnyRow] = []
        after = (0, 0)
        while True:
            place = {"after_context": after[0], "after_message": after[1]}
            async with self.snapshot() as connection:
                page = (await connection.execute(_PRODUCED, place)).all()
            found += page
            if len(page) < PRODUCED_PAGE:
                return found
            after = page[-1].context_key, page[-1].key

    async def now_ms(self) -> int:
        """The database's own clock."""
        async with self.snapshot() as connection:
            return int((await connection.execute(select(database_now_ms()))).scalar_one())

    async def revisions(self, context_ids: Sequence[str]) -> dict[str, int]:
        """The revision of each of these contexts that exists."""
        async with self.snapshot() as connection:
            rows = await connection.execute(
                select(contexts.c.id, contexts.c.revision).where(contexts.c.id.in_(context_ids))
            )
            return {row.id: row.revision for row in rows}

    async def ping(self) -> None:
        """Raises if the database does not answer."""
        async with self.snapshot() as connection:
            await connection.execute(text("SELECT 1"))


async def _let_go(connection: AsyncConnection | None) -> None:
    """Throws a connection away, whatever state it is in."""
    if connection is not None:
        with suppress(Exception):
            await connection.invalidate()
        with suppress(Exception):
            await connection.close()


async def find_context(connection: AsyncConnection, context_id: str) -> AnyRow:
    """The context's row. Raises `ContextNotFound`."""
    row = (await connection.execute(_CONTEXT, {"context_id": context_id})).one_or_none()
    if row is None:
        raise ContextNotFound(context_id)
    return row


async def _find_head(connection: AsyncConnection, context_id: str, message_id: str) -> AnyRow:
    row = (
        await connection.execute(
            select(messages.c.key, messages.c.status, heads.c.head)
            .select_from(_WITH_HEAD.join(contexts, contexts.c.key == messages.c.context_key))
            .where(contexts.c.id == context_id, messages.c.id == message_id)
        )
    ).one_or_none()
    if row is None:
        await find_context(connection, context_id)
        raise MessageNotFound(message_id)
    return row


async def _open_messages(connection: AsyncConnection, context_key: int) -> Sequence[AnyRow]:
    found = await connection.execute(_OPEN, {"of_contexts": [context_key]})
    rows: Sequence[AnyRow] = found.all()
    return rows


async def _complete_contexts(
    connection: AsyncConnection, rows: Sequence[AnyRow]
) -> list[ContextSnapshot]:
    """Each with what it has that its row does not say: three statements, however many there are."""
    of = {"of_contexts": [row.key for row in rows]}
    queued: dict[int, int] = dict((await connection.execute(_QUEUED, of)).all())
    pending = _by_context(await connection.execute(_PENDING, of))
    open_messages = _by_context(await connection.execute(_OPEN, of))
    return [
        ContextSnapshot(
            row,
            open_messages.get(row.key, []),
            queued.get(row.key, 0),
            [call.id for call in pending.get(row.key, [])],
        )
        for row in rows
    ]


def _by_context(rows: Iterable[AnyRow]) -> dict[int, list[AnyRow]]:
    found: dict[int, list[AnyRow]] = {}
    for row in rows:
        found.setdefault(row.context_key, []).append(row)
    return found
