"""How streams end: slow readers, deletion, shutdown; and what is kept of those who left (§4.2)."""

import asyncio
import time

from signals_rig import CONTEXT, TICK, Rig, Tap, closing, parse, standing

from contextd.signals import Hub


async def test_reader_whose_send_hangs_is_given_up() -> None:
    """After the limit on a send, and not before, the reader is forgotten and its owner told."""
    rig = Rig(slow_reader_s=100 * TICK)
    tap = rig.attach()
    rig.pass_ticks(90)
    assert tap.told() == []
    rig.head("m", 1)
    assert tap.take() is not None
    rig.pass_ticks(99)
    assert (tap.stuck, rig.hub.reader_count) == (0, 1)
    rig.pass_ticks(1)
    assert (tap.stuck, rig.hub.reader_count, rig.hub.stats.slow_disconnects) == (1, 0, 1)
    assert tap.take() is None
    rig.pass_ticks(1000)
    assert tap.stuck == 1


async def test_reader_that_keeps_taking_is_not_given_up() -> None:
    """Coming back for the next block shows that the one before was written."""
    rig = Rig(slow_reader_s=100 * TICK)
    tap = rig.attach(heartbeat=5000)
    for position in range(1, 20):
        rig.head("m", position)
        assert tap.take() is not None
        rig.pass_ticks(60)
        assert tap.take() is None
        rig.pass_ticks(150)
    assert (tap.stuck, rig.hub.reader_count) == (0, 1)


async def test_block_that_the_alarm_brought_forth_and_that_hangs() -> None:
    """Also a block that was due by time, not by news, is watched while it is written."""
    rig = Rig(slow_reader_s=100 * TICK)
    tap = rig.attach(heartbeat=50)
    assert tap.told() == []
    rig.pass_ticks(50)
    assert tap.told() == [("heartbeat",)]
    rig.pass_ticks(99)
    assert tap.stuck == 0
    rig.pass_ticks(1)
    assert tap.stuck == 1


async def test_page_that_hangs_is_given_up_and_a_slow_read_is_not() -> None:
    """While attaching, only the time between a page and `sent` counts."""
    rig = Rig(slow_reader_s=100 * TICK)
    tap = Tap(rig.hub.subscribe(CONTEXT, throttle_s=0.0, heartbeat_s=15.0))
    rig.pass_ticks(500)
    tap.reader.replay([closing("a", 1, 3)], up_to=3)
    rig.pass_ticks(50)
    tap.reader.sent()
    rig.pass_ticks(500)
    assert tap.stuck == 0
    tap.reader.replay([closing("b", 1, 4)], up_to=4)
    rig.pass_ticks(200)
    assert tap.stuck == 1


async def test_last_block_that_hangs_is_given_up() -> None:
    """The limit also holds for the farewell."""
    rig = Rig(slow_reader_s=100 * TICK)
    tap = rig.attach()
    rig.hub.close_all()
    assert tap.take() is not None
    rig.pass_ticks(200)
    assert tap.stuck == 1


async def test_reader_with_too_many_messages_pending_is_given_up() -> None:
    """The bound on pending messages ends the slow reader only, attaching or live."""
    rig = Rig(reader_pending_max=100)
    slow, quick = rig.attach(throttle=0), rig.attach(throttle=0)
    attaching = Tap(rig.hub.subscribe(CONTEXT, throttle_s=0.0, heartbeat_s=15.0))
    for number in range(101):
        rig.head(f"m{number}", 1)
        assert quick.take() is not None
        assert (slow.stuck, attaching.stuck) == ((0, 0) if number < 100 else (1, 1))
    assert rig.hub.reader_count == 1
    assert slow.take() is None
    rig.head("m0", 2)
    assert quick.told() == [("delta", "m0", 2)]


async def test_deleted_is_told_and_ends_the_stream() -> None:
    """Each reader gets `deleted` as its last signal; the context is no longer watched."""
    rig = Rig()
    taps = [rig.attach(), rig.attach()]
    assert taps[0].told() == []
    rig.hub.publish_deleted(CONTEXT, 11)
    assert rig.hub.watched() == ()
    for tap in taps:
        assert tap.told() == [("state", "deleted", 11, "id 11")]
        assert tap.take() is None
        assert tap.ended
        tap.reader.close()
    assert rig.hub.reader_count == 0


