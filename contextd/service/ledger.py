"""Where a change becomes durable and is then told: the writer, the tail and the hub in one order.

Everything that changes a context goes through `Ledger.edit` or `Ledger.append`. After the commit, and
in commit order, the tail gets the chunks first and the hub the positions second, so that a reader who
follows a signal always finds the text.
"""

from asyncio import Future
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import (
    ContextNotFound,
    MessageClosed,
    Overloaded,
    SequenceConflict,
    SequenceGap,
    StaleProducer,
)
from contextd.core.message import MessageStatus
from contextd.signals.frames import Closing, Head, Standing
from contextd.signals.hub import Hub
from contextd.store.appends import Appended
from contextd.store.clock import Clock
from contextd.store.edit import ContextEdit, LostRaceError
from contextd.store.notices import Notice, OpenedMessage, StartedTurn
from contextd.store.tables import AnyRow
from contextd.store.tail import LiveMessage, Tail
from contextd.store.writer import Unconfirmed, Writer

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Refusals that may come of what another process wrote, and a commit of which nobody knows.
_DOUBTFUL = (MessageClosed, SequenceConflict, SequenceGap, StaleProducer, Unconfirmed)
RACES_MAX = 10  # lost to other processes in a row, before the caller hears of it


class TurnListener:
    """What the agent loop wants to hear of; the default listens to nothing."""

    def turn_started(self, turn: StartedTurn) -> None:
        """A turn is running, and this process owns it."""

    def turn_stopped(self, turn_id: str) -> None:
        """Somebody else ended the turn (a cancel, a deletion): its task has nothing left to do."""


