"""`/contexts/{id}/branches`: list, make, read, delete, merge (§9)."""

from litestar import Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from contextd.core.branch import Branch, BranchPage, BranchRequest, MergeAnswer, MergeRequest
from contextd.http.documented import Cursor, Limit, also, refuses, tagged
from contextd.service import Branches


@get("/contexts/{context_id:str}/branches", responses=refuses(400, 404))
async def list_branches(
    branches: NamedDependency[Branches],
    context_id: FromPath[str],
    limit: Limit = 100,
    cursor: Cursor = "",
) -> BranchPage:
    """The context's branches, oldest first."""
    return await branches.list(context_id, cursor=cursor, limit=limit)


@post(
    "/contexts/{context_id:str}/branches",
    responses={
        **also(200, Branch, "It was there already"),
        **refuses(400, 404, 409, 413, 415),
    },
    status_code=201,
)
async def create_branch(
    branches: NamedDependency[Branches], context_id: FromPath[str], data: JSONBody[BranchRequest]
) -> Response[Branch]:
    """Makes a branch, from the active one's leaf unless told otherwise; it copies nothing."""
    branch, created = await branches.create(context_id, data)
    location = {"location": f"/contexts/{context_id}/branches/{branch.name}"} if created else {}
    return Response(branch, status_code=201 if created else 200, headers=location)


@get("/contexts/{context_id:str}/branches/{branch:str}", responses=refuses(404))
async def get_branch(
    branches: NamedDependency[Branches], context_id: FromPath[str], branch: FromPath[str]
) -> Branch:
    """One branch as it is now."""
    return await branches.get(context_id, branch)


@delete("/contexts/{context_id:str}/branches/{branch:str}", responses=refuses(404, 409))
async def delete_branch(
    branches: NamedDependency[Branches], context_id: FromPath[str], branch: FromPath[str]
) -> None:
    """Deletes a branch that is not the active one. Its messages can still be read by their ids."""
    await branches.delete(context_id, branch)


@post(
    "/contexts/{context_id:str}/branches/{branch:str}/merge",
    responses=refuses(400, 404, 409, 413, 415),
    status_code=200,
)
async def merge_branch(
    branches: NamedDependency[Branches],
    context_id: FromPath[str],
    branch: FromPath[str],
    data: JSONBody[MergeRequest],
) -> MergeAnswer:
    """Appends copies of another branch's messages: those since the common ancestor, or those named."""
    return await branches.merge(context_id, branch, data)


HANDLERS = tagged("branches", list_branches, create_branch, get_branch, delete_branch, merge_branch)
