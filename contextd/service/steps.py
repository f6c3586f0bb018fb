"""The steps of a turn, each one transaction (§5, §6).

A turn is owned by one process at a time: its row names the owner and a *fence*, and every step first
checks both under the context's lock. A cancel, a take-over or a deletion ends that ownership in one
transaction; whoever still works on the turn finds its next step refused (`TurnLostError`) and its
next append refused by the message's closed head.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, bindparam, func, insert, select

from contextd.core.machine import WAITING_STATES, State, Trigger
from contextd.core.message import MessageStatus, Problem, Role, Usage
from contextd.core.tool_call import TOOL_CALL, TOOL_RESULT
from contextd.core.turn import CancelAnswer, LeftOut, TurnStatus
from contextd.core.values import JsonObject
from contextd.service.ledger import Ledger
from contextd.service.turn_rows import (
    QUEUED,
    RUNNING,
    add_references,
    add_usage,
    cancel_calls,
    find_opened,
    find_tries,
    find_turn,
    interrupt_messages,
    is_overtaken,
    last_said,
    leave_behind,
    referred_paths,
    running_turn,
)
from contextd.store.appends import utf8_bytes
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.notices import StartedTurn
from contextd.store.stored import stored_phases
from contextd.store.tables import AnyRow, messages, turns
from contextd.store.tail import LiveMessage
from contextd.store.writer import Refused

# Where an end changes what the context shows of its calls (§4).
CALL_STATES = WAITING_STATES | {State.PROCESSING_LLM_RESPONSE, State.EXECUTING_TOOLS}

OVERTAKEN = Problem(
    type="overtaken", message="Another message was sent on the branch before this retry began."
)


_TURN = select(turns).where(turns.c.key == bindparam("of_turn"))
_NEXT_QUEUED = (
    select(turns)
    .where(turns.c.context_key == bindparam("of_context"), turns.c.status == QUEUED)
    .order_by(turns.c.queue_position)
    .limit(1)
)
_INSERT_TURN = insert(turns).returning(turns.c.key)


class TurnLostError(Refused):
    """The turn is not this process's any more: cancelled, ended, deleted or taken over."""


