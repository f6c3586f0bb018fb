"""Runs what blocks in threads of our own: a bounded number, which nothing ever waits for.

The executors of the standard library are joined when the interpreter ends, so one function that hangs
would keep the process alive. These threads are daemons: whoever stops waiting leaves one behind, it
counts until it is through, and a process that ends takes it along.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from contextd.tools import ToolError

THREADS_MAX = 128

T = TypeVar("T")


class ThreadsExhaustedError(ToolError):
    """As many threads are at work, or were left behind hanging, as there may be; nothing was run."""


class Threads:
    """At most `threads_max` functions at once. More are refused, not queued."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self.threads_max = threads_max
        self._free = threading.BoundedSemaphore(threads_max)

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Cancelled, it leaves the thread behind at once.

        Raises `ThreadsExhaustedError`.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if not self._free.acquire(blocking=False):
            raise ThreadsExhaustedError(
                f"The tool was not run: {self.threads_max} others are at work or hang. Try again later."
            )
        work = contextvars.copy_context().run
        thread = threading.Thread(
            target=work, args=(self._work, function, future), name="tool", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            self._free.release()
            raise ThreadsExhaustedError(
                "The tool was not run: no thread could be started."
            ) from None
        return await future

    def _work(self, function: Callable[[], T], future: "asyncio.Future[T]") -> None:
        settle: Callable[..., None]
        argument: Any
        try:
            settle, argument = _set_result, function()
        except BaseException as error:  # also SystemExit: it is for the caller to judge
            settle, argument = _set_error, error
        finally:
            self._free.release()
        with suppress(RuntimeError):  # the loop may be closed by now
            future.get_loop().call_soon_threadsafe(settle, future, argument)


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: "asyncio.Future[T]", error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):  # a future refuses it
        error = RuntimeError(f"StopIteration: {error}")
    future.set_exception(error)


_threads = Threads()


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises, run in one of the process's `THREADS_MAX` threads."""
    return await _threads.run(function)
