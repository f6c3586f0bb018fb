"""One context under its lock: what a transaction changes, and what is to be told of it afterwards.

A `ContextEdit` is made and used inside one `Writer.change`. Each of its *changes* takes the next
revision of the context; a *step* is a change that moves the state machine and writes its row in the
journal. `save` writes the context's row, guarded by the revision and the state that the edit started
from, so that of two processes only one can win. What readers are to hear is collected in `notices`,
in order, and published only after the commit.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import bindparam, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import ContextNotFound
from contextd.core.machine import REST_STATES, State, Trigger, advance
from contextd.core.message import TEXT, MessageStats, MessageStatus, Problem, Role, Usage
from contextd.core.values import JsonObject
from contextd.store.appends import utf8_bytes
from contextd.store.clock import Clock
from contextd.store.locks import Locking
from contextd.store.notices import ClosedMessage, Notice, OpenedMessage, StartedTurn
from contextd.store.stored import stored_phases
from contextd.store.tables import AnyRow, chunks, contexts, heads, journal, messages, turns
from contextd.store.tree import Tree
from contextd.store.writer import Refused

_CONTEXT = Locking(
    lambda nowait: (
        select(contexts)
        .where(contexts.c.id == bindparam("context_id"))
        .with_for_update(nowait=nowait)
    )
)
_OPEN_MESSAGES = (
    select(messages)
    .where(messages.c.context_key == bindparam("of_context"), messages.c.status == "streaming")
    .order_by(messages.c.key)
)
_OPEN_OF_TURN = _OPEN_MESSAGES.where(messages.c.turn_id == bindparam("of_turn"))
_CLOSE_HEAD = Locking(
    lambda nowait: (
        update(heads)
        .where(
            heads.c.message_key
            == select(heads.c.message_key)
            .where(heads.c.message_key == bindparam("of_message"))
            .with_for_update(nowait=nowait)
            .scalar_subquery()
        )
        .values(is_open=False)
        .returning(heads)
    )
)
_ASKED_AT = (
    select(journal.c.at)
    .where(
        journal.c.context_key == bindparam("of_context"),
        journal.c.revision < bindparam("opened_revision"),
        journal.c.turn_id == bindparam("of_turn"),
        journal.c.trigger.in_((Trigger.REQUEST_LLM.value, Trigger.RETRY.value)),
    )
    .order_by(journal.c.revision.desc())
    .limit(1)
)
_FIRST_AND_LAST = (
    select(chunks.c.created_at)
    .where(
        chunks.c.message_key == bindparam("of_message"),
        or_(chunks.c.sequence == 1, chunks.c.sequence == bindparam("head")),
    )
    .order_by(chunks.c.sequence)
)
_INSERT_JOURNAL = insert(journal)
_INSERT_MESSAGE = insert(messages).returning(messages.c.key)
_INSERT_HEAD = insert(heads)
_INSERT_CHUNKS = insert(chunks)
_UPDATE_TURN = update(turns).where(turns.c.key == bindparam("of_turn"))
_UPDATE_CONTEXT = update(contexts).where(
    contexts.c.key == bindparam("of_context"),
    contexts.c.state == bindparam("from_state"),
    contexts.c.revision == bindparam("from_revision"),
)
_UPDATE_MESSAGE = update(messages).where(messages.c.key == bindparam("of_message"))


class LostRaceError(Refused):
    """Another process changed the context first. The caller may look again and retry."""


class MessageDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A message to be inserted. An open one has `status` streaming.

    `fence` guards its appends; a produced one (§7) also has the id of its producer.
    """

    id: str
    role: Role
    kind: str = TEXT
    status: MessageStatus = MessageStatus.STREAMING
    turn_id: str | None = None
    fence: int = 0
    texts: Sequence[str] = ()
    metadata: JsonObject = {}
    client_metadata: JsonObject = {}
    media_type: str = "text/plain"
    producer_id: str | None = None
    payload_hash: str | None = None
    finish_reason: str | None = None
    error: Problem | None = None
    superseded: bool = False


