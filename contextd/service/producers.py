"""Producing from outside (§7): messages that somebody else writes, chunk by chunk.

A produced message belongs to a producer in an *epoch*. A higher epoch takes it over, and from then on
the writes of the lower one are refused, by the same fence that guards the messages of turns. Nothing
that a producer needs is kept in memory: it may go on after any crash, here or in another process. Who is
silent for too long loses the message; each process measures that by its own monotonic clock.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from sqlalchemy import Select, select, update

from contextd.core.errors import (
    ContextBusy,
    ContextdError,
    ContextNotFound,
    IdTaken,
    MessageClosed,
    MessageNotFound,
    SequenceConflict,
    SequenceGap,
    ShuttingDown,
    StaleProducer,
    defect_in,
)
from contextd.core.machine import TURN_STATES, State, Trigger
from contextd.core.message import Message, MessageStatus, Problem
from contextd.core.producing import (
    CompleteRequest,
    FailRequest,
    OpenRequest,
    Producer,
)
from contextd.core.values import SEQUENCE_MAX
from contextd.service.contexts import check_size
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps
from contextd.service.wire import message_wire
from contextd.store.appends import Appended
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.locks import for_update
from contextd.store.reader import Reader
from contextd.store.tables import AnyRow, heads, messages, stamp
from contextd.store.tail import LiveMessage

log = structlog.get_logger(__name__)

LOOKS_PER_SILENCE = 8  # so a message is closed at most a quarter of the silence late
LOOK_S_MAX = 5.0
SILENT_MAX = 100  # messages looked after in one sweep; the next takes the next


class Producers:
    """Opens, writes and closes produced messages. `silence_ms` is how long a producer may be silent."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        steps: Steps,
        *,
        silence_ms: int,
        metadata_bytes_max: int,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._steps = steps
        self._silence_ms = silence_ms
        self._metadata_bytes_max = metadata_bytes_max
        self._watched_s = 0.0  # how long this process has looked for silent producers
        self._looked_at: float | None = None  # by the loop's clock
        self._seen: dict[int, tuple[int, float]] = {}  # last write, and when it was first seen
        self.closing = asyncio.Event()  # set: the server stops, so bodies that are open have to end

    def end_bodies(self) -> None:
        """Another database: bodies that are open end as at a stop; later ones are taken."""
        closing, self.closing = self.closing, asyncio.Event()
        closing.set()

    async def open(
        self, context_id: str, message_id: str, request: OpenRequest
    ) -> tuple[Message, bool]:
        """Opens a message or takes it over; says also whether it is new.

        Raises `StaleProducer`, `MessageClosed`, `ContextBusy` while a turn runs, `IdTaken` for an id
        of another kind of message, `BranchNotFound`, `MessageNotFound`, `PayloadTooLarge`.
        """
        check_size(request.metadata, self._metadata_bytes_max)

        async def work(edit: ContextEdit) -> tuple[Message, bool]:
            row = await _find(edit, message_id)
            produced = row is not None and row.producer_id is not None
            if edit.state in TURN_STATES and not produced:
                raise ContextBusy(edit.state)
            if row is None:
                await self._open(edit, message_id, request)
            elif not produced:
                raise IdTaken(message_id)
            elif row.status != MessageStatus.STREAMING:
                raise _closed(row)
            else:
                await _take_over(edit, row, request.producer)
            return await _as_it_is(edit, message_id), row is None

        asked_s = self._ledger.tail.now_s()
        _, (message, is_new) = await self._ledger.edit(context_id, work)
        self._learn(message, asked_s)
        return message, is_new

    async def find(self, context_id: str, message_id: str) -> LiveMessage:
        """What `append` writes to. Raises `ContextNotFound`, `MessageNotFound`.

        For a message that is not produced: `ContextBusy` while it is being written, `MessageClosed`.
        """
        live = self._ledger.tail.trusted(context_id, message_id)
        if live is not None and live.produced:
            return live
        row = await self._reader.message(context_id, message_id)
        if row.producer_id is None:
            raise await self._not_produced(context_id, row)
        live = LiveMessage(
            context_id=context_id,
            message_id=message_id,
            message_key=row.key,
            role=row.role,
            kind=row.kind,
            opened_revision=row.opened_revision,
            produced=True,
        )
        live.skip_to(row.head, row.bytes)
        return live

    async def check(self, live: LiveMessage, epoch: int | None) -> None:
        """Whether a producer may write. Raises as `append` does."""
        try:
            row = await self._reader.message(live.context_id, live.message_id)
        except MessageNotFound:
            raise ContextNotFound(live.context_id) from None
        _check_epoch(row, epoch)
        if row.status != MessageStatus.STREAMING:
            raise _closed(row)

    async def append(
        self,
        live: LiveMessage,
        *,
        epoch: int | None,
        texts: Sequence[str],
        sizes: Sequence[int],
        sequences: Sequence[int | None],
    ) -> Appended:
        """Stores chunks, all or none, each once; `sequences` has None where the next is meant.

        Raises `StaleProducer`, `MessageClosed`, `SequenceGap`, `SequenceConflict`, `ContextNotFound`
        after a deletion, `Overloaded`; its `index` is that of the chunk that was refused.
        """
        first = sequences[0]
        following = first is not None or sequences.count(None) == len(sequences)
        if first is not None:
            following = sequences == list(range(first, first + len(sequences)))
        try:
            return await self._ledger.append(
                live,
                fence=epoch,
                texts=texts,
                sizes=sizes,
                first=first if following else None,
                sequences=None if following else sequences,
            )
        except MessageNotFound:
            raise ContextNotFound(live.context_id) from None

    async def complete(self, context_id: str, message_id: str, request: CompleteRequest) -> Message:
        """Closes the message as completed; again the same. Raises as `append` does."""

        async def work(edit: ContextEdit) -> Message:
            row = await self._writable(edit, message_id, request.epoch, MessageStatus.COMPLETED)
            if request.final_sequence is not None:
                _check_final(row.head, request.final_sequence)
            if row.status == MessageStatus.STREAMING:
                await self._close(
                    edit,
                    [row],
                    MessageStatus.COMPLETED,
                    finish_reason=request.finish_reason,
                    usage=request.usage,
                )
            return await _as_it_is(edit, message_id)

        return await self._edit(context_id, work)

    async def fail(self, context_id: str, message_id: str, request: FailRequest) -> Message:
        """Closes the message as failed, with what it has; again the same."""
        problem = request.error.as_problem()

        async def work(edit: ContextEdit) -> Message:
            row = await self._writable(edit, message_id, request.epoch, MessageStatus.FAILED)
            if row.status == MessageStatus.STREAMING:
                await self._close(edit, [row], MessageStatus.FAILED, error=problem)
            return await _as_it_is(edit, message_id)

        return await self._edit(context_id, work)

    async def keep(self) -> None:
        """Background task: takes the message from producers that are silent for too long."""
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self.interrupt_silent()
            except ShuttingDown:
                return
            except Exception as error:
                what = "looking for silent producers failed; the next round tries again"
                log.warning(what, exc_info=defect_in(error))

    async def interrupt_silent(self) -> None:
        """Closes as `interrupted` the messages that were not written to for so long.

        Whatever the clocks of the servers say: a message is silent while its `written_at` stays what this
        process has seen. Time without looks (a frozen process, a database that is away) does not count.
        """
        silent, context_ids = await self._look()

        async def work(edit: ContextEdit) -> None:
            rows = [row for row in await _produced(edit) if silent.get(row.key) == row.written_at]
            if rows:
                await self._close(edit, rows, MessageStatus.INTERRUPTED, error=self._silence())

        for context_id in context_ids:
            with suppress(ContextNotFound):
                await self._ledger.edit(context_id, work)

    async def _look(self) -> tuple[dict[int, int], set[str]]:
        """The last writes, by key, of the messages that are silent, and the ids of their contexts."""
        rows = await self._reader.produced()
        self._watched_s += self._since_last_look_s()
        seen = {}
        for row in rows:
            before = self._seen.get(row.key)
            unchanged = before is not None and before[0] == row.written_at
            seen[row.key] = before if unchanged and before else (row.written_at, self._watched_s)
        self._seen = seen
        limit_s = self._watched_s - self._silence_ms / 1000
        silent = [row for row in rows if seen[row.key][1] <= limit_s][:SILENT_MAX]
        return {row.key: row.written_at for row in silent}, {row.context_id for row in silent}

    def _since_last_look_s(self) -> float:
        """A look that was late by more than a look counts as one that was late by one."""
        now = asyncio.get_running_loop().time()
        before, self._looked_at = self._looked_at, now
        return 0.0 if before is None else min(now - before, 2 * self._look_s)

    @property
    def _look_s(self) -> float:
        return min(LOOK_S_MAX, self._silence_ms / 1000 / LOOKS_PER_SILENCE)

    async def _open(self, edit: ContextEdit, message_id: str, request: OpenRequest) -> None:
        branch = request.branch or edit.row.active_branch
        forks = request.parent_id is not None
        if request.parent_id is not None:
            branch = await edit.tree.fork(from_message_id=request.parent_id, name=request.branch)
            edit.put(active_branch=branch)
        epoch = request.producer.epoch or 1
        detail = {"message_id": message_id, "producer_id": request.producer.id, "epoch": epoch}
        await edit.step(Trigger.OPEN_MESSAGE, detail=detail, record=forks)
        await edit.add_message(
            MessageDraft(
                id=message_id,
                role=request.role,
                kind=request.kind,
                media_type=request.media_type,
                metadata=request.metadata,
                producer_id=request.producer.id,
                fence=epoch,
            ),
            branch=branch,
        )

    async def _edit(
        self, context_id: str, work: Callable[[ContextEdit], Awaitable[Message]]
    ) -> Message:
        asked_s = self._ledger.tail.now_s()
        _, message = await self._ledger.edit(context_id, work)
        self._learn(message, asked_s)
        return message

    def _learn(self, message: Message, seen_s: float) -> None:
        """A pull that follows this answer is not behind it, whichever process wrote the message."""
        self._ledger.tail.learn(
            message.context_id,
            message.id,
            head=message.current_sequence,
            is_open=message.status is MessageStatus.STREAMING,
            seen_s=seen_s,
        )

    async def _writable(
        self, edit: ContextEdit, message_id: str, epoch: int | None, ended: MessageStatus
    ) -> AnyRow:
        """The produced message, open or already `ended` the same way."""
        row = await _find(edit, message_id)
        if row is None:
            raise MessageNotFound(message_id)
        if row.producer_id is None:
            raise _refuse_not_produced(edit.state, row)
        _check_epoch(row, epoch)
        if row.status not in (MessageStatus.STREAMING, ended):
            raise _closed(row)
        return row

    async def _close(
        self, edit: ContextEdit, rows: Sequence[AnyRow], status: MessageStatus, **ending: Any
    ) -> None:
        """Closes these; a step of the machine where no other is open, and then the queue goes on."""
        closing = {row.key for row in rows}
        if any(row.key not in closing for row in await edit.open_rows()):
            edit.change()
        else:
            detail = {"message_ids": [row.id for row in rows]}
            await edit.step(Trigger.CLOSE_MESSAGE, detail=detail)
        await edit.close_messages(rows, status, **ending)
        await self._steps.start_next(edit)

    async def _not_produced(self, context_id: str, row: AnyRow) -> ContextdError:
        context = await self._reader.context(context_id)
        return _refuse_not_produced(State(context.row.state), row)

    def _silence(self) -> Problem:
        seconds = self._silence_ms / 1000
        message = f"The producer wrote nothing for {seconds:g} s."
        return Problem(type="producer_silent", message=message)


