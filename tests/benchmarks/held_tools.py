"""Tools for the server that is measured: one that goes on until it is stopped."""

import asyncio
import time
from pathlib import Path

from contextd.tools import tool


@tool
async def hold(mark: str) -> str:
    """Makes the file `mark`, and writes into it when it was stopped."""
    path = Path(mark)
    path.touch()
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        path.write_text(str(time.time()))
        raise
    return "nobody stopped it"