class ContextEdit:
    """Use: `edit = await ContextEdit.begin(…)`, changes, `await edit.save()`, all in one transaction."""

    def __init__(self, connection: AsyncConnection, row: AnyRow, clock: Clock) -> None:
        now = clock.now_ms()
        self.connection = connection
        self.elapsed_ms = clock.elapsed_ms  # since a time that was stored
        self.tree = Tree(connection, row.key, now)
        self.row = row
        self.now = now
        self.key: int = row.key
        self.context_id: str = row.id
        self.state = State(row.state)
        self.revision: int = row.revision
        self.record_revision: int = row.record_revision
        self.notices: list[Notice] = []
        self.started_turns: list[StartedTurn] = []
        self.stopped_turn_ids: list[str] = []
        self.turn_outcomes: list[str] = []  # how turns and calls ended, to be counted
        self.call_outcomes: list[str] = []
        self._columns: dict[str, Any] = {}
        self._journal: list[dict[str, Any]] = []
        self._turns: dict[int, dict[str, Any]] = {}  # columns that are not written yet, by keys
        self._phases: dict[int, dict[str, int]] = {}
        self._state_since: int = row.state_since
        self._message_count: int = row.message_count

    @classmethod
    async def begin(
        cls, connection: AsyncConnection, context_id: str, clock: Clock
    ) -> "ContextEdit":
        """Locks the context's row. Raises `ContextNotFound`."""
        found = await connection.execute(_CONTEXT.on(connection), {"context_id": context_id})
        row = found.one_or_none()
        if row is None:
            raise ContextNotFound(context_id)
        return cls(connection, row, clock)

    @classmethod
    async def begin_free(
        cls, connection: AsyncConnection, context_ids: Sequence[str], clock: Clock
    ) -> "list[ContextEdit]":
        """Locks those of these contexts that nobody else has locked; waits for none."""
        query = select(contexts).where(contexts.c.id.in_(context_ids)).order_by(contexts.c.key)
        rows = await connection.execute(query.with_for_update(skip_locked=True))
        return [cls(connection, row, clock) for row in rows]

    @property
    def busy(self) -> bool:
        """Whether a turn or a producer is at work."""
        return self.state not in REST_STATES

    @property
    def notice(self) -> Notice:
        """The change that is being made."""
        return self.notices[-1]

    def put(self, **columns: Any) -> None:
        """Columns of the context's row to be written by `save`."""
        self._columns.update(columns)

    def put_turn(self, key: int, **columns: Any) -> None:
        """Columns of a turn's row to be written by `write_turns`, at the latest by `save`."""
        self._turns.setdefault(key, {}).update(columns)

    def turn_value(self, turn: AnyRow, column: str) -> Any:
        """A column of a turn's row as it will be."""
        return self._turns.get(turn.key, {}).get(column, getattr(turn, column))

    async def write_turns(self) -> None:
        """Writes what was put; to be called before turns are looked for by what may have changed."""
        for key, columns in self._turns.items():
            await self.connection.execute(_UPDATE_TURN, {"of_turn": key, **columns})
        self._turns.clear()

    def change(self, *, record: bool = False) -> None:
        """Begins the next change; `record` says that it is one of the context's own record (§1)."""
        self.revision += 1
        if record:
            self.record_revision = self.revision
        self.notices.append(
            Notice(
                revision=self.revision,
                record_revision=self.record_revision,
                state=self.state.value,
                opened=[],
                closed=[],
            )
        )

    async def step(
        self,
        trigger: Trigger,
        *,
        turn: AnyRow | None = None,
        turn_id: str | None = None,
        state_detail: JsonObject | None = None,
        detail: JsonObject | None = None,
        record: bool = False,
    ) -> None:
        """A change that moves the machine. Raises `IllegalTransition`, and then changed nothing.

        `turn` gets the time in the state that is left added to its phases; `turn_id` only names one
        that is about to be inserted.
        """
        before, since = self.state, self._state_since
        self.state = advance(before, trigger)
        self.change(record=record)
        # A state that is entered and left in one transaction takes no time.
        duration = 0 if self._journal else self.elapsed_ms(since)
        self._state_since = self.now
        self.put(state=self.state.value, state_since=self.now, state_detail=state_detail or {})
        self._journal.append(
            {
                "context_key": self.key,
                "revision": self.revision,
                "turn_id": turn.id if turn is not None else turn_id,
                "trigger": trigger.value,
                "from_state": before.value,
                "to_state": self.state.value,
                "at": self.now,
                "duration_ms": duration,
                "detail": detail or {},
            }
        )
        if turn is not None and before not in REST_STATES:
            self._add_phase(turn, before, duration)

    async def save(self) -> None:
        """Writes the journal and the rows of turns and of the context.

        Raises `LostRaceError` when the context is not as the edit found it.
        """
        if not self.notices:
            return
        await self.write_turns()
        if self._journal:
            await self.connection.execute(_INSERT_JOURNAL, self._journal)
        result = await self.connection.execute(
            _UPDATE_CONTEXT,
            {
                "of_context": self.key,
                "from_state": self.row.state,
                "from_revision": self.row.revision,
                "revision": self.revision,
                "record_revision": self.record_revision,
                "message_count": self._message_count,
                "changed_at": max(self.now, self.row.changed_at),
                **self._columns,
            },
        )
        if result.rowcount != 1:
            raise LostRaceError(self.context_id)

    # Messages

    async def add_message(self, draft: MessageDraft, *, branch: str) -> OpenedMessage:
        """Inserts a message at the branch's leaf, which moves to it. Part of the current change."""
        tip = await self.tree.tip(branch)
        place = {
            "parent_id": tip.leaf_id,
            "segment_key": tip.segment_key,
            "depth": tip.leaf_depth + 1,
        }
        opened = await self._insert_message(draft, place)
        if not draft.superseded:
            await self.tree.move_leaf(branch, opened.key, tip.leaf_depth + 1)
        return opened

    async def add_queued_message(self, draft: MessageDraft, *, branch: str) -> OpenedMessage:
        """Inserts a message that gets its place in the tree when its turn starts (§3.1)."""
        await self.tree.tip(branch)
        return await self._insert_message(draft, {"queued_branch": branch})

    async def place_message(self, key: int, *, branch: str) -> None:
        """Gives a queued message its place at the branch's leaf, which moves to it."""
        tip = await self.tree.tip(branch)
        await self.connection.execute(
            update(messages)
            .where(messages.c.key == key)
            .values(
                parent_id=tip.leaf_id,
                segment_key=tip.segment_key,
                depth=tip.leaf_depth + 1,
                queued_branch=None,
                revision=self.revision,
                changed_at=self.now,
            )
        )
        await self.tree.move_leaf(branch, key, tip.leaf_depth + 1)

    async def close_messages(
        self,
        rows: Sequence[AnyRow],
        status: MessageStatus,
        *,
        finish_reason: str | None = None,
        usage: Usage | None = None,
        error: Problem | None = None,
        superseded: bool = False,
    ) -> None:
        """Closes open messages at their committed heads. `finish_reason` and `usage` go to the last."""
        for row in sorted(rows, key=lambda row: row.key):
            head = await self._close_head(row.key)
            last = row is rows[-1]
            stats = await self._stats(row, head)
            await self.connection.execute(
                _UPDATE_MESSAGE,
                {
                    "of_message": row.key,
                    "status": status.value,
                    "final_sequence": head.head,
                    "finish_reason": finish_reason if last else None,
                    "usage": usage if last else None,
                    "error": error,
                    "superseded": superseded,
                    "stats": stats,
                    "revision": self.revision,
                    "changed_at": self.now,
                    "completed_at": self.now,
                },
            )
            self._note_closed(row.key, row.id, row.role, row.kind, status, head.head)
        if superseded:
            self._message_count -= len(rows)

    async def open_rows(self, *, turn_id: str | None = None) -> Sequence[AnyRow]:
        """The context's open messages, in the order in which they were opened."""
        if turn_id is None:
            found = await self.connection.execute(_OPEN_MESSAGES, {"of_context": self.key})
        else:
            of_turn = {"of_context": self.key, "of_turn": turn_id}
            found = await self.connection.execute(_OPEN_OF_TURN, of_turn)
        return found.all()

    async def supersede(self, keys: Sequence[int]) -> None:
        """Takes closed messages out of the lists; they stay readable by their ids."""
        await self.connection.execute(
            update(messages)
            .where(messages.c.key.in_(keys))
            .values(
                superseded=True,
                queued_branch=None,
                revision=self.revision,
                changed_at=self.now,
            )
        )
        self._message_count -= len(keys)

    async def adopt(self, orphaned: Sequence[str], parent_id: str | None) -> None:
        """Hangs what was stored after superseded messages on what the conversation has before them."""
        await self.connection.execute(
            update(messages)
            .where(
                messages.c.context_key == self.key,
                messages.c.parent_id.in_(orphaned),
                ~messages.c.superseded,
            )
            .values(parent_id=parent_id, revision=self.revision, changed_at=self.now)
        )

    def note_added(self, added: Sequence[ClosedMessage]) -> None:
        """Closed messages that were inserted by statements of their own; part of the current change."""
        self.notice.closed.extend(added)
        self._message_count += len(added)

    async def _insert_message(self, draft: MessageDraft, place: dict[str, Any]) -> OpenedMessage:
        closed = draft.status is not MessageStatus.STREAMING
        sizes = [utf8_bytes(value) for value in draft.texts]
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        characters = sum(len(value) for value in draft.texts)
        inserted = await self.connection.execute(
            _INSERT_MESSAGE,
            {
                "context_key": self.key,
                "id": draft.id,
                "turn_id": draft.turn_id,
                "superseded": draft.superseded,
                "revision": self.revision,
                "opened_revision": self.revision,
                "role": draft.role.value,
                "kind": draft.kind,
                "status": draft.status.value,
                "final_sequence": len(sizes) if closed else None,
                "media_type": draft.media_type,
                "finish_reason": draft.finish_reason,
                "error": draft.error,
                "metadata": draft.metadata,
                "client_metadata": draft.client_metadata,
                "stats": stats_at_once(chunks=len(sizes), characters=characters, size=sum(sizes))
                if closed
                else None,
                "payload_hash": draft.payload_hash,
                "created_at": self.now,
                "changed_at": self.now,
                "completed_at": self.now if closed else None,
                **place,
            },
        )
        key: int = inserted.scalar_one()
        await self.connection.execute(
            _INSERT_HEAD,
            {
                "message_key": key,
                "is_open": not closed,
                "head": len(sizes),
                "bytes": sum(sizes),
                "characters": characters,
                "fence": draft.fence,
                "producer_id": draft.producer_id,
                "written_at": self.now,
            },
        )
        await self._insert_chunks(key, draft.texts, ends)
        opened = OpenedMessage(
            key=key,
            id=draft.id,
            role=draft.role.value,
            kind=draft.kind,
            texts=list(draft.texts),
            ends=ends,
            status=draft.status,
            produced=draft.producer_id is not None,
        )
        self.notice.opened.append(opened)
        if not draft.superseded:
            self._message_count += 1
        if closed:
            self._note_closed(key, draft.id, draft.role.value, draft.kind, draft.status, len(sizes))
        return opened

    async def _insert_chunks(self, key: int, texts: Sequence[str], ends: Sequence[int]) -> None:
        if not texts:
            return
        await self.connection.execute(
            _INSERT_CHUNKS,
            [
                {
                    "message_key": key,
                    "sequence": index + 1,
                    "content": content,
                    "end_bytes": end,
                    "created_at": self.now,
                }
                for index, (content, end) in enumerate(zip(texts, ends, strict=True))
            ],
        )

    async def _close_head(self, key: int) -> AnyRow:
        """After this no append of any writer can match the row again."""
        close = _CLOSE_HEAD.on(self.connection)
        result = await self.connection.execute(close, {"of_message": key})
        row: AnyRow = result.one()
        return row

    async def _stats(self, row: AnyRow, head: AnyRow) -> MessageStats:
        began = await self._began_at(row)
        ends = {"of_message": row.key, "head": head.head}
        span = (await self.connection.execute(_FIRST_AND_LAST, ends)).scalars().all()
        total_ms, ages = self.elapsed_ms(began), [self.elapsed_ms(at) for at in span]
        first_ms = max(0, total_ms - ages[0]) if ages else None
        interval = max(0, ages[0] - ages[-1]) / (head.head - 1) if head.head > 1 else None
        return MessageStats(
            chunks=head.head,
            characters=head.characters,
            bytes=head.bytes,
            first_chunk_ms=first_ms,
            total_ms=total_ms,
            mean_interval_ms=round(interval, 3) if interval is not None else None,
        )

    async def _began_at(self, row: AnyRow) -> int:
        """When the model was asked for this message; of one without a turn, when it was opened."""
        if row.turn_id is None:
            return int(row.created_at)
        asked: int | None = await self.connection.scalar(
            _ASKED_AT,
            {
                "of_context": self.key,
                "opened_revision": row.opened_revision,
                "of_turn": row.turn_id,
            },
        )
        return int(row.created_at) if asked is None else asked

    def _note_closed(
        self, key: int, id_: str, role: str, kind: str, status: MessageStatus, final: int
    ) -> None:
        self.notice.closed.append(
            ClosedMessage(key=key, id=id_, role=role, kind=kind, status=status, final=final)
        )

    def _add_phase(self, turn: AnyRow, state: State, duration: int) -> None:
        """Adds to the turn's own account, which a step before may have changed."""
        phases = self._phases.setdefault(turn.key, stored_phases(turn))
        phases[state.value] = phases.get(state.value, 0) + duration
        self.put_turn(turn.key, phases=phases)


def stats_at_once(*, chunks: int, characters: int, size: int) -> MessageStats:
    """Of a message whose text, of `size` bytes, came all at once."""
    return MessageStats(
        chunks=chunks,
        characters=characters,
        bytes=size,
        first_chunk_ms=0 if chunks else None,
        total_ms=0,
        mean_interval_ms=None,
    )