async def test_deleted_comes_after_the_completions_that_wait() -> None:
    """No completion is lost to the deletion, and nothing follows it."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.change(11, closing("m", 1, 11))
    rig.hub.publish_deleted(CONTEXT, 12)
    rig.change(13)
    assert tap.told() == [("delta", "m", 1)]
    assert tap.told() == []
    rig.pass_ticks(16)
    assert tap.told() == [("completed", "m", 1), ("state", "deleted", 12, "id 12")]
    assert tap.take() is None
    assert tap.ended


async def test_deleted_while_attaching() -> None:
    """A reader whose context went away before its snapshot is told so, and ends."""
    rig = Rig()
    tap = Tap(rig.hub.subscribe(CONTEXT, throttle_s=0.0, heartbeat_s=15.0))
    rig.change(11)
    rig.hub.publish_deleted(CONTEXT, 12)
    assert tap.reader.ending
    assert tap.told() == [("state", "deleted", 12)]
    assert tap.take() is None
    assert tap.ended


async def test_deleted_between_read_and_snapshot() -> None:
    """A snapshot read just before the deletion is sent, then the deletion."""
    rig = Rig()
    tap = Tap(rig.hub.subscribe(CONTEXT, throttle_s=0.0, heartbeat_s=15.0))
    rig.hub.publish_deleted(CONTEXT, 12)
    tap.reader.snapshot(changes=(), open_heads=(), standing=standing(11))
    assert tap.told() == [("state", "deleted", 12, "id 12")]
    assert tap.take() is None


async def test_close_all_says_farewell_to_everybody() -> None:
    """Each stream ends with a `retry:` of its own, after what is due; once."""
    waits = iter([1111, 2222, 3333])
    rig = Rig(jitter=lambda low, high: min(max(next(waits), low), high))
    taps = [rig.attach(), rig.attach()]
    rig.head("m", 1)
    rig.hub.close_all()
    rig.hub.close_all()
    retries = set()
    for tap in taps:
        events = parse(tap.take() or b"")
        assert [event.brief for event in events] == [("delta", "m", 1), ("retry",)]
        retries.add(events[-1].retry_ms)
        assert tap.take() is None
        assert tap.ended
    assert retries == {1111, 2222}


async def test_retries_are_spread() -> None:
    """By default the waits before a reconnect lie between one and five seconds, and differ."""
    rig = Rig()
    taps = [rig.attach() for _ in range(50)]
    rig.hub.close_all()
    retries = [parse(tap.take() or b"")[-1].retry_ms or 0 for tap in taps]
    assert min(retries) >= 1000
    assert max(retries) <= 5000
    assert len(set(retries)) > 10


async def test_subscribing_after_shutdown_began() -> None:
    """A stream that attaches too late ends at once, cleanly."""
    rig = Rig()
    rig.hub.close_all()
    tap = rig.attach()
    assert tap.reader.ending
    assert tap.told() == [("retry",)]
    assert tap.take() is None


async def test_close_wakes_the_one_who_takes() -> None:
    """`close` ends a waiting `take`, may be repeated, and leaves nothing behind."""
    rig = Rig()
    tap = rig.attach()
    assert tap.take() is None
    tap.reader.close()
    tap.reader.close()
    assert not tap.asleep
    assert tap.take() is None
    assert tap.ended
    assert (rig.hub.reader_count, rig.hub.watched()) == (0, ())
    assert not any(rig.hub._wheel._buckets.values())


async def test_last_reader_of_a_context_takes_its_topic_along() -> None:
    """A context is watched for as long as one reader is left, and then costs nothing."""
    rig = Rig()
    one, other = rig.attach(), rig.attach()
    one.reader.close()
    assert rig.hub.watched() == (CONTEXT,)
    other.reader.close()
    assert rig.hub.watched() == ()
    rig.head("m", 1)
    rig.change(11, closing("m", 1, 11))
    rig.hub.publish_deleted(CONTEXT, 12)
    rig.hub.fill(CONTEXT, after=1, standing=standing(12))
    assert rig.hub.contiguous(CONTEXT) is None
    assert rig.gaps == []


async def test_the_loop_keeps_the_time() -> None:
    """After `start`, throttles are kept without anyone calling `advance`."""
    hub = Hub(database_id="base", clock=time.monotonic, now_ms=lambda: 0, tick_s=0.001)
    hub.start()
    try:
        reader = hub.subscribe(CONTEXT, throttle_s=0.02, heartbeat_s=15.0)
        reader.snapshot(changes=(), open_heads=(), standing=standing(10))
        hub.publish(revision=11, closings=[closing("m", 1, 11)], standing=standing(11))
        async with asyncio.timeout(30):
            first = await reader.take()
            second = await reader.take()
        assert [event.brief for event in parse(first or b"")] == [("delta", "m", 1)]
        assert parse(second or b"")[0].brief == ("completed", "m", 1)
        reader.close()
    finally:
        hub.stop()
