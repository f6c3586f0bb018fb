"""Trying a turn again: a new turn for the same message, which goes on after what the others did (§6)."""

from collections.abc import Sequence

from sqlalchemy import select

from contextd.core.errors import IllegalTransition, QueueFull
from contextd.core.machine import State, Trigger, advance, allowed
from contextd.core.turn import RetryAnswer, RetryRequest, TurnStatus
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps
from contextd.service.turn_rows import (
    QUEUED,
    RUNNING,
    find_tries,
    find_turn,
    is_followed,
    leave_behind,
    queue_length,
)
from contextd.store.edit import ContextEdit
from contextd.store.tables import AnyRow, messages, turns

GO_ON = RetryRequest()


class Retries:
    """Tries turns again. At most `queue_max` turns of a context wait."""

    def __init__(self, ledger: Ledger, steps: Steps, *, queue_max: int) -> None:
        self._ledger = ledger
        self._steps = steps
        self._queue_max = queue_max

    async def retry(self, context_id: str, request: RetryRequest = GO_ON) -> RetryAnswer:
        """A new turn for the message whose turn failed last.

        Raises `BranchNotFound`, and `IllegalTransition` from any state but `failed`.
        """

        async def work(edit: ContextEdit) -> RetryAnswer:
            advance(edit.state, Trigger.RETRY)
            query = select(turns).where(turns.c.key == edit.row.active_turn_key)
            failed = (await edit.connection.execute(query)).one()  # only a turn's end leads here
            await edit.tree.require(failed.branch, failed.user_message_key)
            tries = await find_tries(edit, failed.user_message_key)
            return await self._start(edit, failed, tries, request)

        return (await self._ledger.edit(context_id, work))[1]

    async def retry_turn(
        self, context_id: str, turn_id: str, request: RetryRequest = GO_ON
    ) -> RetryAnswer:
        """The same for a turn that failed or was cancelled; queued while the context is busy.

        Raises `TurnNotFound`, `BranchNotFound`, `QueueFull`, and `IllegalTransition` where the turn has
        not ended so, its message is answered or tried again, or is not the last of its branch.
        """

        async def work(edit: ContextEdit) -> RetryAnswer:
            row = await find_turn(edit, turn_id)
            tries = await find_tries(edit, row.user_message_key)
            await _check(edit, row, tries)
            if not edit.busy:
                return await self._start(edit, row, tries, request)
            if await queue_length(edit) >= self._queue_max:
                raise QueueFull(f"{self._queue_max} turns are queued already.")
            edit.change(record=True)
            return await self._add(edit, self._ledger.new_id(), row, request, queued=True)

        return (await self._ledger.edit(context_id, work))[1]

    async def _start(
        self, edit: ContextEdit, row: AnyRow, tries: Sequence[AnyRow], request: RetryRequest
    ) -> RetryAnswer:
        turn_id = self._ledger.new_id()
        if edit.state is State.FAILED and row.key == edit.row.active_turn_key:
            await edit.step(Trigger.RETRY, turn_id=turn_id, detail={"retry_of": row.id})
        else:
            await edit.step(Trigger.RECEIVE_MESSAGE, turn_id=turn_id)
        await leave_behind(edit, tries, from_start=request.from_start)
        return await self._add(edit, turn_id, row, request, queued=False)

    async def _add(
        self, edit: ContextEdit, turn_id: str, row: AnyRow, request: RetryRequest, *, queued: bool
    ) -> RetryAnswer:
        await self._steps.add_turn(
            edit,
            turn_id=turn_id,
            branch=row.branch,
            user_message_key=row.user_message_key,
            retry_of=row.id,
            from_start=request.from_start,
            queued=queued,
        )
        return RetryAnswer(turn_id=turn_id, state=edit.state, revision=edit.revision)


async def _check(edit: ContextEdit, row: AnyRow, tries: Sequence[AnyRow]) -> None:
    if row.status not in (TurnStatus.FAILED, TurnStatus.CANCELLED):
        raise _refusal(
            edit, f"The turn is {row.status}; only a failed or cancelled one can be tried again."
        )
    for other in tries:
        if other.status in (RUNNING, QUEUED):
            detail = (
                f"Its message is tried again already: wait for turn {other.id}, or cancel that."
            )
            raise _refusal(edit, detail)
        if other.status == TurnStatus.COMPLETED:
            detail = f"Its message was answered by turn {other.id}; to have another answer, send it again."
            raise _refusal(edit, detail)
    taken_out = await edit.connection.scalar(
        select(messages.c.superseded).where(messages.c.key == row.user_message_key)
    )
    if taken_out:
        raise _refusal(edit, "Its message was taken out of the queue; send it again.")
    await edit.tree.require(row.branch, row.user_message_key)
    if await is_followed(edit, row):
        detail = (
            "Its message is not the last of the user's on its branch; to have an answer to it,"
            " send it again from the message before it (parent_id)."
        )
        raise _refusal(edit, detail)


def _refusal(edit: ContextEdit, detail: str) -> IllegalTransition:
    return IllegalTransition(
        state=edit.state.value,
        trigger=Trigger.RETRY.value,
        allowed=[name.value for name in allowed(edit.state)],
        detail=detail,
    )
