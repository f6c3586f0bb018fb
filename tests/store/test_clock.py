"""How long ago a stored time was, whatever is done to the wall clock."""

import pytest

from contextd.store.clock import Clock

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Times:
    """A wall clock that can be set, and a monotonic one."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000_000
        self.monotonic = 5_000.0

    def wall_ms(self) -> int:
        return self.wall

    def monotonic_s(self) -> float:
        return self.monotonic / 1000

    def go(self, ms: int) -> None:
        """So much time passes."""
        self.wall += ms
        self.monotonic += ms


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def clock(times: Times) -> Clock:
    return Clock(times.wall_ms, times.monotonic_s)


@pytest.mark.parametrize("set_by", [0, 30 * DAY_MS, -30 * DAY_MS, HOUR_MS, -HOUR_MS, 400, -400])
def test_a_setting_is_no_time(times: Times, clock: Clock, set_by: int) -> None:
    """What was stored before a setting is as old as it is, and so is what is stored after it."""
    before = clock.now_ms()
    times.go(500)
    times.wall += set_by
    after = clock.now_ms()
    assert after == times.wall
    times.go(7000)
    assert clock.elapsed_ms(before) == pytest.approx(7500, abs=400)
    assert clock.elapsed_ms(after) == 7000


def test_a_time_that_was_stored_twice(times: Times, clock: Clock) -> None:
    """Where the clock was set back the later moment is meant: nobody is late too early."""
    first = clock.now_ms()
    times.go(2 * HOUR_MS)
    clock.now_ms()
    times.wall -= 2 * HOUR_MS
    assert clock.now_ms() == first
    times.go(1000)
    assert clock.elapsed_ms(first) == 1000


def test_what_was_stored_before_this_process(times: Times, clock: Clock) -> None:
    """By the wall clock, as it was at the start; a time that is yet to come is now."""
    yesterday = times.wall - DAY_MS
    times.go(1000)
    clock.now_ms()
    times.wall += 300 * DAY_MS
    assert clock.elapsed_ms(yesterday) == DAY_MS + 1000
    assert clock.elapsed_ms(times.wall + DAY_MS) == 0


def test_all_that_is_old_enough_is_found(times: Times, clock: Clock) -> None:
    """`latest_ms` leaves nothing out that `elapsed_ms` calls old, across settings in both directions."""
    stored = []
    for set_by in (0, DAY_MS, -3 * DAY_MS, HOUR_MS, -HOUR_MS, 0):
        times.wall += set_by
        for _ in range(5):
            stored.append(clock.now_ms())
            times.go(20_000)
    for ago_ms in (0, 10_000, 60_000, 250_000, DAY_MS):
        latest = clock.latest_ms(ago_ms)
        assert all(at <= latest for at in stored if clock.elapsed_ms(at) > ago_ms)


def test_many_settings_are_bounded(times: Times, clock: Clock) -> None:
    """A clock that is set all the time costs no memory, and what was stored first stays in order."""
    for _ in range(1000):
        times.go(10)
        times.wall -= HOUR_MS
        newest = clock.now_ms()
    times.go(50)
    assert clock.elapsed_ms(newest) == 50
    assert len(clock._eras) <= 40


def test_the_databases_clock(times: Times, clock: Clock) -> None:
    """Once it is followed, only it counts: this machine's may be hours off, or set."""
    database = times.wall + 5 * HOUR_MS
    clock.follow(database)
    assert clock.now_ms() == database
    times.wall -= DAY_MS
    times.go(1000)
    assert clock.now_ms() == database + 1000
    assert clock.elapsed_ms(database - 3000) == 4000
    clock.follow(database + 1000 + HOUR_MS)
    assert clock.now_ms() == database + 1000 + HOUR_MS
    assert clock.elapsed_ms(database) == 1000
