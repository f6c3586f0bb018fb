"""One timer for everything that waits for a time: throttles, heartbeats, patience, long polls."""

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol


class Sleeper(Protocol):
    """Whoever can be woken by the wheel; `alarm` belongs to the wheel, 0 when none is set."""

    alarm: int

    def ring(self, now: float) -> None:
        """The alarm has come, and is no longer set."""


class Wheel:
    """Alarms in buckets of one tick, with one timer of the loop for all of them.

    A sleeper has at most one alarm, and it only ever moves earlier; so nothing stale stays behind.
    """

    def __init__(self, clock: Callable[[], float], tick_s: float) -> None:
        self._clock = clock
        self._tick_s = tick_s
        self._buckets: dict[int, set[Sleeper]] = {}
        self._ticks: list[int] = []  # a heap of the buckets' ticks
        self._past = int(clock() // tick_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0

    def start(self) -> None:
        """Ring by the running loop's time from now on; without it the owner calls `advance`."""
        self._loop = asyncio.get_running_loop()
        self._set_timer()

    def stop(self) -> None:
        """Ring no more."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def arm(self, sleeper: Sleeper, at: float) -> None:
        """Ring `sleeper` at `at` seconds of the clock or within a tick after it, if not earlier."""
        # Never a tick that has passed, or a time just missed would ring again and again in one go.
        tick = max(int(-(-at // self._tick_s)), self._past + 1)
        if sleeper.alarm:
            if sleeper.alarm <= tick:
                return
            self.disarm(sleeper)
        sleeper.alarm = tick
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            heappush(self._ticks, tick)
            if self._loop is not None and (self._timer is None or tick < self._timer_tick):
                self._set_timer()
        bucket.add(sleeper)

    def disarm(self, sleeper: Sleeper) -> None:
        """Forget the alarm, if there is one."""
        bucket = self._buckets.get(sleeper.alarm)
        if bucket is not None:
            bucket.discard(sleeper)
        sleeper.alarm = 0

    def advance(self) -> None:
        """Ring everything whose tick has come."""
        now = self._clock()
        self._past = max(self._past, int(now // self._tick_s))
        while self._ticks and self._ticks[0] <= self._past:
            bucket = self._buckets.pop(heappop(self._ticks))
            for sleeper in bucket:
                sleeper.alarm = 0
            for sleeper in bucket:
                sleeper.ring(now)

    def _run(self) -> None:
        self._timer = None
        self.advance()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None and self._ticks:
            self._timer_tick = self._ticks[0]
            # A loop that counts whole milliseconds may come early; then it is asked for one more.
            delay_s = max(0.001, self._timer_tick * self._tick_s - self._clock())
            self._timer = self._loop.call_later(delay_s, self._run)
