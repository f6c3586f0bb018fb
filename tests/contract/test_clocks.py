"""Elapsed time over several servers whose clocks differ, and over clocks that are set, on both databases."""

import asyncio

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.app import Contextd, now_ms
from contextd.core.context import ContextRequest
from contextd.core.message import MessageStatus
from contextd.core.producing import OpenRequest, Producer
from contextd.core.turn import Turn
from contextd.store.tables import contexts, turns

from .conftest import HeldProvider, Start
from .test_tool_turns import ASK, asks
from .test_turns import DEADLINE_S, begin, idle, send, until

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WHILE_MS = 60_000  # that no test takes


class Wall:
    """A server's wall clock, `skew_ms` beside the true time."""

    def __init__(self, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms

    def __call__(self) -> int:
        return now_ms() + self.skew_ms


async def the_turn(contextd: Contextd) -> Turn:
    (turn,) = (await contextd.service.records.turns("a", cursor=None, limit=10)).items
    return turn


async def open_message(contextd: Contextd, message_id: str) -> None:
    request = OpenRequest(producer=Producer(id="worker", epoch=1))
    await contextd.service.producers.open("a", message_id, request)


async def write(contextd: Contextd, message_id: str, sequence: int) -> None:
    live = await contextd.service.producers.find("a", message_id)
    await contextd.service.producers.append(
        live, epoch=1, texts=["x"], sizes=[1], sequences=[sequence]
    )


async def status(contextd: Contextd, message_id: str) -> MessageStatus:
    return (await contextd.service.messages.get("a", message_id)).status


async def write_until_other_is_silent(writer: Contextd, wall: Wall) -> None:
    """Sets `wall` and writes "busy" often, and "silent" never, until somebody takes "silent" away."""
    await writer.service.contexts.create(ContextRequest(id="a"))
    for message_id in ("silent", "busy", "repeated"):
        await open_message(writer, message_id)
    await write(writer, "repeated", 1)
    sequence = 0
    async with asyncio.timeout(DEADLINE_S):
        while await status(writer, "silent") is MessageStatus.STREAMING:
            sequence += 1
            await write(writer, "busy", sequence)
            await write(writer, "repeated", 1)  # a repeat is a sign of life
            wall.skew_ms *= -1
            await asyncio.sleep(0.01)
    for message_id in ("busy", "repeated"):
        assert await status(writer, message_id) is MessageStatus.STREAMING
    assert await status(writer, "silent") is MessageStatus.INTERRUPTED


@pytest.mark.parametrize("skew_ms", [5 * HOUR_MS, -5 * HOUR_MS])
async def test_a_server_with_another_clock_takes_no_message_away(
    start: Start, skew_ms: int
) -> None:
    """§7: silence is the time without a write, whichever server looks and whichever is written at."""
    wall = Wall(skew_ms)
    async with (
        start(producer_silence_s=0.5) as one,
        start(producer_silence_s=0.5, clock_ms=wall) as two,
    ):
        await write_until_other_is_silent(one, Wall())
        await two.service.contexts.delete("a")


async def test_a_clock_that_is_set_takes_no_message_away(start: Start) -> None:
    """§7: forwards and back by a month all the time, and still only the silent one is lost."""
    wall = Wall(30 * DAY_MS)
    async with start(producer_silence_s=0.5, clock_ms=wall) as contextd:
        await write_until_other_is_silent(contextd, wall)


@pytest.mark.parametrize("set_by_ms", [30 * DAY_MS, -30 * DAY_MS])
async def test_a_clock_that_is_set_is_no_work_of_a_turn(
    start: Start, provider: HeldProvider, set_by_ms: int
) -> None:
    """§6: `first_chunk_ms`, phases, the journal's durations and stats are times that passed."""
    wall = Wall()
    async with start(clock_ms=wall) as contextd:
        await begin(contextd, provider)
        await provider.asked.wait()
        wall.skew_ms = set_by_ms
        provider.say("Hel")
        await until(contextd, lambda context: context.state == "streaming_llm_response")
        wall.skew_ms = 0
        provider.say("lo", None)
        await until(contextd, idle)
        turn = await the_turn(contextd)
        assert turn.first_chunk_ms is not None
        entries = (await contextd.service.records.transitions("a", cursor=None, limit=100)).items
        stats = (await contextd.service.messages.get("a", turn.message_ids[-1])).stats
        assert stats is not None
        times = (
            turn.first_chunk_ms,
            *turn.phases.values(),
            *(entry.duration_ms for entry in entries[1:]),
            stats.first_chunk_ms or 0,
            stats.total_ms,
            stats.mean_interval_ms or 0,
        )
        assert all(0 <= ms < WHILE_MS for ms in times), times


async def test_a_turn_that_stood_still_for_months(start: Start, provider: HeldProvider) -> None:
    """Its first chunk is stored after more milliseconds than 32 bits hold (25 days)."""
    async with start() as contextd:
        await begin(contextd, provider)
        await provider.asked.wait()

        async def age(connection: AsyncConnection) -> None:
            earlier = turns.c.started_at - 400 * DAY_MS
            await connection.execute(update(turns).values(started_at=earlier))

        await contextd.service.ledger.writer.change(age)
        provider.say("whole", None)
        await until(contextd, idle)
        assert ((await the_turn(contextd)).first_chunk_ms or 0) >= 400 * DAY_MS


async def test_a_wait_is_as_long_as_it_is(start: Start, provider: HeldProvider) -> None:
    """§6: a clock that is set ends no wait; one that is overdue ends, also after the clock was set back."""
    wall = Wall()
    async with start(clock_ms=wall) as contextd:
        recovery = contextd.service.recovery
        await contextd.service.contexts.create(ContextRequest(id="a", tools=[ASK]))
        await send(contextd, "Hello")
        provider.say(*asks(("ask", {})))
        await until(contextd, lambda context: context.state == "awaiting_tool_results")
        for skew_ms in (30 * DAY_MS, -DAY_MS, 0):
            wall.skew_ms = skew_ms
            await recovery.fail_overdue(HOUR_MS)
        assert (await contextd.service.contexts.get("a")).state == "awaiting_tool_results"

        async def age(connection: AsyncConnection) -> None:
            earlier = contexts.c.state_since - 2 * HOUR_MS
            await connection.execute(update(contexts).values(state_since=earlier))

        await contextd.service.ledger.writer.change(age)
        wall.skew_ms = -DAY_MS
        await recovery.fail_overdue(3 * HOUR_MS)
        assert (await contextd.service.contexts.get("a")).state == "awaiting_tool_results"
        await recovery.fail_overdue(HOUR_MS)
        assert (await contextd.service.contexts.get("a")).state == "failed"
