"""Appends of chunks inside a group commit: thousands of them become two statements.

The guard is in the first statement: it moves the heads of all messages that are open, of the right
fence, and where the writer believes them to be. What it did not move is judged one by one: stored
before (a repeat, which is harmless), refused, or stored in part, and then the rest goes another round.
So one refused append does not undo its neighbours, and none is stored twice.
"""

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import msgspec
from sqlalchemy import select, update
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import (
    ContextdError,
    MessageClosed,
    MessageNotFound,
    SequenceConflict,
    SequenceGap,
    StaleProducer,
)
from contextd.core.message import MessageStatus
from contextd.store.append_sql import ChunkRow, HeadRow, append_sql
from contextd.store.locks import waits
from contextd.store.tables import AnyRow, chunks, heads, messages, stamp


class Appended(msgspec.Struct, frozen=True):
    """How an append ended: its message has `head` chunks now.

    `texts`, the newest of them, were written: from byte `start_bytes` of the message on, each up to
    its byte in `ends`. `duplicates` others were stored before. `closed`: the message is closed by now,
    so nothing was written.
    """

    head: int
    start_bytes: int
    texts: Sequence[str]
    ends: Sequence[int]
    duplicates: int
    closed: bool = False


class AppendHook(Protocol):
    """Called after the commit, in commit order; must not raise, block or await.

    None: the append failed, its message is closed by now, or nobody knows whether it is stored.
    """

    def __call__(self, appended: Appended | None) -> None: ...


def utf8_bytes(value: str) -> int:
    """The length of `value` in UTF-8."""
    return len(value) if value.isascii() else len(value.encode())


class Append:
    """Chunks for one message, all or none.

    `fence` None: whoever holds the message. `first` is the sequence of the first chunk; None: the next
    one. `sequences` is for chunks that do not simply follow each other: one for each, None: the next.
    """

    __slots__ = (
        "after",
        "error",
        "fence",
        "first",
        "future",
        "held",
        "held_at",
        "lost",
        "message_key",
        "repeated",
        "result",
        "sequences",
        "sizes",
        "texts",
    )

    def __init__(
        self,
        message_key: int,
        *,
        fence: int | None,
        first: int | None,
        texts: Sequence[str],
        sizes: Sequence[int],
        sequences: Sequence[int | None] | None,
        after: AppendHook,
        future: asyncio.Future[Appended],
    ) -> None:
        self.message_key = message_key
        self.fence = fence
        self.first = first
        self.texts = texts
        self.sizes = sizes
        self.sequences = sequences
        self.after = after
        self.future = future
        self.result: Appended | None = None
        self.error: BaseException | None = None
        self.held = self.lost = self.repeated = False
        self.held_at: float | None = None

    @property
    def rows(self) -> Hashable:
        """What it locks: the message's head."""
        return self.message_key

    def tell(self) -> None:
        """After the commit. What another try stored before the message was closed is old news."""
        told = self.error is None and self.result is not None and not self.result.closed
        self.after(self.result if told else None)


class _Part:
    """What of an append is to be written in a round: `texts`, after the head `expected`.

    `end` is the head after it, once it has its place in the round; None where the start is not known.
    """

    __slots__ = ("append", "duplicates", "end", "expected", "sizes", "texts")

    def __init__(
        self,
        append: Append,
        *,
        expected: int | None,
        texts: Sequence[str],
        sizes: Sequence[int],
        duplicates: int = 0,
    ) -> None:
        self.append = append
        self.expected = expected
        self.texts = texts
        self.sizes = sizes
        self.duplicates = duplicates
        self.end: int | None = None


_NOWHERE = -1  # no head is there, so what must be taken chunk by chunk is left to be judged


def _whole(append: Append) -> _Part:
    expected = None if append.first is None else append.first - 1
    if append.sequences is not None:
        expected = _NOWHERE
    return _Part(append, expected=expected, texts=append.texts, sizes=append.sizes)


