"""Alarms, one timer for all."""

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.signals.wheel import Wheel

TICK = 2**-7


class _Clock:
    def __init__(self) -> None:
        self.now = 64.0

    def __call__(self) -> float:
        return self.now


class _Sleeper:
    def __init__(self, rung: Callable[[float], None]) -> None:
        self.alarm = 0
        self._rung = rung

    def ring(self, now: float) -> None:
        self._rung(now)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=40))
def test_rings_within_a_tick_after_its_time_and_never_before(plan: list[tuple[int, int]]) -> None:
    """Each alarm rings once, not before its time, and at the first tick after it."""
    clock = _Clock()
    wheel = Wheel(clock, TICK)
    rung: list[tuple[float, float]] = []
    sleepers = []
    for start, quarters in plan:
        at = clock.now + (start + quarters / 4) * TICK
        sleeper = _Sleeper(lambda now, at=at: rung.append((at, now)))
        sleepers.append(sleeper)
        wheel.arm(sleeper, at)
    for _ in range(60):
        clock.now += TICK
        wheel.advance()
    assert len(rung) == len(plan)
    assert all(at <= now < at + TICK or now == 64.0 + TICK for at, now in rung)
    assert all(sleeper.alarm == 0 for sleeper in sleepers)


def test_an_alarm_moves_earlier_only() -> None:
    """A sleeper has one alarm: an earlier time replaces it, a later one does not."""
    clock = _Clock()
    wheel = Wheel(clock, TICK)
    rung: list[float] = []
    sleeper = _Sleeper(rung.append)
    wheel.arm(sleeper, 65.0)
    wheel.arm(sleeper, 64.5)
    wheel.arm(sleeper, 66.0)
    for now in (64.25, 64.5, 65.0, 66.0):
        clock.now = now
        wheel.advance()
    assert rung == [64.5]


def test_disarmed_does_not_ring() -> None:
    """A forgotten alarm stays silent, and forgetting twice is harmless."""
    clock = _Clock()
    wheel = Wheel(clock, TICK)
    rung: list[float] = []
    sleeper = _Sleeper(rung.append)
    wheel.arm(sleeper, 64.5)
    wheel.disarm(sleeper)
    wheel.disarm(sleeper)
    clock.now = 65.0
    wheel.advance()
    assert rung == []


@pytest.mark.timeout(10)
def test_arming_for_the_past_rings_with_the_next_tick() -> None:
    """Who sets an alarm for now while it rings is rung once a tick, not for ever."""
    clock = _Clock()
    wheel = Wheel(clock, TICK)
    rung: list[float] = []

    def again(now: float) -> None:
        rung.append(now)
        wheel.arm(sleeper, now - 1.0)

    sleeper = _Sleeper(again)
    wheel.arm(sleeper, 64.0)
    for _ in range(3):
        clock.now += TICK
        wheel.advance()
    assert rung == [64.0 + n * TICK for n in (1, 2, 3)]


async def test_the_loop_rings_the_earliest_first() -> None:
    """Started, the wheel rings by itself, also what was armed earlier than the timer was set for."""
    wheel = Wheel(time.monotonic, 0.001)
    rung: list[str] = []
    both = asyncio.Event()

    def ring(name: str) -> None:
        rung.append(name)
        if len(rung) == 2:
            both.set()

    late, early = _Sleeper(lambda _: ring("late")), _Sleeper(lambda _: ring("early"))
    wheel.arm(late, time.monotonic() + 0.03)
    wheel.start()
    wheel.arm(early, time.monotonic() + 0.005)
    async with asyncio.timeout(30):
        await both.wait()
    wheel.stop()
    assert rung == ["early", "late"]


async def test_stopped_rings_no_more() -> None:
    """After `stop` nothing is left in the loop, and a second stop is harmless."""
    wheel = Wheel(time.monotonic, 0.001)
    wheel.start()
    wheel.arm(_Sleeper(lambda _: None), time.monotonic() + 60.0)
    timer = wheel._timer
    assert timer is not None
    wheel.stop()
    wheel.stop()
    assert timer.cancelled()
    wheel.arm(_Sleeper(lambda _: None), time.monotonic())
    assert wheel._timer is None
