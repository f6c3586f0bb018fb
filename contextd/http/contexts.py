"""`/contexts`: create, list, read, change, delete (§2)."""

from typing import Annotated

from litestar import Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import Body, FromPath, JSONBody, QueryParameter

from contextd.core.context import Context, ContextPage, ContextPatch, ContextRequest
from contextd.core.machine import State
from contextd.http.documented import Limit, PlaceCursor, also, refuses, tagged
from contextd.service import Contexts


@post(
    "/contexts",
    responses={**also(200, Context, "It was there already"), **refuses(400, 409, 413, 415)},
    status_code=201,
)
async def create_context(
    contexts: NamedDependency[Contexts],
    data: Annotated[ContextRequest | None, Body()] = None,
) -> Response[Context]:
    """Creates a context; everything in the body is optional. The same id and body again: 200."""
    context, created = await contexts.create(data or ContextRequest())
    return Response(
        context,
        status_code=201 if created else 200,
        headers={"location": f"/contexts/{context.id}"} if created else None,
    )


@get("/contexts", responses=refuses(400))
async def list_contexts(
    contexts: NamedDependency[Contexts],
    states: Annotated[
        list[State] | None, QueryParameter(name="state", description="Only these states")
    ] = None,
    limit: Limit = 50,
    cursor: PlaceCursor = "",
) -> ContextPage:
    """Contexts, newest activity first."""
    names = [state.value for state in states or ()]
    return await contexts.list(states=names, limit=limit, cursor=cursor)


@get("/contexts/{context_id:str}", responses=refuses(404))
async def get_context(contexts: NamedDependency[Contexts], context_id: FromPath[str]) -> Context:
    """One context as it is now."""
    return await contexts.get(context_id)


@patch("/contexts/{context_id:str}", responses=refuses(400, 404, 413, 415))
async def patch_context(
    contexts: NamedDependency[Contexts], context_id: FromPath[str], data: JSONBody[ContextPatch]
) -> Context:
    """Changes a context by a JSON merge patch (RFC 7396)."""
    return await contexts.patch(context_id, data)


@delete("/contexts/{context_id:str}", responses=refuses(404))
async def delete_context(contexts: NamedDependency[Contexts], context_id: FromPath[str]) -> None:
    """Deletes a context and everything of it but its id."""
    await contexts.delete(context_id)


HANDLERS = tagged(
    "contexts", create_context, list_contexts, get_context, patch_context, delete_context
)
