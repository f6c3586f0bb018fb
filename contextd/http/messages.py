"""`/contexts/{id}/messages`: send and list (§3.1, §3.2), and chunks one by one (§3.3)."""

from typing import Annotated

from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from contextd.core.message import ChunkPage, Message, MessagePage, SendAnswer, SendRequest
from contextd.core.values import ID_PATTERN, SEQUENCE_MAX
from contextd.http.documented import Limit, PlaceCursor, Position, also, refuses, tagged
from contextd.service import Content, Messages


@post(
    "/contexts/{context_id:str}/messages",
    responses={
        **also(201, SendAnswer, "Stored without an answer (`respond` false)"),
        **refuses(400, 404, 409, 413, 415, 429, 503),
    },
    status_code=202,
)
async def send_message(
    messages: NamedDependency[Messages], context_id: FromPath[str], data: JSONBody[SendRequest]
) -> Response[SendAnswer]:
    """Stores a message at once; the turn that answers it runs on its own."""
    answer = await messages.send(context_id, data)
    location = f"/contexts/{answer.context_id}/messages/{answer.message_id}"
    return Response(
        answer, status_code=202 if data.respond else 201, headers={"location": location}
    )


@get("/contexts/{context_id:str}/messages", responses=refuses(400, 404))
async def list_messages(
    messages: NamedDependency[Messages],
    context_id: FromPath[str],
    branch: Annotated[str, QueryParameter(schema_extra={"pattern": ID_PATTERN})] = "",
    since_revision: Annotated[int | None, QueryParameter(ge=0, le=SEQUENCE_MAX)] = None,
    include: Annotated[str, QueryParameter(schema_extra={"enum": ["content"]})] = "",
    limit: Limit = 100,
    cursor: PlaceCursor = "",
) -> MessagePage:
    """A branch in conversation order, or with `since_revision` what has changed since, on any."""
    if since_revision is None:
        return await messages.list(
            context_id,
            branch=branch or None,
            cursor=cursor,
            limit=limit,
            include_content=include == "content",
        )
    return await messages.list_changed(
        context_id,
        since_revision=since_revision,
        cursor=cursor,
        limit=limit,
        include_content=include == "content",
    )


@get("/contexts/{context_id:str}/messages/{message_id:str}", responses=refuses(404))
async def get_message(
    messages: NamedDependency[Messages], context_id: FromPath[str], message_id: FromPath[str]
) -> Message:
    """One message, without its text."""
    return await messages.get(context_id, message_id)


@get("/contexts/{context_id:str}/messages/{message_id:str}/chunks", responses=refuses(400, 404))
async def list_chunks(
    content: NamedDependency[Content],
    context_id: FromPath[str],
    message_id: FromPath[str],
    from_sequence: Position = 0,
    limit: Limit = 100,
) -> ChunkPage:
    """Chunks after a position, each by itself, with the time when it was written."""
    return await content.chunks(context_id, message_id, start=from_sequence, limit=limit)


HANDLERS = tagged("messages", send_message, list_messages, get_message, list_chunks)
