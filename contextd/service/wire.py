"""Rows of the store as the values that clients see."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from contextd.core.context import Context, OpenMessage
from contextd.core.errors import InvalidRequest
from contextd.core.machine import REST_STATES
from contextd.core.message import Message, MessageStats, MessageStatus, Problem, Role
from contextd.core.tool_call import OUTCOME_UNKNOWN, ToolCall, ToolCallStatus
from contextd.core.turn import JournalEntry, LeftOut, Turn, TurnStatus
from contextd.core.values import timestamp
from contextd.store.reader import ContextSnapshot
from contextd.store.stored import (
    stored,
    stored_object,
    stored_phases,
    stored_policy,
    stored_usage,
)
from contextd.store.tables import AnyRow

# Of lists whose places are one number and two.
CURSOR_PATTERNS = {1: "^[0-9]{1,18}$", 2: r"^[0-9]{1,18}\.[0-9]{1,18}$"}


def _moment(epoch_ms: int | None) -> str | None:
    return None if epoch_ms is None else timestamp(epoch_ms)


def context_wire(
    snapshot: ContextSnapshot, *, cursor: str, default_provider: str, tools: list[Any]
) -> Context:
    """A Context (§2). `cursor` is the stream's cursor at this snapshot's revision."""
    row = snapshot.row
    busy = row.state not in REST_STATES
    return Context(
        id=row.id,
        title=row.title,
        state=row.state,
        state_detail=stored_object(row, "state_detail"),
        revision=row.revision,
        record_revision=row.record_revision,
        stream_cursor=cursor,
        mode=row.mode,
        active_branch=row.active_branch,
        system_prompt=row.system_prompt,
        provider=row.provider or default_provider,
        model=row.model,
        tools=tools,
        approval_policy=stored_policy(row),
        on_busy=row.on_busy,
        metadata=stored_object(row, "metadata"),
        message_count=row.message_count,
        open_messages=[
            OpenMessage(
                message_id=message.id,
                role=message.role,
                kind=message.kind,
                current_sequence=message.head,
            )
            for message in snapshot.open_messages
        ],
        pending_tool_calls=list(snapshot.pending_call_ids),
        queued_messages=snapshot.queued,
        usage=stored_usage(row) or msgspec.UNSET,
        can_send=not (busy and row.on_busy == "reject"),
        created_at=timestamp(row.created_at),
        updated_at=timestamp(row.changed_at),
    )


def message_wire(row: AnyRow, context_id: str) -> Message:
    """A Message (§3) from its row with its head; without content."""
    return Message(
        id=row.id,
        context_id=context_id,
        turn_id=row.turn_id,
        parent_id=row.parent_id,
        role=stored(row, "role", Role, row.role),
        kind=row.kind,
        status=stored(row, "status", MessageStatus, row.status),
        current_sequence=row.head,
        final_sequence=row.final_sequence,
        media_type=row.media_type,
        finish_reason=row.finish_reason,
        usage=stored_usage(row),
        error=stored(row, "error", Problem),
        metadata=stored_object(row, "metadata"),
        client_metadata=stored_object(row, "client_metadata"),
        stats=stored(row, "stats", MessageStats),
        created_at=timestamp(row.created_at),
        completed_at=_moment(row.completed_at),
        epoch=msgspec.UNSET if row.producer_id is None else row.fence,
    )


def turn_wire(row: AnyRow, context_id: str, message_ids: Sequence[str]) -> Turn:
    """A Turn (§6)."""
    return Turn(
        id=row.id,
        context_id=context_id,
        branch=row.branch,
        status=stored(row, "status", TurnStatus, row.status),
        attempt=row.attempt,
        retry_of=row.retry_of,
        started_at=_moment(row.started_at),
        ended_at=_moment(row.ended_at),
        first_chunk_ms=row.first_chunk_ms,
        phases=stored_phases(row),
        message_ids=list(message_ids),
        finish_reason=row.finish_reason,
        usage=stored_usage(row),
        error=stored(row, "error", Problem),
        left_out=stored(row, "left_out", LeftOut, msgspec.UNSET),
    )


def tool_call_wire(row: AnyRow, context_id: str) -> ToolCall:
    """A ToolCall (§8)."""
    # Of a call that a crash interrupted nobody knows how long it ran.
    ran = row.started_at is not None and row.ended_at is not None and row.error != OUTCOME_UNKNOWN
    return ToolCall(
        id=row.id,
        context_id=context_id,
        turn_id=row.turn_id,
        message_id=row.message_id,
        name=row.name,
        arguments=None if row.arguments is None else stored_object(row, "arguments"),
        status=stored(row, "status", ToolCallStatus, row.status),
        requires_approval=row.requires_approval,
        external=row.external,
        result_message_id=row.result_id,
        error=row.error,
        duration_ms=max(0, row.ended_at - row.started_at) if ran else None,
        created_at=timestamp(row.created_at),
        decided_at=_moment(row.decided_at),
    )


def journal_wire(row: AnyRow) -> JournalEntry:
    """One step of the machine (§5)."""
    return JournalEntry(
        revision=row.revision,
        turn_id=row.turn_id,
        trigger=row.trigger,
        from_state=row.from_state,
        to_state=row.to_state,
        at=timestamp(row.at),
        duration_ms=row.duration_ms,
        detail=stored_object(row, "detail"),
    )


def encode_cursor(*position: int) -> str:
    """A place in a list, opaque to clients."""
    return ".".join(str(value) for value in position)


def decode_cursor(cursor: str | None, start: tuple[int, ...]) -> tuple[int, ...]:
    """The place that `encode_cursor` wrote, or `start` without one. Raises `InvalidRequest`."""
    if not cursor:
        return start
    if not re.fullmatch(CURSOR_PATTERNS[len(start)], cursor):
        raise InvalidRequest.of("cursor", "not a cursor of this list")
    return tuple(int(value) for value in cursor.split("."))
