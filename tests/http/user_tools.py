"""A user's tools, as `CONTEXTD_TOOLS` names them: each does what a test asks it to, by its arguments.

The server imports this file; no test does. What a tool did is seen in files.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

from contextd.tools import ToolError, tool

POLL_S = 0.005
HANG_S = 600


@tool(read_only=True, idempotent=True)
def echo(text: str) -> str:
    """Gives the text back."""
    return text


@tool
def note(path: str, line: str = "ran") -> str:
    """Adds a line to a file, so each run is seen."""
    _note(path, line)
    return "noted"


@tool(requires_approval=True)
def guarded(path: str, line: str = "ran") -> str:
    """The same, when a person has allowed it."""
    _note(path, line)
    return f"noted {line}"


@tool
async def hold(path: str, until: str) -> str:
    """Notes that it runs, then waits until the file `until` is there."""
    return await _hold(path, until)


@tool(read_only=True, idempotent=True)
async def hold_again(path: str, until: str) -> str:
    """The same, and may run twice."""
    return await _hold(path, until)


@tool
def block(path: str, until: str) -> str:
    """The same in a thread, where nothing can stop it."""
    _note(path, "began")
    deadline = time.monotonic() + HANG_S
    while not Path(until).exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    _note(path, "ended")
    return "released"


@tool
async def stubborn(path: str, until: str) -> str:
    """Waits for the file `until`, and does not let itself be cancelled."""
    _note(path, "began")
    deadline = time.monotonic() + HANG_S
    while not Path(until).exists() and time.monotonic() < deadline:
        try:
            await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:
            _note(path, "stays")
    return "released"


@tool
async def meet(folder: str, name: str, others: list[str]) -> str:
    """Says that it is here and waits until the others have said so too."""
    _note(f"{folder}/{name}", "here")
    while not all(Path(folder, other).exists() for other in others):
        await asyncio.sleep(POLL_S)
    return "met"


@tool
def fail(words: str) -> str:
    """Raises what no tool should."""
    raise RuntimeError(words)


@tool
def refuse(words: str) -> str:
    """Says that it cannot be done."""
    raise ToolError(words)


@tool
def leave() -> str:
    """Tries to end the process."""
    raise SystemExit(3)


@tool
def giant(size_bytes: int) -> str:
    """Answers that many letters."""
    return "x" * size_bytes


@tool
def garbled() -> bytes:
    """Answers bytes that are not UTF-8, with a U+0000."""
    return b"caf\xe9 \xff\xfe\x00 end"


@tool
def halved() -> str:
    """Answers half of a surrogate pair."""
    return "half \ud83d end"


@tool
def nothing() -> None:
    """Answers nothing."""


@tool
def answers(count: int) -> dict[str, Any]:
    """Answers a value that is no text."""
    return {"numbers": list(range(count)), "none": None}


@tool
def unspeakable() -> object:
    """Answers what has no JSON."""
    return object()


def _note(path: str, line: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


async def _hold(path: str, until: str) -> str:
    _note(path, "began")
    try:
        while not Path(until).exists():
            await asyncio.sleep(POLL_S)
    except asyncio.CancelledError:
        _note(path, "stopped")
        raise
    _note(path, "ended")
    return "released"
