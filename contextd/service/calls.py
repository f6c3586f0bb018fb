"""What people and external tools do with calls: list, decide, post results (§8)."""

from collections.abc import Sequence
from typing import Any

from contextd.core.errors import (
    IllegalTransition,
    InvalidRequest,
    PayloadTooLarge,
    ToolCallDecided,
)
from contextd.core.machine import State, Trigger, allowed
from contextd.core.tool_call import (
    ToolCallPage,
    ToolCallStatus,
    ToolDecision,
    ToolResultRequest,
)
from contextd.service.call_rows import (
    CallOutcome,
    Results,
    calls_of_round,
    collect_round,
    find_call,
    update_call,
)
from contextd.service.contexts import check_size
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps
from contextd.service.toolset import Toolset
from contextd.service.turn_rows import find_turn
from contextd.service.wire import decode_cursor, encode_cursor, tool_call_wire
from contextd.store.appends import utf8_bytes
from contextd.store.edit import ContextEdit
from contextd.store.history import History
from contextd.store.tables import AnyRow
from contextd.store.text import read_whole
from contextd.tools.arguments import ArgumentChecker

_S = ToolCallStatus
# Before, other calls of the reply are not decided yet, and nothing of it may run (§8).
RESULT_STATES = frozenset({State.EXECUTING_TOOLS, State.AWAITING_TOOL_RESULTS})


