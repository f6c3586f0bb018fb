"""Checking the calls of a reply, and running those that may run (§8)."""

import asyncio

import structlog

from contextd.core.tool_call import ToolCallStatus
from contextd.core.values import JsonObject
from contextd.service import CallSteps, Toolset
from contextd.service.call_rows import CallOutcome
from contextd.service.call_steps import CUT_OFF, CallToRun, CheckedCall, unknown_tool
from contextd.settings import Settings
from contextd.store.notices import StartedTurn
from contextd.store.tables import AnyRow
from contextd.tools.arguments import ArgumentChecker, ArgumentsError, parse
from contextd.tools.execution import execute
from contextd.turns.reply import AskedCall, Reply, stored

log = structlog.get_logger(__name__)

CALLS_AT_ONCE_MAX = 16  # half of a context's share of threads, so that one round may hang


class Executing:
    """Checks and runs tool calls for the loop."""

    def __init__(
        self, calls: CallSteps, toolset: Toolset, checker: ArgumentChecker, settings: Settings
    ) -> None:
        self._calls = calls
        self._toolset = toolset
        self._checker = checker
        self._settings = settings

    async def check(self, context: AnyRow, reply: Reply) -> list[CheckedCall]:
        """The calls of a reply, with what is wrong with them said for the model to read."""
        return [await self._check(context, call, reply) for call in reply.calls.values()]

    async def run(self, turn: StartedTurn) -> None:
        """Runs the calls that are approved, and stores each result as it comes.

        All at once, or where there are very many, in groups of so many.
        """
        more = True
        while more:
            context, calls = await stored(
                lambda: self._calls.start(turn, calls_max=CALLS_AT_ONCE_MAX)
            )
            more = len(calls) == CALLS_AT_ONCE_MAX
            try:
                async with asyncio.TaskGroup() as group:
                    for call in calls:
                        group.create_task(self._run(turn, context, call), name=f"call-{call.id}")
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the first; it has stopped the others

    async def _check(self, context: AnyRow, call: AskedCall, reply: Reply) -> CheckedCall:
        arguments, error, problem = None, "invalid_arguments", ""
        if reply.is_whole:
            arguments, problem = await self._arguments(context, call)
        else:
            # Nobody knows what the model would have written.
            error, problem = (
                CUT_OFF,
                f"the answer was stopped ({reply.finish_reason}); nothing ran.",
            )
        facts = self._toolset.facts(context, call.name)
        return CheckedCall(
            message_key=call.live.message_key,
            call_id=call.id,
            name=call.name,
            arguments=arguments,
            facts=facts,
            error=error if problem and (facts is not None or error is CUT_OFF) else None,
            refusal=f"{error}: {problem}",
            attached=call.attached,
        )

    async def _arguments(self, context: AnyRow, call: AskedCall) -> tuple[JsonObject | None, str]:
        """The arguments, null where they are no object, and what is wrong with them."""
        if call.refusal is not None:
            return None, call.refusal
        try:
            arguments = parse(call.arguments, bytes_max=self._settings.tool_arguments_bytes_max)
        except ArgumentsError as wrong:
            return None, str(wrong)
        schema = self._toolset.schema(context, call.name)
        problems = await self._checker.check(schema, arguments) if schema is not None else []
        return arguments, "; ".join(problems)

    async def _run(self, turn: StartedTurn, context: AnyRow, call: CallToRun) -> None:
        tool = self._toolset.get(context, call.name)
        if tool is None:  # it has gone since it was marked
            outcome = unknown_tool(call.name)
        else:
            ended = await execute(
                tool,
                call.arguments,
                timeout_s=self._settings.tool_timeout_s,
                result_bytes_max=self._settings.tool_result_bytes_max,
                share=turn.context_id,
            )
            outcome = CallOutcome(
                status=ToolCallStatus(ended.status), content=ended.content, error=ended.error
            )
        log.info("a tool ended", tool_call_id=call.id, tool=call.name, status=outcome.status.value)
        await stored(lambda: self._calls.end(turn, call.key, outcome), repeatable=True)
