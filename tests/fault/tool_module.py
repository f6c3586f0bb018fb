"""The tools of the run of faults to turns with tools, as `CONTEXTD_TOOLS` names them (§8).

The server imports this file. Each execution writes a line to a book when it begins and one when it ends,
each with one write to a file that is only appended to: a SIGKILL takes nothing of it back. So what was
really executed, with which arguments and what it gave, is known without the server.
"""

import asyncio
import json
import os
import time
import uuid
from typing import Any

from contextd.tools import ToolError, tool


@tool
def quick(mark: str, book: str, say: str) -> str:
    """Gives its words back at once."""
    return _Execution(book, mark=mark, say=say).end()


@tool
async def slow(mark: str, book: str, say: str, ms: int) -> str:
    """The same after a while, and lets itself be stopped."""
    return await _wait(_Execution(book, mark=mark, say=say, ms=ms), ms)


@tool
def block(mark: str, book: str, say: str, ms: int) -> str:
    """The same in a thread, where nothing can stop it."""
    execution = _Execution(book, mark=mark, say=say, ms=ms)
    time.sleep(ms / 1000)
    return execution.end()


@tool(read_only=True)
async def look(mark: str, book: str, say: str, ms: int) -> str:
    """Changes nothing, and still may not run twice."""
    return await _wait(_Execution(book, mark=mark, say=say, ms=ms), ms)


@tool(read_only=True, idempotent=True)
async def look_again(mark: str, book: str, say: str, ms: int) -> str:
    """Changes nothing, and may run twice."""
    return await _wait(_Execution(book, mark=mark, say=say, ms=ms), ms)


@tool(idempotent=True)
async def again(mark: str, book: str, say: str, ms: int) -> str:
    """May run twice."""
    return await _wait(_Execution(book, mark=mark, say=say, ms=ms), ms)


@tool(requires_approval=True)
async def guarded(mark: str, book: str, say: str, ms: int) -> str:
    """Runs when a person has allowed it, and not twice."""
    return await _wait(_Execution(book, mark=mark, say=say, ms=ms), ms)


@tool
def crash(mark: str, book: str, say: str) -> str:
    """Raises what no tool should."""
    execution = _Execution(book, mark=mark, say=say)
    raise RuntimeError(execution.end())


@tool
def refuse(mark: str, book: str, say: str) -> str:
    """Says that it cannot be done."""
    execution = _Execution(book, mark=mark, say=say)
    raise ToolError(execution.end())


class _Execution:
    """One execution, which is in the book as soon as it exists."""

    def __init__(self, book: str, *, mark: str, **arguments: Any) -> None:
        self._book = book
        self._id = uuid.uuid4().hex
        self._words = f"{mark} by {self._id}: {arguments['say']}"
        self._note(what="began", mark=mark, arguments={"mark": mark, **arguments})

    def end(self) -> str:
        """What the tool gives; no two executions give the same."""
        self._note(what="ended", gave=self._words)
        return self._words

    def stop(self) -> None:
        self._note(what="stopped")

    def _note(self, **line: Any) -> None:
        line |= {"id": self._id, "at_ms": time.time() * 1000, "pid": os.getpid()}
        book = os.open(self._book, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(book, f"{json.dumps(line)}\n".encode())
        finally:
            os.close(book)


async def _wait(execution: _Execution, ms: int) -> str:
    try:
        await asyncio.sleep(ms / 1000)
    except asyncio.CancelledError:
        execution.stop()
        raise
    return execution.end()
