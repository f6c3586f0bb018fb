"""Rows of turns, inside an edit: what those who move turns share (§6)."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update

from contextd.core.errors import TurnNotFound
from contextd.core.machine import State
from contextd.core.message import FILE_REFERENCE, MessageStatus, Problem, Role, Usage
from contextd.core.tool_call import ToolCallStatus
from contextd.core.turn import TurnStatus
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.stored import stored_object, stored_usage
from contextd.store.tables import AnyRow, messages, tool_calls, turns
from contextd.store.tree import find_path

RUNNING = TurnStatus.RUNNING.value
QUEUED = TurnStatus.QUEUED.value
CANCELLED = TurnStatus.CANCELLED.value  # of a call too
BEFORE_THE_ANSWER = (
    State.PROCESSING_USER_MESSAGE,
    State.AWAITING_LLM_RESPONSE,
    State.TRANSIENT_FAILURE,
)
UNDECIDED = tuple(
    status.value
    for status in (ToolCallStatus.PENDING, ToolCallStatus.APPROVED, ToolCallStatus.RUNNING)
)


async def running_turn(edit: ContextEdit, *columns: ColumnElement[Any]) -> AnyRow | None:
    """The context's running turn, if there is one, with further columns."""
    query = select(turns, *columns).where(
        turns.c.context_key == edit.key, turns.c.status == RUNNING
    )
    return (await edit.connection.execute(query)).one_or_none()


async def find_turn(edit: ContextEdit, turn_id: str) -> AnyRow:
    """Raises `TurnNotFound`."""
    query = select(turns).where(turns.c.context_key == edit.key, turns.c.id == turn_id)
    row = (await edit.connection.execute(query)).one_or_none()
    if row is None:
        raise TurnNotFound(turn_id)
    return row


async def find_opened(edit: ContextEdit, message_id: str) -> AnyRow | None:
    """The key of a message and the revision that it was opened at, if it is there."""
    query = select(messages.c.key, messages.c.opened_revision).where(
        messages.c.context_key == edit.key, messages.c.id == message_id
    )
    row: AnyRow | None = (await edit.connection.execute(query)).one_or_none()
    return row


async def find_tries(edit: ContextEdit, user_message_key: int) -> Sequence[AnyRow]:
    """The turns that were to answer this message, oldest first: each but the first is a retry."""
    query = select(turns).where(
        turns.c.context_key == edit.key, turns.c.user_message_key == user_message_key
    )
    rows: Sequence[AnyRow] = (await edit.connection.execute(query.order_by(turns.c.key))).all()
    return rows


async def is_followed(edit: ContextEdit, row: AnyRow) -> bool:
    """Whether a message of the user comes after the turn's on its branch, or waits to."""
    return await _is_followed_in_place(edit, row) or bool(
        await edit.connection.scalar(
            select(messages.c.key)
            .where(messages.c.context_key == edit.key, messages.c.queued_branch == row.branch)
            .where(~messages.c.superseded)
            .limit(1)
        )
    )


async def is_overtaken(edit: ContextEdit, row: AnyRow) -> bool:
    """Whether a later message of the turn's branch has had a turn, which went ahead of the queue."""
    return await _is_followed_in_place(edit, row, messages.c.turn_id.is_not(None))


async def _is_followed_in_place(
    edit: ContextEdit, row: AnyRow, *conditions: ColumnElement[bool]
) -> bool:
    """Whether a message that meets the conditions, of the user or of a turn, stands further down."""
    depth = await edit.connection.scalar(
        select(messages.c.depth).where(messages.c.key == row.user_message_key)
    )
    path = await find_path(edit.connection, edit.key, row.branch)
    asked = select(turns.c.user_message_key).where(turns.c.context_key == edit.key)
    later = select(messages.c.key).where(
        or_(messages.c.role == Role.USER.value, messages.c.key.in_(asked)), *conditions
    )
    return bool(await path.after(edit.connection, later, depth or 0, limit=1))


async def leave_behind(edit: ContextEdit, tries: Sequence[AnyRow], *, from_start: bool) -> None:
    """A retry starts: says of each earlier try how far the model is still shown it (§6)."""
    for row in tries:
        if from_start:
            kept_to: int | None = 0
        elif row.kept_to is None:
            kept_to = await _kept_to(edit, row.id)
        else:
            continue  # what the tries between them kept or left behind stays so
        edit.put_turn(row.key, kept_to=kept_to)