class Calls:
    """Calls of tools, for whoever decides or answers them."""

    def __init__(
        self,
        ledger: Ledger,
        history: History,
        steps: Steps,
        *,
        toolset: Toolset,
        checker: ArgumentChecker,
        results: Results,
        arguments_bytes_max: int,
        result_bytes_max: int,
    ) -> None:
        self._ledger = ledger
        self._history = history
        self._steps = steps
        self._toolset = toolset
        self._checker = checker
        self._results = results
        self._arguments_bytes_max = arguments_bytes_max
        self._result_bytes_max = result_bytes_max

    async def list(
        self, context_id: str, *, statuses: Sequence[str], cursor: str | None, limit: int
    ) -> ToolCallPage:
        """Calls in the order in which they were asked for."""
        (after,) = decode_cursor(cursor, (0,))
        found = await self._history.tool_calls(
            context_id, statuses=statuses, after_key=after, limit=limit + 1
        )
        page = found[:limit]
        return ToolCallPage(
            items=[tool_call_wire(row, context_id) for row in page],
            next_cursor=encode_cursor(page[-1].key) if len(found) > limit else None,
        )

    async def decide(self, context_id: str, decisions: Sequence[ToolDecision]) -> State:
        """Decides calls, all or none; with the last one the turn goes on, here.

        The same again is harmless. Raises `ToolCallNotFound`, `ToolCallDecided`, and for arguments that
        the tool does not take `InvalidRequest` or `PayloadTooLarge`.
        """
        await self._check_edited(context_id, decisions)

        async def work(edit: ContextEdit) -> State:
            decided: set[str] = set()
            for decision in decisions:
                call = await find_call(edit, decision.tool_call_id)
                if call.status != _S.PENDING:
                    _check_same(call, decision)
                    continue
                if not decided:
                    edit.change(record=True)
                decided.add(call.turn_id)  # only the running turn has calls that wait
                await self._decide(edit, call, decision)
            if edit.state is State.AWAITING_TOOL_APPROVAL:
                for turn_id in decided:
                    await self._go_on(edit, turn_id)
            return edit.state

        return (await self._ledger.edit(context_id, work))[1]

    async def post_result(
        self, context_id: str, tool_call_id: str, request: ToolResultRequest
    ) -> State:
        """Takes the result of an external call; with the last one the turn goes on, here.

        The same again is harmless. Raises `ToolCallNotFound`, `ToolCallDecided` where the call has
        ended otherwise, `IllegalTransition` where no result of it is expected, `PayloadTooLarge`.
        """
        if utf8_bytes(request.content) > self._result_bytes_max:
            raise PayloadTooLarge(self._result_bytes_max, "a result")
        status = _S.FAILED if request.is_error else _S.SUCCEEDED
        outcome = CallOutcome(
            status=status,
            content=request.content,
            error="tool_error" if request.is_error else None,
        )

        async def work(edit: ContextEdit) -> State:
            call = await find_call(edit, tool_call_id)
            if call.result_message_key is not None or call.status == _S.CANCELLED:
                await self._check_repeated(edit, call, outcome)
                return edit.state
            expected = call.external and call.status == _S.APPROVED
            if not expected or edit.state not in RESULT_STATES:
                raise IllegalTransition(
                    state=edit.state.value,
                    trigger=Trigger.COLLECT_RESULTS.value,
                    allowed=[trigger.value for trigger in allowed(edit.state)],
                    detail="No result is expected: the call is not external, or not all is decided.",
                )
            row = await find_turn(edit, call.turn_id)
            edit.change(record=True)
            await self._results.add(edit, row, call, outcome)
            if edit.state is State.AWAITING_TOOL_RESULTS:
                await self._go_on(edit, call.turn_id)
            return edit.state

        return (await self._ledger.edit(context_id, work))[1]

    async def _check_edited(self, context_id: str, decisions: Sequence[ToolDecision]) -> None:
        edited = [
            (number, decision)
            for number, decision in enumerate(decisions)
            if decision.decision == "approve" and decision.arguments is not None
        ]
        if not edited:
            return
        context, calls = await self._history.calls_by_id(
            context_id, [decision.tool_call_id for _, decision in edited]
        )
        for number, decision in edited:
            check_size(decision.arguments, self._arguments_bytes_max, "the arguments of a call")
            call = calls.get(decision.tool_call_id)
            if call is None or decision.arguments is None:
                continue
            schema = self._toolset.schema(context, call.name) or {}  # its tool may be gone by now
            problems = await self._checker.check(schema, decision.arguments)
            if problems:
                raise InvalidRequest.of(f"decisions[{number}].arguments", "; ".join(problems))

    async def _decide(self, edit: ContextEdit, call: AnyRow, decision: ToolDecision) -> None:
        if decision.decision == "approve":
            values: dict[str, Any] = {"status": _S.APPROVED.value, "decided_at": edit.now}
            if decision.arguments is not None:
                values["arguments"] = decision.arguments
            await update_call(edit, call.key, **values)
            return
        await update_call(edit, call.key, decided_at=edit.now)
        reason = f" The reason given: {decision.reason}" if decision.reason else ""
        outcome = CallOutcome(
            status=_S.DENIED, content=f"A person denied this call.{reason}", error="denied"
        )
        await self._results.add(edit, await find_turn(edit, call.turn_id), call, outcome)

    async def _go_on(self, edit: ContextEdit, turn_id: str) -> None:
        """Claims a turn that waited, if nothing that it waited for is left."""
        statuses = [call.status for call in await calls_of_round(edit, turn_id)]
        waits_for = _S.PENDING if edit.state is State.AWAITING_TOOL_APPROVAL else _S.APPROVED
        if waits_for in statuses:
            return
        row = await find_turn(edit, turn_id)
        if _S.APPROVED in statuses:
            await edit.step(Trigger.EXECUTE_TOOLS, turn=row)
        else:
            await collect_round(edit, row)
        await self._steps.claim(edit, row)

    async def _check_repeated(self, edit: ContextEdit, call: AnyRow, outcome: CallOutcome) -> None:
        if call.status == outcome.status and call.external:
            stored = await read_whole(edit.connection, [call.result_message_key])
            if stored.get(call.result_message_key, "") == outcome.content:
                return
        raise ToolCallDecided(call.id, call.status)


def _check_same(call: AnyRow, decision: ToolDecision) -> None:
    """A repeat of what was said before is harmless."""
    denied = call.status == _S.DENIED
    said = call.decided_at is not None
    if not said or denied != (decision.decision == "deny"):
        raise ToolCallDecided(call.id, call.status)
    if not denied and decision.arguments not in (None, call.arguments):
        raise ToolCallDecided(call.id, call.status)
