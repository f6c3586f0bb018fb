"""`/workflows`: the prompts that this server has by name (§3.1)."""

from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath

from contextd.core.workflow import Workflow, WorkflowPage
from contextd.http.documented import Cursor, Limit, refuses, tagged
from contextd.service.payloads import off_loop
from contextd.service.wire import decode_cursor, encode_cursor
from contextd.workflows import Workflows


@get("/workflows", responses=refuses(400))
async def list_workflows(
    workflows: NamedDependency[Workflows], limit: Limit = 50, cursor: Cursor = ""
) -> WorkflowPage:
    """All workflows by name, with their parameters."""
    (after,) = decode_cursor(cursor, (0,))
    found = await off_loop(workflows.list)
    more = len(found) > after + limit
    return WorkflowPage(
        items=found[after : after + limit],
        next_cursor=encode_cursor(after + limit) if more else None,
    )


@get("/workflows/{workflow:str}", responses=refuses(404))
async def get_workflow(workflows: NamedDependency[Workflows], workflow: FromPath[str]) -> Workflow:
    """One workflow."""
    return await off_loop(lambda: workflows.get(workflow))


HANDLERS = tagged("workflows", list_workflows, get_workflow)