async def _kept_to(edit: ContextEdit, turn_id: str) -> int | None:
    """The last message of the turn's last round of which a call has a result, or was started.

    Null where the turn ended within that round: it wrote nothing after it.
    """
    rows = await edit.connection.execute(
        select(
            tool_calls.c.round,
            tool_calls.c.result_message_key,
            tool_calls.c.started_at,
            tool_calls.c.collected,
        ).where(tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn_id)
    )
    calls = rows.all()
    rounds = [call.round for call in calls if call.result_message_key or call.started_at]
    kept = [call for call in calls if call.round <= max(rounds, default=0)]
    if not all(call.collected for call in kept):
        return None
    return max((call.result_message_key for call in kept), default=0)


async def queue_length(edit: ContextEdit) -> int:
    """How many turns wait."""
    count = await edit.connection.scalar(
        select(func.count())
        .select_from(turns)
        .where(turns.c.context_key == edit.key, turns.c.status == QUEUED)
    )
    return count or 0


async def interrupt_messages(edit: ContextEdit, row: AnyRow, error: Problem) -> None:
    """Closes a broken attempt's messages and takes them out of the conversation."""
    rows = await edit.open_rows(turn_id=row.id)
    if not rows:
        return
    await edit.close_messages(rows, MessageStatus.INTERRUPTED, error=error, superseded=True)
    await edit.adopt([message.id for message in rows], rows[0].parent_id)
    await edit.tree.close_up(rows)


async def last_said(edit: ContextEdit, row: AnyRow) -> str | None:
    """The kind of the turn's last message, other than the user's and its files; null without one."""
    kind: str | None = await edit.connection.scalar(
        select(messages.c.kind)
        .where(messages.c.context_key == edit.key, messages.c.turn_id == row.id)
        .where(messages.c.key != row.user_message_key, ~messages.c.superseded)
        .where(messages.c.kind != FILE_REFERENCE)
        .order_by(messages.c.key.desc())
        .limit(1)
    )
    return kind


def add_usage(
    edit: ContextEdit, row: AnyRow, usage: Usage | None, *, finish_reason: str | None = None
) -> None:
    """What one request has cost, and why its answer ended."""
    if finish_reason:
        edit.put_turn(row.key, finish_reason=finish_reason)
    if usage is not None:
        edit.put_turn(row.key, usage=usage + (stored_usage(row) or Usage()))
        edit.put(usage=usage + (stored_usage(edit.row) or Usage()))


async def cancel_calls(edit: ContextEdit, turn_id: str) -> None:
    """Of a turn that ends before its calls did."""
    ended = await edit.connection.execute(
        update(tool_calls)
        .where(tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn_id)
        .where(tool_calls.c.status.in_(UNDECIDED))
        .values(status=CANCELLED, error="cancelled", ended_at=edit.now)
    )
    edit.call_outcomes += [CANCELLED] * ended.rowcount


async def add_references(
    edit: ContextEdit,
    files: Sequence[tuple[str, str]],
    *,
    new_id: Callable[[], str],
    message_id: str,
    turn_id: str | None,
    branch: str,
) -> None:
    """Stores what the files of a message hold, as part of the current change (§3.1)."""
    for path, text in files:
        draft = MessageDraft(
            id=new_id(),
            role=Role.TOOL,
            kind=FILE_REFERENCE,
            status=MessageStatus.COMPLETED,
            turn_id=turn_id,
            texts=[text],
            metadata={"hidden": True, "path": path, "message_id": message_id},
        )
        await edit.add_message(draft, branch=branch)


async def referred_paths(edit: ContextEdit, row: AnyRow) -> list[str]:
    """The paths of a user's message whose files have not been attached yet."""
    if edit.state not in BEFORE_THE_ANSWER:
        return []
    message = (
        await edit.connection.execute(
            select(messages.c.id, messages.c.kind, messages.c.metadata).where(
                messages.c.key == row.user_message_key
            )
        )
    ).one()
    if message.kind != FILE_REFERENCE:
        return []
    attached = await edit.connection.scalar(
        select(func.count())
        .select_from(messages)
        .where(messages.c.context_key == edit.key, messages.c.key != row.user_message_key)
        .where(messages.c.kind == FILE_REFERENCE, messages.c.role == Role.TOOL.value)
        .where(
            messages.c.turn_id.in_(
                select(turns.c.id).where(
                    turns.c.context_key == edit.key,
                    turns.c.user_message_key == row.user_message_key,
                )
            )
        )
    )
    if attached:
        return []
    paths = stored_object(message, "metadata").get("paths")
    return [str(path) for path in paths] if isinstance(paths, list) else []
