"""Attaching a stream to a context (§4.1): subscribe, then read, then send; and staying in step.

The replay is read in pages, each a snapshot of its own, ordered by revision. A message that changes
while the pages go out moves to a later revision and is met again, so nothing is missed; and no
transaction stays open while a slow reader takes its time. The last page and the context's state are
one snapshot, at whose revision the reader becomes live.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import structlog

from contextd.core.errors import ContextNotFound, Overloaded, defect_in
from contextd.core.message import MessageStatus
from contextd.service.ledger import Ledger
from contextd.signals.frames import Closing, Head, Standing, parse_cursor
from contextd.signals.reader import Reader as StreamReader
from contextd.store.reader import Changes, Reader
from contextd.store.tables import AnyRow

log = structlog.get_logger(__name__)

REPLAY_PAGE = 500  # messages; also bounds what one write to a slow reader can hold
_AFTER_ALL_KEYS = 2**62


class Streams:
    """Opens streams of signals, and keeps the watched contexts in step with other processes."""

    def __init__(self, ledger: Ledger, reader: Reader, *, streams_max: int, poll_s: float) -> None:
        self._ledger = ledger
        self._reader = reader
        self._streams_max = streams_max
        self._poll_s = poll_s
        self._catching_up: dict[str, asyncio.Task[None]] = {}
        ledger.hub.on_gap = self._on_gap

    def subscribe(
        self, context_id: str, *, throttle_s: float, heartbeat_s: float, named: bool
    ) -> StreamReader:
        """A reader to which signals merge from now on; `attach` it, then `take`. Close it at the end."""
        if self._ledger.hub.reader_count >= self._streams_max:
            raise Overloaded("More streams are open than the server takes on.")
        return self._ledger.hub.subscribe(
            context_id, throttle_s=throttle_s, heartbeat_s=heartbeat_s, named=named
        )

    async def attach(
        self, reader: StreamReader, context_id: str, cursor: str | None
    ) -> AsyncGenerator[bytes]:
        """The blocks that bring a reader from its cursor to now. Raises `ContextNotFound`."""
        if cursor is None:
            seen_s = self._ledger.tail.now_s()
            page = await self._reader.newest_turn(context_id)
            self._ledger.learn_context(page.context, page.open_messages, seen_s)
        else:
            revision = parse_cursor(self._ledger.database_id, cursor)
            after = (revision or 0, _AFTER_ALL_KEYS if revision else 0)
            page = await self._changes_after(context_id, after)
            if page.context.revision < after[0]:  # a future revision: from the very beginning
                page = await self._changes_after(context_id, (0, 0))
            while not page.complete and not reader.ending:
                last = page.messages[-1]
                # More of the last revision may follow, so only the one before it is complete.
                yield reader.replay(_changes(context_id, page.messages), up_to=last.revision - 1)
                try:
                    page = await self._changes_after(context_id, (last.revision, last.key))
                except ContextNotFound:
                    # Deleted between two pages: the reader hears it as its last word.
                    self._ledger.hub.publish_deleted(context_id, last.revision + 1)
                    return
        if reader.ending:
            return
        yield reader.snapshot(
            changes=_changes(context_id, page.messages),
            open_heads=[_head(context_id, row) for row in page.open_messages],
            standing=_standing(page.context),
        )

    async def keep_in_step(self) -> None:
        """Forever: reads the revisions of what is watched again, for what other processes did."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._compare()
            except Exception as error:
                what = "comparing the watched contexts failed; the next round tries again"
                log.warning(what, exc_info=defect_in(error))

    async def close(self) -> None:
        """Stops what catches up."""
        for task in list(self._catching_up.values()):
            task.cancel()
        await asyncio.gather(*self._catching_up.values(), return_exceptions=True)

    async def _compare(self) -> None:
        hub = self._ledger.hub
        watched = [name for name in hub.watched() if hub.contiguous(name) is not None]
        for start in range(0, len(watched), REPLAY_PAGE):
            page = watched[start : start + REPLAY_PAGE]
            seen_s = self._ledger.tail.now_s()
            revisions = await self._reader.revisions(page)
            open_rows = await self._reader.open_heads(page)
            self._learn(page, revisions, open_rows, seen_s)
            for context_id in page:
                seen = hub.contiguous(context_id)
                if seen is not None and revisions.get(context_id, seen + 1) > seen:
                    self._on_gap(context_id)
            for row in open_rows:
                hub.publish_head(_head(row.context_id, row))

    def _learn(
        self,
        context_ids: Sequence[str],
        revisions: Mapping[str, int],
        open_rows: Sequence[AnyRow],
        seen_s: float,
    ) -> None:
        """Compares the tail with what was read of these contexts, before readers are told of it."""
        heads: dict[str, dict[str, int]] = {context_id: {} for context_id in context_ids}
        for row in open_rows:
            heads[row.context_id][row.id] = row.head
        for context_id, found in heads.items():
            if context_id in revisions:
                self._ledger.tail.learn_open(
                    context_id, revision=revisions[context_id], heads=found, seen_s=seen_s
                )
            else:
                self._ledger.tail.drop_context(context_id)

    async def _changes_after(self, context_id: str, after: tuple[int, int]) -> Changes:
        """A page of changes, to be told: a pull that follows finds as much at least."""
        seen_s = self._ledger.tail.now_s()
        page = await self._reader.changes(context_id, after=after, limit=REPLAY_PAGE)
        self._ledger.learn_context(page.context, page.open_messages, seen_s)
        return page

    def _on_gap(self, context_id: str) -> None:
        if context_id not in self._catching_up:
            task = asyncio.create_task(self._try_to_catch_up(context_id))
            self._catching_up[context_id] = task
            task.add_done_callback(lambda _: self._catching_up.pop(context_id, None))

    async def _try_to_catch_up(self, context_id: str) -> None:
        try:
            await self._catch_up(context_id)
        except Exception as error:
            what = "catching up failed; the next comparison asks again"
            log.warning(what, context_id=context_id, exc_info=defect_in(error))

    async def _catch_up(self, context_id: str) -> None:
        """Reads what was committed elsewhere since the last revision that readers were told of."""
        seen = self._ledger.hub.contiguous(context_id)
        if seen is None:
            return  # its readers have gone
        after = (seen, _AFTER_ALL_KEYS)
        closings: list[Closing] = []
        try:
            while True:
                page = await self._changes_after(context_id, after)
                changes = _changes(context_id, page.messages)
                closings += [change for change in changes if isinstance(change, Closing)]
                if page.complete:
                    break
                after = (page.messages[-1].revision, page.messages[-1].key)
        except ContextNotFound:
            self._ledger.tail.drop_context(context_id)
            self._ledger.hub.publish_deleted(context_id, seen + 1)
            return
        self._ledger.hub.fill(
            context_id,
            after=seen,
            heads=[_head(context_id, row) for row in page.open_messages],
            closings=closings,
            standing=_standing(page.context),
        )


def _head(context_id: str, row: AnyRow) -> Head:
    return Head(
        context_id=context_id,
        message_id=row.id,
        role=row.role,
        kind=row.kind,
        position=row.head,
        opened_revision=row.opened_revision,
    )


def _changes(context_id: str, rows: Sequence[AnyRow]) -> list[Head | Closing]:
    return [
        _head(context_id, row)
        if row.status == MessageStatus.STREAMING
        else Closing(
            context_id=context_id,
            message_id=row.id,
            role=row.role,
            kind=row.kind,
            final=row.final_sequence,
            status=row.status,
            revision=row.revision,
        )
        for row in rows
    ]


def _standing(context: AnyRow) -> Standing:
    return Standing(
        context_id=context.id,
        state=context.state,
        revision=context.revision,
        record_revision=context.record_revision,
    )
