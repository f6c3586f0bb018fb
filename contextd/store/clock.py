"""Time to store and to show, and how long ago a stored time was, also after the wall clock was set.

Stored times are those of the database's clock, so that several servers agree: on PostgreSQL its own, which
is asked now and then and carried on by the monotonic clock; on SQLite the wall clock of the one machine.
Both can be set. So the clock remembers its *eras*: the stretches of monotonic time between two settings,
each with its distance to the times that were stored in it.
"""

import time
from collections.abc import Callable

SET_MS = 1000  # a difference to the monotonic clock above this is a setting, below it drift
ERAS_MAX = 32


class _Era:
    """`start` and `end` are monotonic milliseconds; a stored time is monotonic time + `offset`."""

    __slots__ = ("end", "offset", "start")

    def __init__(self, start: float, end: float, offset: float) -> None:
        self.start = start
        self.end = end
        self.offset = offset


class Clock:
    """`wall_ms` is the wall clock; `monotonic_s` one that is never set. Tests own both."""

    def __init__(
        self, wall_ms: Callable[[], int], monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall_ms = wall_ms
        self._monotonic_s = monotonic_s
        self._follows_database = False
        now = self._monotonic_ms()
        self._eras = [_Era(float("-inf"), now, wall_ms() - now)]

    def now_ms(self) -> int:
        """Milliseconds since the epoch, UTC."""
        now = self._monotonic_ms()
        if not self._follows_database:
            self._observe(now, self._wall_ms())
        self._eras[-1].end = now
        return round(now + self._eras[-1].offset)

    def follow(self, database_ms: int) -> None:
        """From now on this is the database's clock, which says `database_ms` at this moment."""
        now = self._monotonic_ms()
        if self._follows_database:
            self._observe(now, database_ms)
        else:  # nothing was stored by the wall clock yet
            self._eras = [_Era(float("-inf"), now, database_ms - now)]
        self._follows_database = True

    def elapsed_ms(self, since_ms: int) -> int:
        """How long ago the time `since_ms` was stored, 0 at least; settings in between do not count.

        Where a time was stored twice, because the clock was set back, the later moment is meant.
        """
        shown = self.now_ms()
        now = self._eras[-1].end
        for era in reversed(self._eras):
            moment = since_ms - era.offset
            if era.start - SET_MS <= moment <= era.end + SET_MS:
                return max(0, round(now - moment))
        return max(0, shown - since_ms)

    def latest_ms(self, ago_ms: float) -> int:
        """A time such that none after it was stored `ago_ms` ago or earlier: to narrow a query down."""
        self.now_ms()
        moment = self._eras[-1].end - ago_ms
        found = [min(era.end, moment) + era.offset for era in self._eras if era.start <= moment]
        return round(max(found)) + SET_MS

    def _observe(self, now: float, reading_ms: int) -> None:
        offset = reading_ms - now
        newest = self._eras[-1]
        if abs(offset - newest.offset) > SET_MS:
            self._eras.append(_Era(newest.end, now, offset))
            del self._eras[1:-ERAS_MAX]  # the first has what was stored before this process
        else:
            newest.offset = offset

    def _monotonic_ms(self) -> float:
        return self._monotonic_s() * 1000
