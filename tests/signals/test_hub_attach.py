"""Attaching, replaying, and what is published meanwhile; holes in the revisions (§4.1, §4.2)."""

from signals_rig import CONTEXT, Rig, Tap, briefs, closing, head, standing

from contextd.signals import Reader


def _subscribe(rig: Rig, throttle: float = 0.0) -> Reader:
    return rig.hub.subscribe(CONTEXT, throttle_s=throttle, heartbeat_s=15.0)


async def test_snapshot_order() -> None:
    """Changes by revision, open messages not yet named, the state with the id, one heartbeat."""
    rig = Rig()
    reader = _subscribe(rig)
    block = reader.snapshot(
        changes=[closing("a", 3, 7), head("b", 2, 8)],
        open_heads=[head("b", 2, 8), head("c", 5, 4)],
        standing=standing(10),
    )
    assert briefs(block) == [
        ("completed", "a", 3),
        ("delta", "b", 2),
        ("delta", "c", 5),
        ("state", "busy", 10, "id 10"),
        ("heartbeat",),
    ]


async def test_replay_page_ends_with_its_cursor() -> None:
    """Of a page only the last frame carries the id, whatever it is; an empty page is no bytes."""
    rig = Rig()
    reader = _subscribe(rig)
    page = reader.replay([closing("a", 3, 7), head("b", 2, 8)], up_to=8)
    assert briefs(page) == [("completed", "a", 3), ("delta", "b", 2, "id 8")]
    assert briefs(reader.replay([closing("c", 1, 9)], up_to=None)) == [("completed", "c", 1)]
    assert reader.replay([], up_to=9) == b""


async def test_named_on_an_earlier_page_is_not_named_again() -> None:
    """An open message is named once; what it grew by meanwhile follows, at its distance."""
    rig = Rig()
    tap = Tap(_subscribe(rig, throttle=16 * 2**-7))
    tap.reader.replay([head("a", 2, 3), head("b", 2, 4)], up_to=4)
    block = tap.reader.snapshot(
        changes=(), open_heads=[head("a", 2, 3), head("b", 6, 4)], standing=standing(10)
    )
    assert briefs(block) == [("state", "busy", 10, "id 10"), ("heartbeat",)]
    assert tap.told() == []
    rig.pass_ticks(16)
    assert tap.told() == [("delta", "b", 6)]


async def test_named_long_ago_is_named_anew_if_it_grew() -> None:
    """When the throttle has passed since its page, the snapshot tells the newer position itself."""
    rig = Rig()
    reader = _subscribe(rig, throttle=16 * 2**-7)
    reader.replay([head("a", 2, 3)], up_to=3)
    rig.pass_ticks(16)
    block = reader.snapshot(changes=(), open_heads=[head("a", 6, 3)], standing=standing(10))
    assert briefs(block)[0] == ("delta", "a", 6)


async def test_nothing_is_sent_before_the_snapshot() -> None:
    """Live signals merge in the reader from the subscription on, and wait for the snapshot."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    rig.head("m", 1)
    rig.change(11, closing("m", 2, 11))
    assert tap.told() == []
    assert tap.asleep


async def test_what_the_snapshot_covers_is_dropped() -> None:
    """Closings, positions and states that the snapshot already tells are not told again."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    rig.head("closed", 2, 8)
    rig.head("open", 3, 7)
    rig.change(9)
    rig.change(10, closing("closed", 2, 10))
    tap.reader.snapshot(
        changes=[closing("closed", 2, 10)], open_heads=[head("open", 3, 7)], standing=standing(10)
    )
    assert tap.told() == []


async def test_what_the_snapshot_lacks_is_sent_after_it() -> None:
    """A newer position, a new message, a later end and a later state come live."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    rig.head("open", 4, 7)
    rig.head("new", 1, 11)
    rig.change(11)
    rig.change(12, closing("ends", 5, 12), state="idle")
    tap.reader.snapshot(
        changes=(), open_heads=[head("open", 3, 7), head("ends", 2, 6)], standing=standing(10)
    )
    assert tap.told() == [
        ("delta", "open", 4),
        ("delta", "new", 1),
        ("delta", "ends", 5),
        ("completed", "ends", 5),
        ("state", "idle", 12, "id 12"),
    ]


async def test_published_late_but_in_the_snapshot_is_dropped() -> None:
    """A snapshot may see a commit before it is published: then its publication is no news."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    tap.reader.snapshot(changes=[closing("m", 5, 12)], open_heads=(), standing=standing(12))
    rig.head("m", 4, 11)
    rig.change(11)
    rig.head("m", 5, 11)
    rig.change(12, closing("m", 5, 12))
    assert tap.told() == []
    rig.change(13)
    assert tap.told() == [("state", "busy", 13, "id 13")]
    assert rig.gaps == []


