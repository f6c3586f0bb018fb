"""Calls of tools as rows: written, decided, run and answered, each in one transaction (§8).

A call is `running` before its tool starts and has its result as a message when it ends, so what a
crash interrupts can be told from what it did not reach. Nothing here runs a tool: the agent loop does.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import func, insert, select, update

from contextd.core.context import ApprovalPolicy
from contextd.core.errors import (
    IllegalTransition,
    InvalidRequest,
    ToolCallDecided,
    ToolCallNotFound,
)
from contextd.core.machine import State, Trigger, allowed
from contextd.core.message import MessageStatus, Role, Usage
from contextd.core.tool_call import (
    TOOL_RESULT,
    ToolCallPage,
    ToolCallStatus,
    ToolDecision,
    ToolResultRequest,
)
from contextd.core.values import JsonObject
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps, add_usage
from contextd.service.toolset import ToolFacts, Toolset
from contextd.service.wire import decode_cursor, encode_cursor, tool_call_wire
from contextd.store.appends import utf8_bytes
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.notices import StartedTurn
from contextd.store.reader import Reader
from contextd.store.tables import AnyRow, messages, tool_calls, turns
from contextd.tools.arguments import ArgumentChecker

TOOL_LIMIT = "tool_limit"
OUTCOME_UNKNOWN = (
    "outcome_unknown: the server stopped while this tool ran. It may have had its effect or not."
)
_S = ToolCallStatus


class CheckedCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a reply, its arguments checked. `refusal` is what the model is told instead of a result."""

    message_key: int
    call_id: str
    name: str
    arguments: JsonObject | None
    facts: ToolFacts | None
    error: str | None = None
    refusal: str = ""