class Ledger:
    """Commits changes and tells of them. All times are milliseconds of `clock`."""

    def __init__(
        self,
        *,
        writer: Writer,
        tail: Tail,
        hub: Hub,
        database_id: str,
        owner_id: str,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self.writer = writer
        self.tail = tail
        self.hub = hub
        self.database_id = database_id
        self.owner_id = owner_id
        self.clock = clock
        self.clock_ms = clock.now_ms
        self.new_id = new_id
        self.listener = TurnListener()
        self.turn_outcomes: Counter[str] = Counter()  # what ended here, by how
        self.call_outcomes: Counter[str] = Counter()

    def cursor(self, revision: int) -> str:
        """The stream's cursor at a revision (§4.1)."""
        return f"{self.database_id}-{revision}"

    async def edit(
        self, context_id: str, work: Callable[[ContextEdit], Awaitable[T]]
    ) -> tuple[ContextEdit, T]:
        """Runs `work` on the locked context, commits, and tells of it. `work` may run again.

        Raises what `work` raises (and then nothing was changed), and `ContextNotFound`.
        """

        async def run(connection: AsyncConnection) -> tuple[ContextEdit, T]:
            edit = await ContextEdit.begin(connection, context_id, self.clock)
            result = await work(edit)
            await edit.save()
            return edit, result

        for _ in range(RACES_MAX):
            try:
                after = partial(self._tell, self.tail.now_s())
                return await self.writer.change(run, after, context_id=context_id)
            except LostRaceError:
                self.tail.drop_streaming(context_id)
                log.info("another process changed the context first", context_id=context_id)
            except _DOUBTFUL:
                self.tail.drop_streaming(context_id)
                raise
            except ContextNotFound:
                self.tail.drop_context(context_id)
                raise
        raise Overloaded("Other processes change this context all the time.")

    async def edit_free(
        self, context_ids: Sequence[str], work: Callable[[ContextEdit], Awaitable[None]]
    ) -> None:
        """Runs `work` on each of these contexts that is there and not locked, in one transaction.

        All or none: raises what `work` raises, and then nothing was changed.
        """

        async def run(connection: AsyncConnection) -> list[ContextEdit]:
            edits = await ContextEdit.begin_free(connection, context_ids, self.clock)
            for edit in edits:
                await work(edit)
                await edit.save()
            return edits

        asked_s = self.tail.now_s()

        def tell(edits: Sequence[ContextEdit]) -> None:
            for edit in edits:
                self._tell(asked_s, (edit, None))

        await self.writer.change(run, tell)

    def append(
        self,
        live: LiveMessage,
        *,
        fence: int | None,
        texts: Sequence[str],
        first: int | None = None,
        sizes: Sequence[int] | None = None,
        sequences: Sequence[int | None] | None = None,
    ) -> Future[Appended]:
        """Appends chunks to an open message; resolves, with its head, once they are durable.

        The arguments, and what it raises, are those of `Writer.append`. With `first` it may be tried
        again. After `MessageClosed` or `StaleProducer` who writes must stop.
        """
        return self.writer.append(
            live.message_key,
            fence=fence,
            texts=texts,
            after=partial(self._tell_appended, live, self.tail.now_s()),
            first=first,
            sizes=sizes,
            sequences=sequences,
        )

    def learn(self, context_id: str, rows: Iterable[AnyRow], seen_s: float) -> None:
        """Messages of a context were read, from `seen_s` (`tail.now_s`) on: what is told of them next
        is not behind that."""
        for row in rows:
            is_open = row.status == MessageStatus.STREAMING
            self.tail.learn(context_id, row.id, head=row.head, is_open=is_open, seen_s=seen_s)

    def learn_context(self, context: AnyRow, open_rows: Iterable[AnyRow], seen_s: float) -> None:
        """The same of a context and all its open messages."""
        heads = {row.id: row.head for row in open_rows}
        self.tail.learn_open(context.id, revision=context.revision, heads=heads, seen_s=seen_s)

    def _tell_appended(self, live: LiveMessage, asked_s: float, appended: Appended | None) -> None:
        if appended is None:
            self.tail.drop(
                live
            )  # refused for what others wrote, or nobody knows whether it is stored
            return
        self.tail.extend(
            live,
            appended.texts,
            appended.ends,
            head=appended.head,
            start_bytes=appended.start_bytes,
            seen_s=asked_s,
        )
        self.hub.publish_head(
            Head(
                context_id=live.context_id,
                message_id=live.message_id,
                role=live.role,
                kind=live.kind,
                position=appended.head,
                opened_revision=live.opened_revision,
            )
        )

    def _tell(self, asked_s: float, outcome: tuple[ContextEdit, object]) -> None:
        edit, _ = outcome
        self.turn_outcomes.update(edit.turn_outcomes)
        self.call_outcomes.update(edit.call_outcomes)
        try:
            for notice in edit.notices:
                self._tell_notice(edit.context_id, notice, asked_s)
        except Exception:
            self.tail.drop_context(edit.context_id)  # it may have been told a part only
            raise
        for turn_id in edit.stopped_turn_ids:
            self.listener.turn_stopped(turn_id)
        for turn in edit.started_turns:
            self.listener.turn_started(turn)

    def _tell_notice(self, context_id: str, notice: Notice, asked_s: float) -> None:
        for opened in notice.opened:
            self._hold(context_id, opened, notice.revision, asked_s)
        for closed in notice.closed:
            self.tail.close(
                context_id, closed.id, closed.status, final=closed.final, seen_s=asked_s
            )
        self.hub.publish(
            revision=notice.revision,
            closings=[
                Closing(
                    context_id=context_id,
                    message_id=closed.id,
                    role=closed.role,
                    kind=closed.kind,
                    final=closed.final,
                    status=closed.status.value,
                    revision=notice.revision,
                )
                for closed in notice.closed
            ],
            standing=Standing(
                context_id=context_id,
                state=notice.state,
                revision=notice.revision,
                record_revision=notice.record_revision,
            ),
        )

    def _hold(self, context_id: str, opened: OpenedMessage, revision: int, asked_s: float) -> None:
        live = LiveMessage(
            context_id=context_id,
            message_id=opened.id,
            message_key=opened.key,
            role=opened.role,
            kind=opened.kind,
            opened_revision=revision,
            produced=opened.produced,
        )
        self.tail.add(live, seen_s=asked_s)
        if opened.texts:
            self.writer.chunks_written += len(opened.texts)
            self.tail.extend(
                live, opened.texts, opened.ends, head=len(opened.texts), seen_s=asked_s
            )
        if opened.status is MessageStatus.STREAMING:
            self.hub.publish_head(
                Head(
                    context_id=context_id,
                    message_id=opened.id,
                    role=opened.role,
                    kind=opened.kind,
                    position=len(opened.texts),
                    opened_revision=revision,
                )
            )
