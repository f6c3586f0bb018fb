"""One event loop for several servers, with a virtual clock: no thread, no socket, no real time.

Where nothing is ready the loop jumps to the next timer, so waiting costs nothing and every run of a
seed is the same. Callbacks run in the order that asyncio promises; what makes runs differ is when
the store, the models and the people answer, which each of them draws from the seed.

A callback belongs to the process in whose context it was made. The callbacks of a frozen process
wait, and those of a dead one wait until the run is over: no clean-up runs there, as after SIGSTOP and
SIGKILL.
"""

import asyncio
import heapq
import time
import weakref
from asyncio.events import Handle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

EPOCH_S = 1_750_000_000  # what the wall clocks say when a run begins
HANDLES_AT_ONCE_MAX = 100_000  # without the clock going on: then something runs in a circle


class Process:
    """One server process, as far as the loop knows of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.parked: list[Handle] = []
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class StuckError(Exception):
    """Nothing would ever happen again, or the same happens again and again."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`after_step` is called whenever everything that was ready has run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._at_this_time = 0
        self.after_step: Callable[[], None] = lambda: None
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        """Seconds since the run began."""
        return self._now

    def create_task(self, coro: Any, **options: Any) -> "asyncio.Task[Any]":
        """A task, of the process in whose context it will run."""
        task = super().create_task(coro, **options)
        context = options.get("context")
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            process.tasks.add(task)
        return task

    def freeze(self, process: Process) -> None:
        """SIGSTOP: what the process would do waits."""
        process.frozen = True

    def thaw(self, process: Process) -> None:
        """SIGCONT: what waited runs now."""
        process.frozen = process.dead = False
        self._ready.extend(process.parked)
        process.parked.clear()

    def _write_to_self(self) -> None:
        """There is no other thread that could have something to say."""

    def _run_once(self) -> None:
        if not self._ready and not self._stopping:
            self._jump()
        while self._scheduled and self._scheduled[0]._when <= self._now:
            timer = heapq.heappop(self._scheduled)
            timer._scheduled = False
            if not timer._cancelled:
                self._ready.append(timer)
        for _ in range(len(self._ready)):
            self._run(self._ready.popleft())
        self.after_step()

    def _jump(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:
            heapq.heappop(self._scheduled)._scheduled = False
        if not self._scheduled:
            raise StuckError("Nothing will ever happen again.")
        if self._scheduled[0]._when > self._now:
            self._now = self._scheduled[0]._when
            self._at_this_time = 0

    def _run(self, handle: Handle) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)
        if process is not None and (process.frozen or process.dead):
            process.parked.append(handle)
            return
        self._at_this_time += 1
        if self._at_this_time > HANDLES_AT_ONCE_MAX:
            raise StuckError(f"The clock stands still while {handle!r} and others run.")
        handle._run()

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """Cancelled timers stay until their time comes; a run is short."""


@contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """Whoever asks the `time` module meanwhile hears of the loop's clock."""

    def wall_s() -> float:
        return EPOCH_S + loop.time()

    with mock.patch.multiple(
        time,
        monotonic=loop.time,
        monotonic_ns=lambda: round(loop.time() * 1e9),
        time=wall_s,
        time_ns=lambda: round(wall_s() * 1e9),
    ):
        yield