async def test_position_published_before_the_snapshot_of_a_message_closed_in_it() -> None:
    """A position that merged while attaching is no news if the snapshot has the message closed."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    rig.head("m", 4, 11)
    tap.reader.snapshot(changes=[closing("m", 5, 12)], open_heads=(), standing=standing(12))
    assert tap.told() == []


async def test_position_in_the_snapshot_ahead_of_its_publication() -> None:
    """Positions of an open message that the snapshot was ahead of are dropped, later ones sent."""
    rig = Rig()
    tap = rig.attach(throttle=0, open_heads=(head("m", 6, 9),))
    rig.head("m", 5, 9)
    rig.head("m", 6, 9)
    assert tap.told() == []
    rig.head("m", 7, 9)
    assert tap.told() == [("delta", "m", 7)]


async def test_held_levels_while_attaching_do_not_hold_afterwards() -> None:
    """A completion that the snapshot covered holds back no later state, and rings no alarm."""
    rig = Rig()
    tap = Tap(_subscribe(rig, throttle=1.0))
    tap.reader.replay([head("m", 1, 8)], up_to=8)
    rig.head("m", 2, 8)
    rig.change(9, closing("m", 2, 9))
    tap.reader.snapshot(changes=[closing("m", 2, 9)], open_heads=(), standing=standing(9))
    assert tap.told() == []
    rig.pass_ticks(200)
    assert tap.asleep
    rig.change(10)
    assert tap.told() == [("state", "busy", 10, "id 10")]


async def test_gap_is_asked_for_once_and_no_id_is_sent_beyond_it() -> None:
    """A missing revision is asked for; signals go on, but their ids stop before the hole."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.change(12)
    rig.change(13)
    assert rig.gaps == [CONTEXT]
    assert rig.hub.contiguous(CONTEXT) == 10
    assert tap.told() == [("state", "busy", 13)]


async def test_fill_closes_the_gap() -> None:
    """What was missing is told, and the revisions published beyond it count again."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.change(13)
    assert tap.told() == [("state", "busy", 13)]
    rig.hub.fill(
        CONTEXT,
        after=10,
        heads=[head("open", 2, 12)],
        closings=[closing("m", 1, 11)],
        standing=standing(12),
    )
    assert rig.hub.contiguous(CONTEXT) == 13
    assert tap.told() == [
        ("delta", "open", 2),
        ("delta", "m", 1),
        ("completed", "m", 1, "id 13"),
    ]
    rig.change(14)
    assert tap.told() == [("state", "busy", 14, "id 14")]
    assert rig.gaps == [CONTEXT]


async def test_fill_that_does_not_reach_asks_again() -> None:
    """A fill below the hole's end, or read from above its start, leaves it open."""
    rig = Rig()
    rig.attach()
    rig.change(15)
    rig.hub.fill(CONTEXT, after=10, standing=standing(12))
    assert rig.gaps == [CONTEXT] * 2
    assert rig.hub.contiguous(CONTEXT) == 12
    rig.hub.fill(CONTEXT, after=13, standing=standing(15))
    assert rig.gaps == [CONTEXT] * 3
    rig.hub.fill(CONTEXT, after=12, standing=standing(14))
    assert rig.gaps == [CONTEXT] * 3
    assert rig.hub.contiguous(CONTEXT) == 15


async def test_fill_repeats_nothing() -> None:
    """An end that was published beyond the hole is not told again when the hole is filled."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.change(12, closing("m", 1, 12))
    assert ("completed", "m", 1) in tap.told()
    rig.hub.fill(CONTEXT, after=10, closings=[closing("m", 1, 12)], standing=standing(12))
    assert tap.told() == []


async def test_fill_without_a_gap_brings_what_was_lost() -> None:
    """What another process changed is told when the revisions are read again, with its id."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.hub.fill(CONTEXT, after=10, closings=[closing("m", 2, 11)], standing=standing(12))
    assert tap.told() == [
        ("delta", "m", 2),
        ("completed", "m", 2),
        ("state", "busy", 12, "id 12"),
    ]