def _closed(row: AnyRow) -> MessageClosed:
    return MessageClosed(message_status=row.status, final_sequence=row.final_sequence)


def _refuse_not_produced(state: State, row: AnyRow) -> ContextdError:
    if row.status == MessageStatus.STREAMING:
        return ContextBusy(state)
    return _closed(row)


def _check_epoch(row: AnyRow, epoch: int | None) -> None:
    if epoch not in (None, row.fence):
        raise StaleProducer(row.fence)


def _check_final(head: int, final_sequence: int) -> None:
    if final_sequence > head:
        raise SequenceGap(head + 1)
    if final_sequence < head:
        raise SequenceConflict(final_sequence + 1)


async def _take_over(edit: ContextEdit, row: AnyRow, producer: Producer) -> None:
    """The higher epoch gets the message. The same again is a sign of life."""
    epoch = producer.epoch or row.fence + 1
    if not row.fence <= epoch <= SEQUENCE_MAX or (
        epoch == row.fence and producer.id != row.producer_id
    ):
        raise StaleProducer(row.fence)
    await edit.connection.execute(
        update(heads)
        .where(heads.c.message_key == row.key)
        .values(fence=epoch, producer_id=producer.id, written_at=stamp(edit.now))
    )
    if epoch > row.fence:
        edit.change()
        await edit.connection.execute(
            update(messages)
            .where(messages.c.key == row.key)
            .values(revision=edit.revision, changed_at=edit.now)
        )


