"""The steps of a turn that calls tools, each one transaction (§5, §8).

A call is `running` before its tool starts and has its result as a message when it ends, so what a
crash interrupts can be told from what it did not reach. Nothing here runs a tool: the agent loop does.
"""

from collections.abc import Sequence

import msgspec
from sqlalchemy import bindparam, insert, select

from contextd.core.context import ApprovalPolicy
from contextd.core.machine import RESPONDING_STATES, State, Trigger
from contextd.core.message import MessageStatus, Usage
from contextd.core.tool_call import OUTCOME_UNKNOWN, ToolCallStatus
from contextd.core.values import JsonObject
from contextd.service.call_rows import (
    CallOutcome,
    Results,
    call_by_key,
    calls_of_round,
    collect_round,
    release,
    spent,
    update_call,
)
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps, TurnView
from contextd.service.toolset import ToolFacts, Toolset
from contextd.service.turn_rows import add_usage
from contextd.store.edit import ContextEdit
from contextd.store.notices import StartedTurn
from contextd.store.stored import stored_policy
from contextd.store.tables import AnyRow, tool_calls, turns

TOOL_LIMIT = "tool_limit"
CUT_OFF = "cut_off"
INTERRUPTED = (
    f"{OUTCOME_UNKNOWN}: the server stopped while this tool ran. It may have had its effect or not."
)
_S = ToolCallStatus
_IS_CUT_OFF = (
    select(tool_calls.c.key)
    .where(tool_calls.c.context_key == turns.c.context_key, tool_calls.c.turn_id == turns.c.id)
    .where(tool_calls.c.error == CUT_OFF)
    .exists()
)
_CUT_OFF_TURN = select(turns, _IS_CUT_OFF.label("is_cut_off")).where(
    turns.c.key == bindparam("of_turn")
)


class CheckedCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a reply, its arguments checked. `refusal` is what the model is told instead of a result.

    `attached` is what the provider wants back with the call.
    """

    message_key: int
    call_id: str
    name: str
    arguments: JsonObject | None
    facts: ToolFacts | None
    error: str | None = None
    refusal: str = ""
    attached: JsonObject = {}


class CallToRun(msgspec.Struct, frozen=True, kw_only=True):
    """A call that is marked as running, for the one who marked it to run."""

    key: int
    id: str
    name: str
    arguments: JsonObject


class CallSteps:
    """What the agent loop does with the calls of its own turn."""

    def __init__(self, ledger: Ledger, steps: Steps, *, toolset: Toolset, results: Results) -> None:
        self._ledger = ledger
        self._steps = steps
        self._toolset = toolset
        self._results = results

    async def end_stream(
        self,
        turn: StartedTurn,
        *,
        finish_reason: str | None,
        usage: Usage | None,
        calls: Sequence[CheckedCall],
        go_on: bool = False,
    ) -> State:
        """The model has said everything: closes the reply's messages and writes its calls.

        Where it is to `go_on`, it does what `dispatch` does as well. Says where the turn then stands.
        A second time it changes nothing.
        """

        async def work(edit: ContextEdit) -> State:
            row = await self._steps.own(edit, turn)
            if edit.state not in RESPONDING_STATES:
                return edit.state
            policy = stored_policy(edit.row)
            rounds, before = await spent(edit, turn.id) if calls else (0, 0)
            left = max(0, policy.max_calls - before) if rounds < policy.max_depth else 0
            await edit.step(Trigger.END_STREAM, turn=row, record=bool(calls))
            reason = TOOL_LIMIT if len(calls) > left else finish_reason
            rows = await edit.open_rows(turn_id=turn.id)
            await edit.close_messages(
                rows, MessageStatus.COMPLETED, finish_reason=reason, usage=usage
            )
            add_usage(edit, row, usage, finish_reason=reason)
            for number, call in enumerate(calls, 1):
                beyond = number > left
                await self._write(edit, row, call, policy, round_=rounds + 1, beyond=beyond)
            if not go_on:
                return edit.state
            if not calls:
                await self._steps.finish_in(edit, row, has_said=bool(rows))
                return State.IDLE
            return await self._dispatch_in(edit, row)

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def dispatch(self, turn: StartedTurn) -> State:
        """From `processing_llm_response` to where the calls of the reply lead; idle without any."""

        async def work(edit: ContextEdit) -> State:
            return await self._dispatch_in(edit, await self._steps.own(edit, turn))

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def _dispatch_in(self, edit: ContextEdit, row: AnyRow) -> State:
        statuses = [call.status for call in await calls_of_round(edit, row.id)]
        if not statuses:
            await self._steps.finish_in(edit, row)
            return State.IDLE
        if _S.PENDING in statuses:
            await edit.step(Trigger.REQUIRE_APPROVAL, turn=row, record=True)
            release(edit, row)
        elif _S.APPROVED in statuses:
            await edit.step(Trigger.EXECUTE_TOOLS, turn=row)
        else:
            await collect_round(edit, row)
        return edit.state

    async def start(self, turn: StartedTurn, *, calls_max: int) -> tuple[AnyRow, list[CallToRun]]:
        """Marks the next calls that are to be run here as running; returns them, and the context's row.

        One that is found running was interrupted: it runs again only if its tool is idempotent.
        """

        async def work(edit: ContextEdit) -> tuple[AnyRow, list[CallToRun]]:
            row = await self._steps.own(edit, turn)
            begun: list[CallToRun] = []
            refused: list[tuple[AnyRow, CallOutcome]] = []
            for call in await calls_of_round(edit, turn.id):
                if call.status not in (_S.APPROVED, _S.RUNNING):
                    continue
                refusal = self._refusal_to_start(edit, call)
                if refusal is not None:
                    refused.append((call, refusal))
                elif not call.external and len(begun) < calls_max:
                    begun.append(_to_run(call))
            if begun or refused:
                edit.change(record=True)
            for call, refusal in refused:
                await self._results.add(edit, row, call, refusal)
            for one in begun:
                await update_call(edit, one.key, status=_S.RUNNING.value, started_at=edit.now)
            return edit.row, begun

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def end(self, turn: StartedTurn, key: int, outcome: CallOutcome) -> None:
        """Stores the result of a call that ran; a second time it changes nothing."""

        async def work(edit: ContextEdit) -> None:
            row = await self._steps.own(edit, turn)
            call = await call_by_key(edit, key)
            if call.status == _S.RUNNING:
                edit.change(record=True)
                await self._results.add(edit, row, call, outcome)

        await self._ledger.edit(turn.context_id, work)

    async def collect(self, turn: StartedTurn) -> State:
        """All calls that run here have ended: goes on to the results, or waits for external ones."""

        async def work(edit: ContextEdit) -> State:
            row = await self._steps.own(edit, turn)
            statuses = [call.status for call in await calls_of_round(edit, turn.id)]
            if _S.APPROVED in statuses:
                await edit.step(Trigger.AWAIT_RESULTS, turn=row)
                release(edit, row)
            else:
                await collect_round(edit, row)
            return edit.state

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def proceed(self, turn: StartedTurn) -> TurnView | None:
        """From the results to the next request.

        None where the turn ends with them: over its limit, or since the answer with the calls was stopped.
        """

        async def work(edit: ContextEdit) -> TurnView | None:
            row = await self._steps.own(edit, turn, _CUT_OFF_TURN)
            if row.finish_reason == TOOL_LIMIT or row.is_cut_off:
                await self._steps.finish_in(edit, row)
                return None
            return await self._steps.request_llm_in(edit, row)

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def _write(
        self,
        edit: ContextEdit,
        turn: AnyRow,
        call: CheckedCall,
        policy: ApprovalPolicy,
        *,
        round_: int,
        beyond: bool,
    ) -> None:
        """Inserts a call as pending, approved, or refused with its result."""
        outcome = _refusal(call, mode=edit.row.mode, beyond=beyond)
        facts = call.facts or ToolFacts()
        waits = (policy.mode == "manual" or facts.requires_approval) and (
            call.name not in policy.allow
        )
        inserted = await edit.connection.execute(
            insert(tool_calls)
            .values(
                context_key=edit.key,
                id=self._ledger.new_id(),
                turn_id=turn.id,
                message_key=call.message_key,
                round=round_,
                call_id=call.call_id,
                name=call.name,
                arguments=call.arguments,
                attached=call.attached or None,
                status=(_S.PENDING if waits else _S.APPROVED).value,
                requires_approval=waits and outcome is None,
                external=facts.external,
                collected=False,
                created_at=edit.now,
            )
            .returning(tool_calls)
        )
        if outcome is not None:
            await self._results.add(edit, turn, inserted.one(), outcome)

    def _refusal_to_start(self, edit: ContextEdit, call: AnyRow) -> CallOutcome | None:
        """What speaks against a call that is about to run; the model is told. External ones too."""
        facts = self._toolset.facts(edit.row, call.name)
        interrupted = CallOutcome(status=_S.FAILED, content=INTERRUPTED, error=OUTCOME_UNKNOWN)
        if call.status == _S.RUNNING and (facts is None or not facts.idempotent):
            return interrupted
        if facts is None or facts.external != call.external:
            return unknown_tool(call.name)
        if edit.row.mode == "plan" and not facts.read_only:
            return interrupted if call.status == _S.RUNNING else _blocked(call.name)
        return None


def _to_run(call: AnyRow) -> CallToRun:
    return CallToRun(key=call.key, id=call.id, name=call.name, arguments=call.arguments or {})


def _refusal(call: CheckedCall, *, mode: str, beyond: bool) -> CallOutcome | None:
    if beyond:
        words = "tool_limit: no more tools may be called in this turn."
        return CallOutcome(status=_S.FAILED, content=words, error=TOOL_LIMIT)
    if call.error is not None:
        return CallOutcome(status=_S.FAILED, content=call.refusal, error=call.error)
    if call.facts is None:
        return unknown_tool(call.name)
    if mode == "plan" and not call.facts.read_only:
        return _blocked(call.name)
    return None


def unknown_tool(name: str) -> CallOutcome:
    """Of a call whose tool is not there, or not any more."""
    words = f"unknown_tool: there is no tool {name[:100]!r} here."
    return CallOutcome(status=_S.FAILED, content=words, error="unknown_tool")


def _blocked(name: str) -> CallOutcome:
    words = f"plan_mode: {name!r} may change things, and only plans are made now."
    return CallOutcome(status=_S.FAILED, content=words, error="plan_mode")