class CallToRun(msgspec.Struct, frozen=True, kw_only=True):
    """A call that is marked as running, for the one who marked it to run."""

    key: int
    id: str
    name: str
    arguments: JsonObject


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended, and what the model is told."""

    status: ToolCallStatus
    content: str
    error: str | None = None


class Calls:
    """Moves tool calls, and the turns that wait for them."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        steps: Steps,
        *,
        toolset: Toolset,
        checker: ArgumentChecker,
        chunk_bytes_max: int,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._steps = steps
        self._toolset = toolset
        self._checker = checker
        self._chunk_bytes_max = chunk_bytes_max

    # What the agent loop does with its own turn.

    async def end_stream(
        self,
        turn: StartedTurn,
        *,
        finish_reason: str | None,
        usage: Usage | None,
        calls: Sequence[CheckedCall],
    ) -> None:
        """The model has said everything: closes the reply's messages and writes its calls."""

        async def work(edit: ContextEdit) -> None:
            row = await self._steps.own(edit, turn)
            policy = msgspec.convert(edit.row.approval_policy, ApprovalPolicy)
            rounds, before = await _spent(edit, turn.id)
            over = bool(calls) and (
                rounds >= policy.max_depth or before + len(calls) > policy.max_calls
            )
            await edit.step(Trigger.END_STREAM, turn=row)
            await edit.close_messages(
                await edit.open_rows(turn_id=turn.id),
                MessageStatus.COMPLETED,
                finish_reason=TOOL_LIMIT if over else finish_reason,
                usage=usage,
            )
            await add_usage(edit, row, usage)
            for number, call in enumerate(calls, 1):
                beyond = rounds >= policy.max_depth or before + number > policy.max_calls
                await self._write(edit, row, call, policy, round_=rounds + 1, beyond=beyond)

        await self._ledger.edit(turn.context_id, work)

    async def dispatch(self, turn: StartedTurn) -> State:
        """From `processing_llm_response` to where the calls of the reply lead; idle without any."""

        async def work(edit: ContextEdit) -> State:
            row = await self._steps.own(edit, turn)
            statuses = [call.status for call in await _round(edit, turn.id)]
            if not statuses:
                await self._steps.finish_in(edit, row)
                return State.IDLE
            if _S.PENDING in statuses:
                await edit.step(Trigger.REQUIRE_APPROVAL, turn=row, record=True)
                await _release(edit, row)
            elif _S.APPROVED in statuses:
                await edit.step(Trigger.EXECUTE_TOOLS, turn=row)
            else:
                await _collect(edit, row)
            return edit.state

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def start(self, turn: StartedTurn) -> list[CallToRun]:
        """Marks the calls that are to be run here as running.

        One that is found running was interrupted: it runs again only if its tool is idempotent.
        """

        async def work(edit: ContextEdit) -> list[CallToRun]:
            row = await self._steps.own(edit, turn)
            found = [
                call
                for call in await _round(edit, turn.id)
                if not call.external and call.status in (_S.APPROVED, _S.RUNNING)
            ]
            if found:
                edit.change(record=True)
            return [
                CallToRun(key=c.key, id=c.id, name=c.name, arguments=c.arguments or {})
                for c in found
                if await self._may_start(edit, row, c)
            ]

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def end(self, turn: StartedTurn, key: int, outcome: CallOutcome) -> None:
        """Stores the result of a call that ran."""

        async def work(edit: ContextEdit) -> None:
            row = await self._steps.own(edit, turn)
            call = await _by_key(edit, key)
            if call.status == _S.RUNNING:
                edit.change(record=True)
                await self._add_result(edit, row, call, outcome)

        await self._ledger.edit(turn.context_id, work)

    async def collect(self, turn: StartedTurn) -> State:
        """All calls that run here have ended: goes on to the results, or waits for external ones."""

        async def work(edit: ContextEdit) -> State:
            row = await self._steps.own(edit, turn)
            statuses = [call.status for call in await _round(edit, turn.id)]
            if _S.APPROVED in statuses:
                await edit.step(Trigger.AWAIT_RESULTS, turn=row)
                await _release(edit, row)
            else:
                await _collect(edit, row)
            return edit.state

        return (await self._ledger.edit(turn.context_id, work))[1]

    async def is_over_limit(self, turn: StartedTurn) -> bool:
        """Whether the last reply asked for more than the policy allows: the turn ends then."""

        async def work(edit: ContextEdit) -> bool:
            await self._steps.own(edit, turn)
            reason = await edit.connection.scalar(
                select(messages.c.finish_reason)
                .where(messages.c.context_key == edit.key, messages.c.turn_id == turn.id)
                .where(messages.c.role == Role.ASSISTANT.value, ~messages.c.superseded)
                .order_by(messages.c.key.desc())
                .limit(1)
            )
            return bool(reason == TOOL_LIMIT)

        return (await self._ledger.edit(turn.context_id, work))[1]

    # What people and external tools do.

    async def list(
        self, context_id: str, *, statuses: Sequence[str], cursor: str | None, limit: int
    ) -> ToolCallPage:
        """Calls in the order in which they were asked for."""
        (after,) = decode_cursor(cursor, (0,))
        found = await self._reader.tool_calls(
            context_id, statuses=statuses, after_key=after, limit=limit + 1
        )
        page = found[:limit]
        return ToolCallPage(
            items=[tool_call_wire(row, context_id) for row in page],
            next_cursor=encode_cursor(page[-1].key) if len(found) > limit else None,
        )

    async def decide(self, context_id: str, decisions: Sequence[ToolDecision]) -> State:
        """Decides calls, all or none; with the last one the turn goes on, here.

        The same again is harmless. Raises `ToolCallNotFound`, `ToolCallDecided`, and `InvalidRequest`
        for arguments that the tool does not take.
        """
        await self._check_edited(context_id, decisions)

        async def work(edit: ContextEdit) -> State:
            changed = False
            for decision in decisions:
                call = await find_call(edit, decision.tool_call_id)
                if call.status != _S.PENDING:
                    _check_same(call, decision)
                    continue
                if not changed:
                    edit.change(record=True)
                changed = True
                await self._decide(edit, call, decision)
            if changed and edit.state is State.AWAITING_TOOL_APPROVAL:
                await self._go_on(edit, call.turn_id)
            return edit.state

        return (await self._ledger.edit(context_id, work))[1]

    async def post_result(
        self, context_id: str, tool_call_id: str, request: ToolResultRequest
    ) -> State:
        """Takes the result of an external call; with the last one the turn goes on, here.

        The same again is harmless. Raises `ToolCallNotFound`, `ToolCallDecided` where the call has
        ended otherwise, `IllegalTransition` where no result of it is expected.
        """
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
            if not call.external or call.status != _S.APPROVED:
                raise IllegalTransition(
                    state=edit.state.value,
                    trigger=Trigger.COLLECT_RESULTS.value,
                    allowed=[trigger.value for trigger in allowed(edit.state)],
                )
            row = await _turn(edit, call.turn_id)
            edit.change(record=True)
            await self._add_result(edit, row, call, outcome)
            if edit.state is State.AWAITING_TOOL_RESULTS:
                await self._go_on(edit, call.turn_id)
            return edit.state

        return (await self._ledger.edit(context_id, work))[1]

    async def _check_edited(self, context_id: str, decisions: Sequence[ToolDecision]) -> None:
        edited = [(n, d) for n, d in enumerate(decisions) if d.arguments is not None]
        if not edited:
            return
        context, calls = await self._reader.calls_by_id(
            context_id, [decision.tool_call_id for _, decision in edited]
        )
        for number, decision in edited:
            call = calls.get(decision.tool_call_id)
            schema = self._toolset.schema(context, call.name) if call is not None else None
            if schema is None or decision.arguments is None:
                continue
            problems = await self._checker.check(schema, decision.arguments)
            if problems:
                raise InvalidRequest.of(f"decisions[{number}].arguments", "; ".join(problems))

    # Inside an edit.

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
                status=(_S.PENDING if waits else _S.APPROVED).value,
                requires_approval=waits and outcome is None,
                external=facts.external,
                collected=False,
                created_at=edit.now,
            )
            .returning(tool_calls)
        )
        if outcome is not None:
            await self._add_result(edit, turn, inserted.one(), outcome)

    async def _may_start(self, edit: ContextEdit, turn: AnyRow, call: AnyRow) -> bool:
        """Marks the call as running, unless something speaks against it, which the model is told."""
        facts = self._toolset.facts(edit.row, call.name)
        refused = None
        if call.status == _S.RUNNING and (facts is None or not facts.idempotent):
            refused = CallOutcome(
                status=_S.FAILED, content=OUTCOME_UNKNOWN, error="outcome_unknown"
            )
        elif facts is None or facts.external:
            refused = _unknown(call.name)
        elif edit.row.mode == "plan" and not facts.read_only:
            refused = _blocked(call.name)
        if refused is not None:
            await self._add_result(edit, turn, call, refused)
            return False
        await _update(edit, call, status=_S.RUNNING.value, started_at=edit.now)
        return True

    async def _decide(self, edit: ContextEdit, call: AnyRow, decision: ToolDecision) -> None:
        if decision.decision == "approve":
            values: dict[str, Any] = {"status": _S.APPROVED.value, "decided_at": edit.now}
            if decision.arguments is not None:
                values["arguments"] = decision.arguments
            await _update(edit, call, **values)
            return
        await _update(edit, call, decided_at=edit.now)
        reason = f" The reason given: {decision.reason}" if decision.reason else ""
        outcome = CallOutcome(
            status=_S.DENIED, content=f"A person denied this call.{reason}", error="denied"
        )
        await self._add_result(edit, await _turn(edit, call.turn_id), call, outcome)

    async def _go_on(self, edit: ContextEdit, turn_id: str) -> None:
        """Claims a turn that waited, if nothing that it waited for is left."""
        statuses = [call.status for call in await _round(edit, turn_id)]
        row = await _turn(edit, turn_id)
        if edit.state is State.AWAITING_TOOL_APPROVAL:
            if _S.PENDING in statuses:
                return
            if _S.APPROVED in statuses:
                await edit.step(Trigger.EXECUTE_TOOLS, turn=row)
            else:
                await _collect(edit, row)
        elif _S.APPROVED in statuses:
            return
        else:
            await _collect(edit, row)
        await self._steps.claim(edit, row)

    async def _add_result(
        self, edit: ContextEdit, turn: AnyRow, call: AnyRow, outcome: CallOutcome
    ) -> None:
        """Closes the call with its result, a message at the turn's branch."""
        metadata = {"tool_call_id": call.id, "name": call.name}
        if outcome.error is not None:
            metadata["error"] = outcome.error
        opened = await edit.add_message(
            MessageDraft(
                id=self._ledger.new_id(),
                role=Role.TOOL,
                kind=TOOL_RESULT,
                status=MessageStatus.COMPLETED,
                turn_id=turn.id,
                texts=split_text(outcome.content, self._chunk_bytes_max),
                metadata=metadata,
            ),
            branch=turn.branch,
        )
        await _update(
            edit,
            call,
            status=outcome.status.value,
            error=outcome.error,
            result_message_key=opened.key,
            ended_at=edit.now,
        )

    async def _check_repeated(self, edit: ContextEdit, call: AnyRow, outcome: CallOutcome) -> None:
        if call.status == outcome.status and call.external:
            stored = await edit.whole_text(call.result_message_key)
            if stored == outcome.content:
                return
        raise ToolCallDecided(call.id, call.status)