class Appender:
    """Runs the appends of a group inside its transaction."""

    def __init__(self, dialect: Dialect) -> None:
        self._sql = append_sql(dialect)

    async def run(self, connection: AsyncConnection, appends: Sequence[Append], now: int) -> int:
        """Sets each append's result or error, or that its head is `held`; returns how many were written."""
        written = 0
        waiting = [_whole(append) for append in appends]
        while waiting:
            by_message, waiting = _take_round(waiting)
            rows = await self._advance(connection, by_message, now)
            if rows:
                await self._sql.insert_chunks(connection, rows)
                written += len(rows)
            for key, parts in by_message.items():
                if await _is_held(connection, key):
                    waiting = _hold(key, parts, waiting)
                else:
                    waiting = await _judge(connection, key, parts, now) + waiting
        return written

    async def _advance(
        self, connection: AsyncConnection, by_message: dict[int, list[_Part]], now: int
    ) -> list[ChunkRow]:
        """Moves the heads that may be moved, and takes those messages out of `by_message`."""
        rows: list[HeadRow] = [
            (
                key,
                sum([len(part.texts) for part in parts]),
                sum([sum(part.sizes) for part in parts]),
                sum([sum(map(len, part.texts)) for part in parts]),
                parts[0].append.fence,
                parts[0].expected,
            )
            for key, parts in sorted(by_message.items())
        ]
        chunk_rows: list[ChunkRow] = []
        for key, head, end in await self._sql.advance_heads(connection, rows, now):
            _number(by_message.pop(key), head, end, now, chunk_rows)
        return chunk_rows


def _take_round(parts: Sequence[_Part]) -> tuple[dict[int, list[_Part]], list[_Part]]:
    """All of a message that follow each other under one fence go together; the rest waits."""
    by_message: dict[int, list[_Part]] = {}
    waiting_keys: set[int] = set()
    left_over: list[_Part] = []
    for part in parts:
        key = part.append.message_key
        before = by_message.setdefault(key, [])
        # Nothing goes ahead of what has to wait.
        if before and (key in waiting_keys or not _follows(part, before[-1])):
            waiting_keys.add(key)
            left_over.append(part)
            continue
        start = before[-1].end if before else part.expected
        part.end = start if start in (None, _NOWHERE) else start + len(part.texts)
        before.append(part)
    return by_message, left_over


def _follows(part: _Part, last: _Part) -> bool:
    if last.end == _NOWHERE or part.append.fence != last.append.fence:
        return False
    return part.expected is None or part.expected == last.end


def _number(
    parts: Sequence[_Part], head: int, end: int, now: int, chunk_rows: list[ChunkRow]
) -> None:
    """Gives the chunks of one message their sequences, now that its head has moved to `head`."""
    sequence = head - sum([len(part.texts) for part in parts])
    end -= sum([sum(part.sizes) for part in parts])
    for part in parts:
        key = part.append.message_key
        start, ends = end, []
        for content, size in zip(part.texts, part.sizes, strict=True):
            sequence += 1
            end += size
            ends.append(end)
            chunk_rows.append((key, sequence, content, end, now))
        part.append.result = Appended(sequence, start, part.texts, ends, part.duplicates)


async def _is_held(connection: AsyncConnection, key: int) -> bool:
    """Whether the head is there, and another server has it; else it is locked here from now on."""
    if connection.dialect.name == "sqlite" or waits(connection):
        return False
    head = select(heads.c.message_key).where(heads.c.message_key == key)
    if await connection.scalar(head.with_for_update(skip_locked=True)) is not None:
        return False
    return await connection.scalar(head) is not None


def _hold(key: int, parts: Sequence[_Part], waiting: Sequence[_Part]) -> list[_Part]:
    """Everything to this message has to wait; returns what else is yet to be written."""
    for part in (*parts, *waiting):
        if part.append.message_key == key:
            part.append.held = True
    return [part for part in waiting if part.append.message_key != key]