async def test_two_gaps_are_filled_by_one_read() -> None:
    """Of several holes only the last run beyond is remembered, and a fill up to it is enough."""
    rig = Rig()
    rig.attach()
    rig.change(12)
    rig.change(14)
    rig.change(15)
    rig.hub.fill(CONTEXT, after=10, standing=standing(13))
    assert rig.hub.contiguous(CONTEXT) == 15
    assert rig.gaps == [CONTEXT]


async def test_missing_revision_arrives_late() -> None:
    """A revision that was only late closes the hole by itself."""
    rig = Rig()
    tap = rig.attach()
    rig.change(12)
    assert tap.told() == [("state", "busy", 12)]
    rig.change(11)
    rig.change(13)
    assert tap.told() == [("state", "busy", 13, "id 13")]


async def test_publications_before_the_first_snapshot_connect_to_it() -> None:
    """What was published since the subscription counts, if the snapshot reaches up to it."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    assert rig.hub.contiguous(CONTEXT) is None
    rig.change(11)
    rig.change(12)
    tap.reader.snapshot(changes=(), open_heads=(), standing=standing(11))
    assert tap.told() == [("state", "busy", 12, "id 12")]
    assert rig.gaps == []


async def test_publications_that_do_not_connect_to_the_snapshot_are_a_gap() -> None:
    """A revision lost between the snapshot and the first publication is asked for."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    rig.change(13)
    tap.reader.snapshot(changes=(), open_heads=(), standing=standing(11))
    assert rig.gaps == [CONTEXT]
    assert rig.hub.contiguous(CONTEXT) == 11
    assert tap.told() == [("state", "busy", 13)]


async def test_snapshot_of_another_reader_promises_nothing_to_this_one() -> None:
    """One reader's newer snapshot gives no id to a reader that lacks what lies between them."""
    rig = Rig()
    early, late = Tap(_subscribe(rig)), Tap(_subscribe(rig))
    late.reader.snapshot(changes=(), open_heads=(), standing=standing(20))
    early.reader.snapshot(changes=(), open_heads=(), standing=standing(13))
    rig.change(21)
    assert rig.gaps == [CONTEXT]
    assert early.told() == [("state", "busy", 21)]
    rig.hub.fill(
        CONTEXT,
        after=rig.hub.contiguous(CONTEXT) or 0,
        closings=[closing("m", 1, 15)],
        standing=standing(20),
    )
    assert early.told() == [("delta", "m", 1), ("completed", "m", 1, "id 21")]
    assert late.told() == [("state", "busy", 21, "id 21")]


async def test_publisher_behind_a_snapshot_catches_up_without_a_gap() -> None:
    """In order but late is no hole, and each reader takes what its own snapshot lacks."""
    rig = Rig()
    early, late = Tap(_subscribe(rig)), Tap(_subscribe(rig))
    late.reader.snapshot(changes=[closing("m", 1, 12)], open_heads=(), standing=standing(12))
    rig.change(11)
    early.reader.snapshot(changes=(), open_heads=(), standing=standing(10))
    rig.change(12, closing("m", 1, 12))
    assert rig.gaps == []
    assert late.told() == []
    assert early.told() == [
        ("delta", "m", 1),
        ("completed", "m", 1),
        ("state", "busy", 12, "id 12"),
    ]


async def test_head_that_arrives_after_the_end_is_dropped() -> None:
    """A position of another process that was overtaken by the end is no news."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.change(11, closing("m", 5, 11))
    tap.take()
    rig.head("m", 5)
    rig.hub.fill(CONTEXT, after=11, heads=[head("m", 4)], standing=standing(11))
    assert tap.told() == []


async def test_pages_while_the_stream_ends() -> None:
    """A route in the middle of a replay can see that it should stop."""
    rig = Rig()
    tap = Tap(_subscribe(rig))
    tap.reader.replay([head("m", 1, 3)], up_to=3)
    assert not tap.reader.ending
    rig.hub.close_all()
    assert tap.reader.ending
    assert tap.told() == [("retry",)]
    assert tap.take() is None
    assert tap.ended