def split_text(content: str, bytes_max: int) -> list[str]:
    """As chunks of at most `bytes_max` of UTF-8; none of nothing."""
    if utf8_bytes(content) <= bytes_max:
        return [content] if content else []
    step = max(1, bytes_max // 4)  # a character is four bytes at most
    return [content[at : at + step] for at in range(0, len(content), step)]


def _refusal(call: CheckedCall, *, mode: str, beyond: bool) -> CallOutcome | None:
    if beyond:
        words = "tool_limit: no more tools may be called in this turn."
        return CallOutcome(status=_S.FAILED, content=words, error=TOOL_LIMIT)
    if call.error is not None:
        return CallOutcome(status=_S.FAILED, content=call.refusal, error=call.error)
    if call.facts is None:
        return _unknown(call.name)
    if mode == "plan" and not call.facts.read_only:
        return _blocked(call.name)
    return None


def _unknown(name: str) -> CallOutcome:
    words = f"unknown_tool: there is no tool {name[:100]!r} here."
    return CallOutcome(status=_S.FAILED, content=words, error="unknown_tool")


def _blocked(name: str) -> CallOutcome:
    words = f"plan_mode: {name!r} may change things, and only plans are made now."
    return CallOutcome(status=_S.FAILED, content=words, error="plan_mode")


def _check_same(call: AnyRow, decision: ToolDecision) -> None:
    """A repeat of what was said before is harmless."""
    denied = call.status == _S.DENIED
    said = call.decided_at is not None
    if not said or denied != (decision.decision == "deny"):
        raise ToolCallDecided(call.id, call.status)
    if decision.arguments is not None and decision.arguments != call.arguments:
        raise ToolCallDecided(call.id, call.status)


async def find_call(edit: ContextEdit, tool_call_id: str) -> AnyRow:
    """Raises `ToolCallNotFound`."""
    query = select(tool_calls).where(
        tool_calls.c.context_key == edit.key, tool_calls.c.id == tool_call_id
    )
    row = (await edit.connection.execute(query)).one_or_none()
    if row is None:
        raise ToolCallNotFound(tool_call_id)
    return row


async def _by_key(edit: ContextEdit, key: int) -> AnyRow:
    row: AnyRow = (
        await edit.connection.execute(select(tool_calls).where(tool_calls.c.key == key))
    ).one()
    return row


async def _spent(edit: ContextEdit, turn_id: str) -> tuple[int, int]:
    """Rounds and calls that the turn has had."""
    row = (
        await edit.connection.execute(
            select(func.max(tool_calls.c.round), func.count()).where(
                tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn_id
            )
        )
    ).one()
    return row[0] or 0, row[1]


async def _round(edit: ContextEdit, turn_id: str) -> Sequence[AnyRow]:
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


async def _collect(edit: ContextEdit, turn: AnyRow) -> None:
    """All calls of the round have their results."""
    await edit.step(Trigger.COLLECT_RESULTS, turn=turn)
    await edit.connection.execute(
        update(tool_calls)
        .where(tool_calls.c.context_key == edit.key, tool_calls.c.turn_id == turn.id)
        .values(collected=True)
    )


async def _turn(edit: ContextEdit, turn_id: str) -> AnyRow:
    query = select(turns).where(turns.c.context_key == edit.key, turns.c.id == turn_id)
    row: AnyRow = (await edit.connection.execute(query)).one()
    return row


async def _update(edit: ContextEdit, call: AnyRow, **values: Any) -> None:
    await edit.connection.execute(
        update(tool_calls).where(tool_calls.c.key == call.key).values(**values)
    )


async def _release(edit: ContextEdit, turn: AnyRow) -> None:
    """The turn waits for somebody outside: it has no owner until it is claimed again."""
    await edit.connection.execute(
        update(turns).where(turns.c.key == turn.key).values(owner_id=None, lease_expires_at=None)
    )