async def _judge(
    connection: AsyncConnection, key: int, parts: Sequence[_Part], now: int
) -> list[_Part]:
    """Says of each append to a message that was not moved what it is; returns what is yet to write.

    The row is locked, so what is returned fits when it is tried again.
    """
    row = await _lock_head(connection, key)
    if row is None:
        for part in parts:
            part.append.error = MessageNotFound("")
        return []
    for index, part in enumerate(parts):
        append = part.append
        try:
            missing = await _compare(connection, row, append)
        except ContextdError as error:
            append.error = error
            continue
        if missing.texts:
            return [missing, *parts[index + 1 :]]
        await connection.execute(  # a repeat is a sign of life, too
            update(heads).where(heads.c.message_key == key).values(written_at=stamp(now))
        )
        append.result = Appended(
            row.head, row.bytes, (), (), missing.duplicates, closed=not row.is_open
        )
    return []


async def _lock_head(connection: AsyncConnection, key: int) -> AnyRow | None:
    """The head with the status of its message; None when its context is deleted (§2)."""
    row: AnyRow | None = (
        await connection.execute(
            select(heads, messages.c.status)
            .join(messages, messages.c.key == heads.c.message_key)
            .where(heads.c.message_key == key)
            .with_for_update(of=heads)
        )
    ).one_or_none()
    if row is None or (not row.is_open and row.status == MessageStatus.STREAMING):
        return None  # a deletion closes the heads at once, and purges the rest after
    return row


async def _compare(connection: AsyncConnection, row: AnyRow, append: Append) -> _Part:
    """What of an append is not stored yet. Raises the refusal that it deserves (§7)."""
    if append.fence not in (None, row.fence):
        raise StaleProducer(row.fence)
    try:
        missing = _place(append, row.head, await _stored(connection, append, row.head))
    except (SequenceConflict, SequenceGap) as error:
        if row.is_open:
            raise
        raise _closed(row, error.index) from None
    if missing.texts and not row.is_open:
        # The first that is missing: with sequences it follows the last that is stored.
        raise _closed(row, missing.duplicates)
    return missing


def _closed(row: AnyRow, index: int) -> MessageClosed:
    error = MessageClosed(message_status=row.status, final_sequence=row.head)
    error.index = index
    return error


async def _stored(connection: AsyncConnection, append: Append, head: int) -> dict[int, str]:
    """The text of those chunks of the append that have a place at or below the head."""
    wanted = [sequence for sequence in _sequences(append) if sequence is not None]
    below = [sequence for sequence in wanted if sequence <= head]
    if not below:
        return {}
    rows = await connection.execute(
        select(chunks.c.sequence, chunks.c.content)
        .where(chunks.c.message_key == append.message_key)
        .where(chunks.c.sequence.in_(below))
    )
    return dict(rows.all())


def _sequences(append: Append) -> Sequence[int | None]:
    if append.sequences is not None:
        return append.sequences
    if append.first is None:
        return [None] * len(append.texts)
    return range(append.first, append.first + len(append.texts))


def _place(append: Append, head: int, stored: Mapping[int, str]) -> _Part:
    """Takes the chunks one by one: which are to be written after `head`, which are there already.

    Raises `SequenceGap` or `SequenceConflict`.
    """
    texts: list[str] = []
    sizes: list[int] = []
    rows = zip(append.texts, append.sizes, _sequences(append), strict=True)
    for index, (content, size, sequence) in enumerate(rows):
        following = head + len(texts) + 1
        refusal: SequenceGap | SequenceConflict
        if sequence is None or sequence == following:
            texts.append(content)
            sizes.append(size)
            continue
        if sequence > following:
            refusal = SequenceGap(following)
        elif content != (stored[sequence] if sequence <= head else texts[sequence - head - 1]):
            refusal = SequenceConflict(sequence)
        else:
            continue
        refusal.index = index
        raise refusal
    return _Part(
        append,
        expected=head,
        texts=texts,
        sizes=sizes,
        duplicates=len(append.texts) - len(texts),
    )