class TurnView(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent loop needs to know of its turn to go on."""

    state: State
    attempt: int
    worked_ms: int
    branch: str
    context: AnyRow
    paths: list[str] = []  # that the user's message refers to, until they are attached


class Steps:
    """Moves turns. Times are milliseconds."""

    def __init__(self, ledger: Ledger, *, attempts_max: int) -> None:
        self._ledger = ledger
        self.attempts_max = attempts_max

    # What the agent loop does with its own turn.

    async def view(self, turn: StartedTurn) -> TurnView:
        """Where the turn stands. Raises `TurnLostError`."""

        async def work(edit: ContextEdit) -> TurnView:
            row = await self.own(edit, turn)
            return msgspec.structs.replace(_view(edit, row), paths=await referred_paths(edit, row))

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def take_up(self, turn: StartedTurn) -> TurnView:
        """The same; and asks the model at once where nothing is to be done before."""

        async def work(edit: ContextEdit) -> TurnView:
            row = await self.own(edit, turn)
            paths = await referred_paths(edit, row)
            if edit.state is State.PROCESSING_USER_MESSAGE and not paths:
                return await self.request_llm_in(edit, row)
            return msgspec.structs.replace(_view(edit, row), paths=paths)

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def note_left_out(self, turn: StartedTurn, left_out: LeftOut) -> None:
        """Says on the turn what the model is not shown."""

        async def work(edit: ContextEdit) -> None:
            row = await self.own(edit, turn)
            if row.left_out == msgspec.to_builtins(left_out):
                return
            edit.change(record=True)
            edit.put_turn(row.key, left_out=left_out)

        await self._ledger.edit(turn.context_id, work)

    async def add_references(self, turn: StartedTurn, files: Sequence[tuple[str, str]]) -> None:
        """Stores what the files of the user's message hold: hidden results that the model sees."""

        async def work(edit: ContextEdit) -> None:
            row = await self.own(edit, turn)
            message_id = await edit.connection.scalar(
                select(messages.c.id).where(messages.c.key == row.user_message_key)
            )
            edit.change()
            await add_references(
                edit,
                files,
                new_id=self._ledger.new_id,
                message_id=message_id or "",
                turn_id=turn.id,
                branch=row.branch,
            )

        await self._ledger.edit(turn.context_id, work)

    async def request_llm(self, turn: StartedTurn) -> TurnView:
        """Asks the model, or asks again: after a transient failure this is the next attempt."""

        async def work(edit: ContextEdit) -> TurnView:
            return await self.request_llm_in(edit, await self.own(edit, turn))

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def request_llm_in(self, edit: ContextEdit, row: AnyRow) -> TurnView:
        """The same inside an edit."""
        attempt = row.attempt + (edit.state is State.TRANSIENT_FAILURE)
        edit.put_turn(row.key, attempt=attempt)
        await edit.step(Trigger.REQUEST_LLM, turn=row, detail={"attempt": attempt})
        return msgspec.structs.replace(_view(edit, row), attempt=attempt)

    async def open_message(
        self,
        turn: StartedTurn,
        *,
        message_id: str,
        kind: str,
        texts: Sequence[str],
        metadata: JsonObject | None = None,
        again: bool = False,
    ) -> LiveMessage:
        """Opens a message of the reply with its first chunks; the reply's first is `first_chunk`.

        `again`: nobody knows whether the same was stored before.
        """

        async def work(edit: ContextEdit) -> tuple[int, int]:
            row = await self.own(edit, turn)
            if again and (opened := await find_opened(edit, message_id)) is not None:
                return opened.key, opened.opened_revision
            if edit.state is State.AWAITING_LLM_RESPONSE:
                await edit.step(Trigger.FIRST_CHUNK, turn=row)
            else:
                edit.change()
            if row.first_chunk_ms is None:
                elapsed = edit.elapsed_ms(row.started_at or edit.now)
                edit.put_turn(row.key, first_chunk_ms=elapsed)
            draft = MessageDraft(
                id=message_id,
                role=Role.ASSISTANT,
                kind=kind,
                turn_id=turn.id,
                fence=turn.fence,
                texts=texts,
                metadata=metadata or {},
            )
            return (await edit.add_message(draft, branch=row.branch)).key, edit.revision

        _, (key, opened_revision) = await self._ledger.edit(turn.context_id, work)
        live = self._ledger.tail.get(turn.context_id, message_id)
        if live is None:  # the tail is full of newer chunks: keep writing, readers use SQL
            live = LiveMessage(
                context_id=turn.context_id,
                message_id=message_id,
                message_key=key,
                role=Role.ASSISTANT.value,
                kind=kind,
                opened_revision=opened_revision,
            )
            live.skip_to(len(texts), sum(utf8_bytes(content) for content in texts))
        return live

    async def finish_in(self, edit: ContextEdit, row: AnyRow, *, has_said: bool = False) -> None:
        """The turn is done; the next queued one starts in the same transaction.

        `has_said`: a message of this very reply tells of its end.
        """
        await edit.step(Trigger.FINISH, turn=row)
        await self._close_turn(edit, row, TurnStatus.COMPLETED, None, has_said=has_said)
        await self.start_next(edit)

    async def fail_transiently(
        self, turn: StartedTurn, error: Problem, *, wait_ms: int, usage: Usage | None
    ) -> None:
        """This attempt broke: what it wrote is closed as `interrupted` and leaves the lists.

        A second time it changes nothing.
        """

        async def work(edit: ContextEdit) -> None:
            row = await self.own(edit, turn)
            if edit.state is State.TRANSIENT_FAILURE:
                return
            detail = {
                "attempt": row.attempt,
                "attempts_max": self.attempts_max,
                "wait_ms": wait_ms,
                "error": msgspec.to_builtins(error),
            }
            await edit.step(Trigger.FAIL_TRANSIENTLY, turn=row, state_detail=detail, detail=detail)
            await interrupt_messages(edit, row, error)
            add_usage(edit, row, usage)

        await self._ledger.edit(turn.context_id, work)

    async def fail(self, turn: StartedTurn, error: Problem, *, usage: Usage | None = None) -> None:
        """The turn has failed; what it wrote stays, closed as `failed`."""

        async def work(edit: ContextEdit) -> None:
            row = await self.own(edit, turn)
            add_usage(edit, row, usage)
            await self.fail_in(edit, row, error)

        await self._ledger.edit(turn.context_id, work)

    async def fail_in(self, edit: ContextEdit, row: AnyRow, error: Problem) -> None:
        """Fails a turn inside an edit; the next queued one starts."""
        detail = {"turn_id": row.id, "error": msgspec.to_builtins(error)}
        await edit.step(
            Trigger.FAIL,
            turn=row,
            state_detail=detail,
            detail=detail,
            record=edit.state in CALL_STATES,
        )
        await self._close_turn(edit, row, TurnStatus.FAILED, error)
        await self.start_next(edit)

    # What anybody may do to a turn.

    async def cancel(self, context_id: str, turn_id: str | None) -> CancelAnswer:
        """Ends the running turn, if it is the one that is meant (§6), or what is produced (§7)."""

        async def work(edit: ContextEdit) -> CancelAnswer:
            if edit.state is State.PRODUCING and turn_id is None:
                await self.stop_producers(edit)
                await self.start_next(edit)
                return CancelAnswer(state=edit.state, cancelled_turn_id=None)
            row = await running_turn(edit)
            if row is None or turn_id not in (None, row.id):
                return CancelAnswer(state=edit.state, cancelled_turn_id=None)
            await self.cancel_in(edit, row)
            await self.start_next(edit)
            return CancelAnswer(state=edit.state, cancelled_turn_id=row.id)

        return (await self._ledger.edit(context_id, work))[1]

    async def cancel_in(self, edit: ContextEdit, row: AnyRow) -> None:
        """Cancels a running turn inside an edit, and starts no other."""
        await edit.step(Trigger.CANCEL, turn=row, record=edit.state in CALL_STATES)
        await self._close_turn(edit, row, TurnStatus.CANCELLED, None)
        edit.stopped_turn_ids.append(row.id)

    async def stop_producers(self, edit: ContextEdit) -> None:
        """Closes what is being produced; a producer hears it at its next write. Starts no turn."""
        await edit.step(Trigger.CANCEL)
        await edit.close_messages(await edit.open_rows(), MessageStatus.CANCELLED)

    async def cancel_turn(self, context_id: str, turn_id: str) -> CancelAnswer:
        """Like `cancel`, and also takes a queued turn out. Raises `TurnNotFound`."""

        async def work(edit: ContextEdit) -> CancelAnswer:
            row = await find_turn(edit, turn_id)
            if row.status == RUNNING:
                await self.cancel_in(edit, row)
                await self.start_next(edit)
            elif row.status == QUEUED:
                edit.change(record=True)
                if row.retry_of is None:  # the message of a retry has had its place before
                    await edit.supersede([row.user_message_key])
                await self._close_turn(edit, row, TurnStatus.CANCELLED, None)
            else:
                return CancelAnswer(state=edit.state, cancelled_turn_id=None)
            return CancelAnswer(state=edit.state, cancelled_turn_id=turn_id)

        return (await self._ledger.edit(context_id, work))[1]

    # How turns begin and end, inside an edit.

    async def add_turn(
        self,
        edit: ContextEdit,
        *,
        turn_id: str,
        branch: str,
        user_message_key: int,
        retry_of: str | None = None,
        from_start: bool = False,
        queued: bool = False,
    ) -> None:
        """Inserts a turn: running and owned by this process, or at the queue's end."""
        position = None
        if queued:
            last = await edit.connection.scalar(
                select(func.max(turns.c.queue_position)).where(turns.c.context_key == edit.key)
            )
            position = (last or 0) + 1
        inserted = await edit.connection.execute(
            _INSERT_TURN,
            {
                "context_key": edit.key,
                "id": turn_id,
                "branch": branch,
                "user_message_key": user_message_key,
                "status": QUEUED if queued else RUNNING,
                "queue_position": position,
                "owner_id": None if queued else self._ledger.owner_id,
                "fence": 1,
                "attempt": 1,
                "retry_of": retry_of,
                "from_start": from_start,
                "started_at": None if queued else edit.now,
                "phases": {},
                "created_at": edit.now,
            },
        )
        if not queued:
            self.announce(edit, inserted.scalar_one(), turn_id, fence=1)

    async def start_next(self, edit: ContextEdit) -> None:
        """Starts the turn that has waited longest, if the context is at rest and one waits.

        A retry that another message has overtaken meanwhile is not started: it is cancelled.
        """
        while not edit.busy:
            found = await edit.connection.execute(_NEXT_QUEUED, {"of_context": edit.key})
            row = found.one_or_none()
            if row is None:
                return
            if row.retry_of is not None and await is_overtaken(edit, row):
                edit.change(record=True)
                await self._close_turn(edit, row, TurnStatus.CANCELLED, OVERTAKEN)
            else:
                await self._start_queued(edit, row)

    async def _start_queued(self, edit: ContextEdit, row: AnyRow) -> None:
        await edit.step(Trigger.RECEIVE_MESSAGE, turn=row, record=True)
        if row.retry_of is None:
            await edit.place_message(row.user_message_key, branch=row.branch)
        else:
            tries = await find_tries(edit, row.user_message_key)
            earlier = [one for one in tries if one.key != row.key]
            await leave_behind(edit, earlier, from_start=row.from_start)
        edit.put_turn(row.key, status=RUNNING, owner_id=self._ledger.owner_id, started_at=edit.now)
        self.announce(edit, row.key, row.id, fence=row.fence)

    async def claim(self, edit: ContextEdit, row: AnyRow) -> None:
        """Makes this process the owner of a running turn; who owned it before is fenced off."""
        fence = row.fence + 1
        edit.put_turn(row.key, owner_id=self._ledger.owner_id, fence=fence)
        self.announce(edit, row.key, row.id, fence=fence)

    def announce(self, edit: ContextEdit, key: int, turn_id: str, *, fence: int) -> None:
        edit.put(active_turn_key=key)
        edit.started_turns.append(
            StartedTurn(context_id=edit.context_id, id=turn_id, key=key, fence=fence)
        )

    async def _close_turn(
        self,
        edit: ContextEdit,
        row: AnyRow,
        status: TurnStatus,
        error: Problem | None,
        *,
        has_said: bool = False,
    ) -> None:
        """The turn's one end. Unless a message tells of it, it gets an empty one that does (§6)."""
        if not (has_said or await self._close_messages(edit, row, status, error)):
            draft = MessageDraft(
                id=self._ledger.new_id(),
                role=Role.ASSISTANT,
                status=MessageStatus(status.value),
                turn_id=row.id,
                finish_reason=edit.turn_value(row, "finish_reason")
                if status is TurnStatus.COMPLETED
                else None,
                error=error,
                # A turn that never started has no place in the conversation.
                superseded=row.status == QUEUED,
            )
            await edit.add_message(draft, branch=row.branch)
        edit.turn_outcomes.append(status.value)
        if status is not TurnStatus.COMPLETED:
            await cancel_calls(edit, row.id)
        edit.put_turn(
            row.key,
            status=status.value,
            error=error,
            ended_at=edit.now,
            owner_id=None,
            queue_position=None,
            fence=row.fence + 1,
        )
        await edit.write_turns()  # what follows looks for the next one

    async def _close_messages(
        self, edit: ContextEdit, row: AnyRow, status: TurnStatus, error: Problem | None
    ) -> bool:
        """Closes what the turn was writing; says whether its messages tell of its end.

        Calls of tools and results do where it completed, over its limit: else their answer never came.
        """
        if status is TurnStatus.COMPLETED:  # then nothing is open
            return await last_said(edit, row) is not None
        rows = await edit.open_rows(turn_id=row.id)
        await edit.close_messages(rows, MessageStatus(status.value), error=error)
        return bool(rows) or await last_said(edit, row) not in (None, TOOL_CALL, TOOL_RESULT)

    async def own(self, edit: ContextEdit, turn: StartedTurn, query: Select[Any] = _TURN) -> AnyRow:
        """The turn's row, by a query for the key `of_turn`. Raises `TurnLostError` if it is not ours."""
        found = await edit.connection.execute(query, {"of_turn": turn.key})
        row: AnyRow | None = found.one_or_none()
        mine = row is not None and row.owner_id == self._ledger.owner_id
        if row is None or not mine or row.status != RUNNING or row.fence != turn.fence:
            raise TurnLostError(turn.id)
        return row


def _view(edit: ContextEdit, row: AnyRow) -> TurnView:
    return TurnView(
        state=edit.state,
        attempt=row.attempt,
        worked_ms=sum(
            ms for state, ms in stored_phases(row).items() if state not in WAITING_STATES
        ),
        branch=row.branch,
        context=edit.row,
    )
