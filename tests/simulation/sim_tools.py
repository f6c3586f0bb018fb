"""The tools of the simulated servers, as `CONTEXTD_TOOLS` names them: no threads, no real time."""

import asyncio

from contextd.tools import ToolError, tool


@tool
async def quick() -> str:
    """Answers at once."""
    return "quick"


@tool(idempotent=True)
async def slow() -> str:
    """Answers after a while."""
    await asyncio.sleep(0.7)
    return "slow"


@tool
async def hanging() -> str:
    """Never answers in time."""
    await asyncio.sleep(60)
    return "late"


@tool
async def failing() -> str:
    """Cannot do it."""
    raise ToolError("It cannot be done.")


@tool(requires_approval=True)
async def guarded() -> str:
    """Runs when a person has allowed it."""
    return "guarded"
