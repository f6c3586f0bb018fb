"""Producing from outside (§7): open or take over, complete, fail. Chunks come by `append.py`."""

from typing import Annotated

from litestar import Response, post, put
from litestar.di import NamedDependency
from litestar.params import Body, FromPath, JSONBody

from contextd.core.message import Message
from contextd.core.producing import CompleteRequest, FailRequest, OpenRequest
from contextd.http.documented import also, refuses, tagged
from contextd.service import Producers


@put(
    "/contexts/{context_id:str}/messages/{message_id:str}",
    responses={
        **also(200, Message, "Yours already, or taken over"),
        **refuses(400, 404, 409, 413, 415),
    },
    status_code=201,
)
async def open_message(
    producers: NamedDependency[Producers],
    context_id: FromPath[str],
    message_id: FromPath[str],
    data: JSONBody[OpenRequest],
) -> Response[Message]:
    """Opens a message for a producer; with a higher epoch it takes over an open one."""
    message, created = await producers.open(context_id, message_id, data)
    location = {"location": f"/contexts/{context_id}/messages/{message_id}"} if created else {}
    return Response(message, status_code=201 if created else 200, headers=location)


@post(
    "/contexts/{context_id:str}/messages/{message_id:str}/complete",
    responses=refuses(400, 404, 409, 413, 415),
    status_code=200,
)
async def complete_message(
    producers: NamedDependency[Producers],
    context_id: FromPath[str],
    message_id: FromPath[str],
    data: Annotated[CompleteRequest | None, Body()] = None,
) -> Message:
    """Closes a produced message; again the same."""
    return await producers.complete(context_id, message_id, data or CompleteRequest())


@post(
    "/contexts/{context_id:str}/messages/{message_id:str}/fail",
    responses=refuses(400, 404, 409, 413, 415),
    status_code=200,
)
async def fail_message(
    producers: NamedDependency[Producers],
    context_id: FromPath[str],
    message_id: FromPath[str],
    data: JSONBody[FailRequest],
) -> Message:
    """Closes a produced message as failed, with what it has; again the same."""
    return await producers.fail(context_id, message_id, data)


HANDLERS = tagged("producing", open_message, complete_message, fail_message)
