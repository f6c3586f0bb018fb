"""Turns, cancel, retry, the journal and the machine (§5, §6)."""

from typing import Annotated, Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import Body, FromPath

from contextd.core import machine
from contextd.core.turn import (
    CancelAnswer,
    CancelRequest,
    JournalPage,
    RetryAnswer,
    RetryRequest,
    Turn,
    TurnPage,
)
from contextd.http.accept import best_type
from contextd.http.documented import Cursor, Limit, refuses, tagged
from contextd.service import Records, Retries, Steps

MERMAID = "text/vnd.mermaid"


@get("/contexts/{context_id:str}/turns", responses=refuses(400, 404))
async def list_turns(
    records: NamedDependency[Records],
    context_id: FromPath[str],
    limit: Limit = 50,
    cursor: Cursor = "",
) -> TurnPage:
    """The context's turns in the order in which they were asked for."""
    return await records.turns(context_id, cursor=cursor, limit=limit)


@get("/contexts/{context_id:str}/turns/{turn_id:str}", responses=refuses(404))
async def get_turn(
    records: NamedDependency[Records], context_id: FromPath[str], turn_id: FromPath[str]
) -> Turn:
    """One turn."""
    return await records.turn(context_id, turn_id)


@post(
    "/contexts/{context_id:str}/turns/{turn_id:str}/cancel",
    responses=refuses(404, 503),
    status_code=200,
)
async def cancel_turn(
    steps: NamedDependency[Steps], context_id: FromPath[str], turn_id: FromPath[str]
) -> CancelAnswer:
    """Cancels a running turn, or takes a queued one out of the queue."""
    return await steps.cancel_turn(context_id, turn_id)


@post(
    "/contexts/{context_id:str}/cancel", responses=refuses(400, 404, 413, 415, 503), status_code=200
)
async def cancel(
    steps: NamedDependency[Steps],
    context_id: FromPath[str],
    data: Annotated[CancelRequest | None, Body()] = None,
) -> CancelAnswer:
    """Cancels the running turn; with `turn_id` only if it is that one."""
    return await steps.cancel(context_id, data.turn_id if data else None)


@post(
    "/contexts/{context_id:str}/retry",
    responses=refuses(400, 404, 409, 413, 415, 503),
    status_code=202,
)
async def retry(
    retries: NamedDependency[Retries],
    context_id: FromPath[str],
    data: Annotated[RetryRequest | None, Body()] = None,
) -> Response[RetryAnswer]:
    """Tries the turn that failed again, as a new turn after what its tools did; or `from_start`."""
    answer = await retries.retry(context_id, data or RetryRequest())
    return _with_location(context_id, answer)


@post(
    "/contexts/{context_id:str}/turns/{turn_id:str}/retry",
    responses=refuses(400, 404, 409, 413, 415, 429, 503),
    status_code=202,
)
async def retry_turn(
    retries: NamedDependency[Retries],
    context_id: FromPath[str],
    turn_id: FromPath[str],
    data: Annotated[RetryRequest | None, Body()] = None,
) -> Response[RetryAnswer]:
    """Does so with any failed or cancelled turn of a branch's last message; queued while busy."""
    answer = await retries.retry_turn(context_id, turn_id, data or RetryRequest())
    return _with_location(context_id, answer)


def _with_location(context_id: str, answer: RetryAnswer) -> Response[RetryAnswer]:
    return Response(answer, headers={"location": f"/contexts/{context_id}/turns/{answer.turn_id}"})


@get("/contexts/{context_id:str}/transitions", responses=refuses(400, 404))
async def list_transitions(
    records: NamedDependency[Records],
    context_id: FromPath[str],
    limit: Limit = 100,
    cursor: Cursor = "",
) -> JournalPage:
    """Every step of the context's state machine, oldest first."""
    return await records.transitions(context_id, cursor=cursor, limit=limit)


@get("/machine", responses=refuses())
async def get_machine(
    request: Request[Any, Any, Any],
) -> Response[machine.MachineDescription | str]:
    """The state machine, as JSON or (`Accept: text/vnd.mermaid`) as a diagram."""
    accept = ",".join(request.headers.getall("accept", ["*/*"]))
    if best_type(accept, ("application/json", MERMAID)) == MERMAID:
        return Response(machine.mermaid(), media_type=MERMAID, headers={"vary": "Accept"})
    return Response(machine.describe(), headers={"vary": "Accept"})


HANDLERS = tagged(
    "turns",
    list_turns,
    get_turn,
    cancel_turn,
    cancel,
    retry,
    retry_turn,
    list_transitions,
    get_machine,
)
