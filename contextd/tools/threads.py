"""Runs what blocks in threads of our own: a bounded number, which nothing ever waits for.

Tools have a share of the threads for each context, so that one whose tools hang takes none from the
others; what the server itself reads has threads of its own.

The executors of the standard library are joined when the interpreter ends, so one function that hangs
would keep the process alive. These threads are daemons: whoever stops waiting leaves one behind, it
counts until it is through, and a process that ends takes it along.
"""

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from contextd.tools import ToolError

THREADS_MAX = 128
SHARE_MAX = 32

T = TypeVar("T")


class ThreadsExhaustedError(ToolError):
    """As many threads are at work, or were left behind hanging, as there may be; nothing was run."""


# Whose share a thread is taken from: the context of the call that is run.
sharer: contextvars.ContextVar[str] = contextvars.ContextVar("sharer", default="")


class Threads:
    """At most `threads_max` functions at once, of one sharer `share_max`. More are refused, not queued."""

    def __init__(self, threads_max: int, share_max: int | None = None) -> None:
        self._threads_max = threads_max
        self._share_max = share_max or threads_max
        self._lock = threading.Lock()  # a thread gives itself back
        self._taken: Counter[str] = Counter()

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Cancelled, it leaves the thread behind at once.

        Raises `ThreadsExhaustedError`.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        share = sharer.get()
        self._take(share)
        work = contextvars.copy_context().run
        thread = threading.Thread(
            target=work, args=(self._work, share, function, future), name="tool", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            self._give_back(share)
            raise ThreadsExhaustedError(
                "The tool was not run: no thread could be started."
            ) from None
        return await future

    def _take(self, share: str) -> None:
        with self._lock:
            mine, all_ = self._taken[share], self._taken.total()
            if mine >= self._share_max or all_ >= self._threads_max:
                count = mine if mine >= self._share_max else all_
                raise ThreadsExhaustedError(
                    f"The tool was not run: {count} others are at work or hang. Try again later."
                )
            self._taken[share] += 1

    def _give_back(self, share: str) -> None:
        with self._lock:
            self._taken[share] -= 1
            if not self._taken[share]:
                del self._taken[share]

    def _work(self, share: str, function: Callable[[], T], future: "asyncio.Future[T]") -> None:
        settle: Callable[..., None]
        argument: Any
        try:
            settle, argument = _set_result, function()
        except BaseException as error:  # also SystemExit: it is for the caller to judge
            settle, argument = _set_error, error
        finally:
            self._give_back(share)
        with suppress(RuntimeError):  # the loop may be closed by now
            future.get_loop().call_soon_threadsafe(settle, future, argument)


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: "asyncio.Future[T]", error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):  # a future refuses it
        error = RuntimeError("StopIteration")
    future.set_exception(error)


_tools = Threads(THREADS_MAX, SHARE_MAX)
_own = Threads(SHARE_MAX)


async def in_tool_thread(function: Callable[[], T]) -> T:
    """What `function`, a tool, returns or raises, run in a thread of the `sharer`."""
    return await _tools.run(function)


async def in_thread(function: Callable[[], T]) -> T:
    """The same for what the server reads for itself, which no tool keeps from running."""
    return await _own.run(function)
