"""Calls of tools: list, decide, post results (§8)."""

from typing import Annotated

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from contextd.core.tool_call import (
    DecisionsRequest,
    ToolCallPage,
    ToolCallStatus,
    ToolResultRequest,
    ToolStateAnswer,
)
from contextd.http.documented import Cursor, Limit, refuses, tagged
from contextd.service import Calls


@get("/contexts/{context_id:str}/tool-calls", responses=refuses(400, 404))
async def list_tool_calls(
    calls: NamedDependency[Calls],
    context_id: FromPath[str],
    statuses: Annotated[
        list[ToolCallStatus] | None, QueryParameter(name="status", description="Only these")
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> ToolCallPage:
    """The context's tool calls, oldest first."""
    names = [status.value for status in statuses or ()]
    return await calls.list(context_id, statuses=names, cursor=cursor, limit=limit)


@post(
    "/contexts/{context_id:str}/tool-calls/decisions",
    responses=refuses(400, 404, 409, 413, 415),
    status_code=202,
)
async def decide(
    calls: NamedDependency[Calls], context_id: FromPath[str], data: JSONBody[DecisionsRequest]
) -> ToolStateAnswer:
    """Approves or denies calls that wait; with the last of them the turn goes on."""
    return ToolStateAnswer(state=await calls.decide(context_id, data.decisions))


@post(
    "/contexts/{context_id:str}/tool-calls/{tool_call_id:str}/result",
    responses=refuses(400, 404, 409, 413, 415),
    status_code=202,
)
async def post_result(
    calls: NamedDependency[Calls],
    context_id: FromPath[str],
    tool_call_id: FromPath[str],
    data: JSONBody[ToolResultRequest],
) -> ToolStateAnswer:
    """Takes the result of an external tool; with the last one the turn goes on."""
    return ToolStateAnswer(state=await calls.post_result(context_id, tool_call_id, data))


HANDLERS = tagged("tools", list_tool_calls, decide, post_result)
