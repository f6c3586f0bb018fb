"""Pulling text (§3.3): the live tail from memory, the rest from SQL, long polls from the hub."""

import asyncio
from collections.abc import Iterable, Iterator

import structlog

from contextd.core.errors import ContextNotFound, Overloaded
from contextd.core.message import Chunk, ChunkPage, MessageStatus
from contextd.core.values import SEQUENCE_MAX, timestamp
from contextd.service.ledger import Ledger
from contextd.signals.hub import Watch
from contextd.store.reader import ContentSlice, Reader

log = structlog.get_logger(__name__)

LOOK_PAGE = 5000  # messages that are looked at in one statement


def batched(keys: Iterable[int], count: int) -> Iterator[list[int]]:
    """The keys, so many at a time."""
    left = list(keys)
    for start in range(0, len(left), count):
        yield left[start : start + count]


class Content:
    """Reads the text of messages. Positions are sequences; sizes are bytes of UTF-8."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        *,
        pull_bytes_max: int,
        waiting_max: int,
        poll_s: float,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._pull_bytes_max = pull_bytes_max
        self._waiting_max = waiting_max
        self._waiting = 0
        self._poll_s = poll_s

    @property
    def database_id(self) -> str:
        """Of the database whose text this is."""
        return self._ledger.database_id

    def live(
        self, context_id: str, message_id: str, start: int, end: int | None
    ) -> ContentSlice | None:
        """The slice from memory, or None where only SQL has it. Never awaits."""
        live = self._ledger.tail.trusted(context_id, message_id)
        if live is None:
            return None
        found = live.read(start, SEQUENCE_MAX if end is None else end, self._pull_bytes_max)
        if found is None:
            return None
        return ContentSlice(live.message_key, found[0], found[1], live.head, live.status)

    async def pull(
        self, context_id: str, message_id: str, *, start: int, end: int | None
    ) -> ContentSlice:
        """The text after `start`. Raises `ContextNotFound` or `MessageNotFound`."""
        found = self.live(context_id, message_id, start, end)
        if found is not None:
            return found
        tail = self._ledger.tail
        seen_s = tail.now_s()
        try:
            found = await self._reader.content(
                context_id, message_id, start=start, end=end, bytes_max=self._pull_bytes_max
            )
        except ContextNotFound:
            tail.drop_context(context_id)
            raise
        is_open = found.status == MessageStatus.STREAMING
        tail.learn(context_id, message_id, head=found.head, is_open=is_open, seen_s=seen_s)
        return found

    async def wait(
        self, context_id: str, message_id: str, *, start: int, end: int | None, wait_s: float
    ) -> ContentSlice:
        """Like `pull`, but holds on until there is something after `start` or the message is closed.

        Answers at once when the caller is ahead of the message. Raises `Overloaded` when more
        pulls wait than the limit.
        """
        if end is not None and end <= start:  # nothing can come that is asked for
            return await self.pull(context_id, message_id, start=start, end=end)
        if self._waiting >= self._waiting_max:
            raise Overloaded("More pulls are waiting than the server takes on.")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        try:
            with self._ledger.hub.watch(context_id, message_id) as watch:
                found = await self.pull(context_id, message_id, start=start, end=end)
                if found.head != start or found.status != MessageStatus.STREAMING:
                    return found
                watch.message_key = found.message_key
                if not await watch.reached(start, deadline - loop.time()):
                    return found
                return await self.pull(context_id, message_id, start=start, end=end)
        finally:
            self._waiting -= 1

    async def keep_in_step(self) -> None:
        """Background task: one look at all that pulls wait for, since other processes do not tell (§18)."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._look()
            except Exception as error:
                log.warning("what pulls wait for was not looked at", kind=type(error).__name__)

    async def _look(self) -> None:
        awaited = self._ledger.hub.awaited()
        for keys in batched(awaited, LOOK_PAGE):
            seen_s = self._ledger.tail.now_s()
            found = await self._reader.heads_of(keys)
            for key in keys:
                head, is_open = found.get(key, (0, False))
                for watch in awaited[key]:
                    self._learn(watch, head, is_open, seen_s)
                    watch.reach(head) if is_open else watch.finish()

    def _learn(self, watch: Watch, head: int, is_open: bool, seen_s: float) -> None:
        """The pull that waits must not be answered with what the tail knew before."""
        self._ledger.tail.learn(
            watch.context_id,
            watch.message_id,
            head=head,
            is_open=is_open,
            # One that is not open may be of a deleted context.
            seen_s=seen_s if is_open else float("-inf"),
        )

    async def chunks(
        self, context_id: str, message_id: str, *, start: int, limit: int
    ) -> ChunkPage:
        """Chunks after `start`, each by itself."""
        seen_s = self._ledger.tail.now_s()
        message, rows = await self._reader.chunks(
            context_id, message_id, start=start, limit=limit, bytes_max=self._pull_bytes_max
        )
        sequence = rows[-1].sequence if rows else start
        status = MessageStatus(message.status)
        is_open = status is MessageStatus.STREAMING
        self._ledger.tail.learn(
            context_id, message_id, head=message.head, is_open=is_open, seen_s=seen_s
        )
        return ChunkPage(
            context_id=context_id,
            message_id=message_id,
            chunks=[
                Chunk(
                    sequence=row.sequence,
                    content=row.content,
                    created_at=timestamp(row.created_at),
                )
                for row in rows
            ],
            sequence=sequence,
            head_sequence=message.head,
            status=status,
            final=is_final(status, sequence, message.head),
        )


def is_final(status: str, sequence: int, head: int) -> bool:
    """Whether nothing can ever follow what ends at `sequence`."""
    return status != MessageStatus.STREAMING and sequence == head