async def _find(edit: ContextEdit, message_id: str) -> AnyRow | None:
    """The message with its head, which nobody can move until the transaction ends."""
    row: AnyRow | None = (
        await edit.connection.execute(
            _with_head(edit).where(messages.c.context_key == edit.key, messages.c.id == message_id)
        )
    ).one_or_none()
    return row


async def _as_it_is(edit: ContextEdit, message_id: str) -> Message:
    """The answer, of the same transaction: it says what this request did, not what came after."""
    row = await _find(edit, message_id)
    if row is None:
        raise MessageNotFound(message_id)
    return message_wire(row, edit.context_id)


async def _produced(edit: ContextEdit) -> Sequence[AnyRow]:
    """The context's open produced messages, in the order in which they were opened."""
    rows: Sequence[AnyRow] = (
        await edit.connection.execute(
            _with_head(edit)
            .where(messages.c.context_key == edit.key, messages.c.status == "streaming")
            .where(heads.c.producer_id.is_not(None))
            .order_by(messages.c.key)
        )
    ).all()
    return rows


def _with_head(edit: ContextEdit) -> Select[Any]:
    query = select(messages, heads.c.head, heads.c.fence, heads.c.producer_id, heads.c.written_at)
    joined = query.join(heads, heads.c.message_key == messages.c.key)
    return for_update(edit.connection, joined, of=heads)
