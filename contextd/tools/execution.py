"""Runs one call of a tool to its end, whatever the tool does (§8).

Theory of operation. The tool runs in a task of its own, whose coroutine catches everything: a task
that raises SystemExit or KeyboardInterrupt would end the event loop. When time is up or the caller is
cancelled the task is cancelled, is given a moment to clean up, and is then left behind; those that are
left are bounded. Only an async tool that blocks can hold up the loop: nothing in one thread can stop it.
"""

import asyncio
import contextvars
import traceback
from typing import Any

import msgspec
import structlog

from contextd.core.text import in_strings, without_surrogates
from contextd.core.values import JsonObject
from contextd.tools import Outcome, Tool, ToolError
from contextd.tools.text import clip, one_line
from contextd.tools.threads import SHARE_MAX, ThreadsExhaustedError, sharer

log = structlog.get_logger(__name__)

CANCEL_GRACE_S = 0.2  # for a tool to clean up; §6 gives a cancel 250 ms
ABANDONED_MAX = 128
EXCEPTION_CHARS_MAX = 500
LOGGED_FRAMES_MAX = 20

NOTHING = "The tool finished and gave no output."

_abandoned: dict[asyncio.Task[object], str] = {}  # with whose share each is


async def execute(
    tool: Tool,
    arguments: JsonObject,
    *,
    timeout_s: float,
    result_bytes_max: int,
    share: str = "",
) -> Outcome:
    """Runs `tool` once. Whatever it does there is an outcome, with content that can be stored.

    The threads that it takes, and what it leaves hanging, are of `share`: the context it works for.
    The content is never empty and has at most `result_bytes_max` bytes of UTF-8. `error` is
    `tool_error` (its own words are the content), `tool_exception`, `invalid_result` (it ran, but its
    answer has no JSON), `overloaded` (it was not run) or `timed_out`. Cancelled, it stops the tool and
    is through in 250 ms.
    """
    if len(_abandoned) >= ABANDONED_MAX or [*_abandoned.values()].count(share) >= SHARE_MAX:
        words = "The tool was not run: too many earlier calls hang. Try again later."
        return _failed("overloaded", words, result_bytes_max)
    context = contextvars.copy_context()
    context.run(sharer.set, share)
    task = asyncio.create_task(_caught(tool, arguments), name=f"tool-{tool.name}", context=context)
    try:
        await asyncio.wait([task], timeout=timeout_s)
        finished = task.done()
    finally:
        await _stop(task, share)
    if not finished:
        words = (
            f"The tool did not finish within {timeout_s:g} s. What it did until then is not known."
        )
        return Outcome(status="timed_out", content=_fit(words, result_bytes_max), error="timed_out")
    if task.cancelled():
        return _raised(tool, asyncio.CancelledError(), result_bytes_max)
    return _outcome(tool, task.result(), result_bytes_max)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _caught(tool: Tool, arguments: JsonObject) -> object:
    try:
        return await tool.run(arguments)
    except BaseException as error:
        return _Raised(error)


async def _stop(task: asyncio.Task[object], share: str) -> None:
    if task.done():
        return
    _abandoned[task] = share  # before the wait, as that may be cancelled too
    task.add_done_callback(_abandoned.pop)
    task.cancel()
    await asyncio.wait([task], timeout=CANCEL_GRACE_S)


def _outcome(tool: Tool, result: object, bytes_max: int) -> Outcome:
    if isinstance(result, _Raised):
        return _raised(tool, result.error, bytes_max)
    try:
        content = _text(result, bytes_max)
    except BaseException as error:  # what makes it JSON may be the tool's code too
        _log(tool, error)
        words = f"The tool ran, but its answer, of type {type(result).__name__}, has no JSON."
        return _failed("invalid_result", words, bytes_max)
    return Outcome(status="succeeded", content=content or _fit(NOTHING, bytes_max))


def _raised(tool: Tool, error: BaseException, bytes_max: int) -> Outcome:
    if isinstance(error, ThreadsExhaustedError):
        return _failed("overloaded", _message(error), bytes_max)
    if isinstance(error, ToolError):
        return _failed("tool_error", _message(error) or "The tool could not do it.", bytes_max)
    _log(tool, error)
    message = one_line(_message(error), EXCEPTION_CHARS_MAX)
    words = f"The tool failed: {type(error).__name__}{message and ': '}{message}"
    return _failed("tool_exception", words, bytes_max)


def _failed(error: str, words: str, bytes_max: int) -> Outcome:
    return Outcome(status="failed", content=_fit(words, bytes_max), error=error)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # `__str__` is the tool's code too
        return ""


def _log(tool: Tool, error: BaseException) -> None:
    """Where it was raised, and nothing of what it says: that may be chat text."""
    frames = traceback.StackSummary.extract(
        traceback.walk_tb(error.__traceback__), lookup_lines=False
    )
    log.warning(
        "the tool raised an exception",
        tool=tool.name,
        exception=type(error).__name__,
        frames=[f"{at.filename}:{at.lineno} {at.name}" for at in frames[-LOGGED_FRAMES_MAX:]],
    )


def _text(result: Any, bytes_max: int) -> str:
    match result:
        case None:
            return ""
        case str():
            return _fit(result, bytes_max)
        case bytes() | bytearray() | memoryview():
            head = bytes(memoryview(result).cast("B")[: bytes_max + 1])
            return _fit(head.decode(errors="replace"), bytes_max)
        case _:
            return _fit(_json(result), bytes_max)


def _json(result: object) -> str:
    try:
        return msgspec.json.encode(result).decode()
    except UnicodeEncodeError:  # half of a surrogate pair somewhere in it
        plain = msgspec.to_builtins(result, str_keys=True)
        return msgspec.json.encode(in_strings(plain, without_surrogates)).decode()


def _fit(text: str, bytes_max: int) -> str:
    return clip(text, bytes_max, f"[Cut here: a result may have {bytes_max} bytes.]")
