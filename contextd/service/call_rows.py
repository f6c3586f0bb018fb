"""Rows of tool calls, inside an edit: what the loop's steps and people's decisions share (§8)."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import func, select, update

from contextd.core.errors import ToolCallNotFound
from contextd.core.machine import Trigger
from contextd.core.message import MessageStatus, Role
from contextd.core.tool_call import TOOL_RESULT, ToolCallStatus
from contextd.store.appends import utf8_bytes
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.tables import AnyRow, tool_calls


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended, and what the model is told."""

    status: ToolCallStatus
    content: str
    error: str | None = None


class Results:
    """Stores results as messages, in chunks of at most `chunk_bytes_max` of UTF-8."""

    def __init__(self, *, new_id: Callable[[], str], chunk_bytes_max: int) -> None:
        self._new_id = new_id
        self._chunk_bytes_max = chunk_bytes_max

    async def add(
        self, edit: ContextEdit, turn: AnyRow, call: AnyRow, outcome: CallOutcome
    ) -> None:
        """Closes the call with its result, a message at the turn's branch."""
        metadata = {"tool_call_id": call.id, "name": call.name}
        if outcome.error is not None:
            metadata["error"] = outcome.error
        opened = await edit.add_message(
            MessageDraft(
                id=self._new_id(),
                role=Role.TOOL,
                kind=TOOL_RESULT,
                status=MessageStatus.COMPLETED,
                turn_id=turn.id,
                texts=split_text(outcome.content, self._chunk_bytes_max),
                metadata=metadata,
            ),
            branch=turn.branch,
        )
        await update_call(
            edit,
            call.key,
            status=outcome.status.value,
            error=outcome.error,
            result_message_key=opened.key,
            ended_at=edit.now
            if call.started_at is None
            else call.started_at + edit.elapsed_ms(call.started_at),
        )
        edit.call_outcomes.append(outcome.status.value)


def split_text(content: str, bytes_max: int) -> list[str]:
    """As chunks of at most `bytes_max` of UTF-8; none of nothing."""
    if utf8_bytes(content) <= bytes_max:
        return [content] if content else []
    step = max(1, bytes_max // 4)  # a character is four bytes at most
    return [content[at : at + step] for at in range(0, len(content), step)]


async def find_call(edit: ContextEdit, tool_call_id: str) -> AnyRow:
    """Raises `ToolCallNotFound`."""
    query = select(tool_calls).where(
        tool_calls.c.context_key == edit.key, tool_calls.c.id == tool_call_id
    )
    row = (await edit.connection.execute(query)).one_or_none()
    if row is None:
        raise ToolCallNotFound(tool_call_id)
    return row


async def call_by_key(edit: ContextEdit, key: int) -> AnyRow:
    row: AnyRow = (
        await edit.connection.execute(select(tool_calls).where(tool_calls.c.key == key))
    ).one()
    return row


async def spent(edit: ContextEdit, turn_id: str) -> tuple[int, int]:
    """Rounds and calls that the turn has had."""
    row = (
        await edit.connection.execute(
            select(func.max(tool_calls.c.round), func.count()).where(
                tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn_id
            )
        )
    ).one()
    return row[0] or 0, row[1]


async def calls_of_round(edit: ContextEdit, turn_id: str) -> Sequence[AnyRow]:
    """The calls of the turn's last reply; none if it asked for none."""
    rows: Sequence[AnyRow] = (
        await edit.connection.execute(
            select(tool_calls)
            .where(tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn_id)
            .where(~tool_calls.c.collected)
            .order_by(tool_calls.c.key)
        )
    ).all()
    return rows


async def collect_round(edit: ContextEdit, turn: AnyRow) -> None:
    """All calls of the round have their results."""
    await edit.step(Trigger.COLLECT_RESULTS, turn=turn)
    await edit.connection.execute(
        update(tool_calls)
        .where(tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn.id)
        .values(collected=True)
    )


async def update_call(edit: ContextEdit, key: int, **values: Any) -> None:
    await edit.connection.execute(
        update(tool_calls).where(tool_calls.c.key == key).values(**values)
    )


def release(edit: ContextEdit, turn: AnyRow) -> None:
    """The turn waits for somebody outside: it has no owner until it is claimed again."""
    edit.put_turn(turn.key, owner_id=None)
