"""What a live reader is sent, when, and in which order (§4, §4.2)."""

from signals_rig import CONTEXT, TICK, Rig, briefs, closing, head, parse

from contextd.signals import Head
from contextd.signals.backlog import BLOCK_FRAMES_MAX


async def test_first_delta_goes_at_once() -> None:
    """A message's first position wakes the reader without waiting for the throttle."""
    rig = Rig()
    tap = rig.attach(throttle=100)
    assert tap.told() == []
    rig.head("m", 1)
    assert not tap.asleep
    assert tap.told() == [("delta", "m", 1)]


async def test_later_deltas_wait_for_the_throttle_and_merge_to_the_newest() -> None:
    """Between two deltas of one message lies the throttle, and only the newest position goes."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.head("m", 1)
    assert tap.told() == [("delta", "m", 1)]
    assert tap.told() == []
    rig.head("m", 2)
    rig.head("m", 3)
    rig.pass_ticks(15)
    assert tap.asleep
    rig.pass_ticks(1)
    assert tap.told() == [("delta", "m", 3)]
    assert rig.hub.stats.merged == 1


async def test_throttle_is_of_one_message() -> None:
    """Another message's first delta does not wait."""
    rig = Rig()
    tap = rig.attach(throttle=100)
    rig.head("a", 1)
    assert tap.told() == [("delta", "a", 1)]
    rig.head("b", 1)
    assert tap.told() == [("delta", "b", 1)]


async def test_without_throttle_every_take_gets_the_newest() -> None:
    """With throttle 0 a reader that keeps up gets each position, a slow one the newest."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    for position in (1, 2):
        rig.head("m", position)
        assert tap.told() == [("delta", "m", position)]
    for position in (3, 4, 5):
        rig.head("m", position)
    assert tap.told() == [("delta", "m", 5)]


async def test_positions_never_go_down_or_repeat() -> None:
    """An older or equal position is dropped, whether the newer one was sent or waits."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.head("m", 5)
    assert tap.told() == [("delta", "m", 5)]
    rig.head("m", 5)
    rig.head("m", 4)
    rig.pass_ticks(30)
    assert tap.told() == []
    rig.head("m", 9)
    rig.head("m", 7)
    assert tap.told() == [("delta", "m", 9)]


async def test_position_zero_is_told() -> None:
    """A produced message that was opened and has nothing yet is a delta at 0."""
    rig = Rig()
    tap = rig.attach()
    rig.head("m", 0)
    assert tap.told() == [("delta", "m", 0)]


async def test_completion_follows_the_final_delta_after_the_throttle() -> None:
    """The delta at the final position goes first, the completion at least the throttle after it."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.head("m", 1)
    rig.change(11)
    assert tap.told() == [("delta", "m", 1), ("state", "busy", 11, "id 11")]
    rig.change(12, closing("m", 3, 12), state="idle")
    rig.pass_ticks(8)
    assert tap.told() == []
    rig.pass_ticks(8)
    assert tap.told() == [("delta", "m", 3)]
    rig.pass_ticks(15)
    assert tap.told() == []
    rig.pass_ticks(1)
    assert tap.told() == [("completed", "m", 3), ("state", "idle", 12, "id 12")]


async def test_completion_at_a_position_long_sent_goes_at_once() -> None:
    """Nothing is repeated if the final position was sent a throttle ago."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.head("m", 3)
    assert tap.told() == [("delta", "m", 3)]
    rig.pass_ticks(30)
    rig.change(11, closing("m", 3, 11), state="idle")
    assert tap.told() == [("completed", "m", 3), ("state", "idle", 11, "id 11")]


async def test_completion_of_an_empty_message_needs_no_delta() -> None:
    """A message that ends at 0 is completed at once."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.change(11, closing("m", 0, 11), state="failed")
    assert tap.told() == [("completed", "m", 0), ("state", "failed", 11, "id 11")]


async def test_without_throttle_delta_completion_and_state_are_one_write() -> None:
    """In one write: deltas, completions by revision, then state; the last of them has the id."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.head("b", 1)
    rig.change(11, closing("a", 2, 11))
    rig.change(12, closing("b", 1, 12), state="idle")
    assert tap.told() == [
        ("delta", "b", 1),
        ("delta", "a", 2),
        ("completed", "a", 2),
        ("completed", "b", 1),
        ("state", "idle", 12, "id 12"),
    ]


async def test_users_completion_does_not_hold_the_state() -> None:
    """After a send the state goes at once, without an id, which comes with the completion."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.change(11, closing("u", 1, 11, role="user"), state="processing_user_message")
    assert tap.told() == [("delta", "u", 1), ("state", "processing_user_message", 11)]
    rig.pass_ticks(16)
    assert tap.told() == [("completed", "u", 1, "id 11")]


async def test_id_stays_below_a_completion_that_waits() -> None:
    """The id covers the changes before the waiting completion, and no more."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.change(11)
    rig.change(12)
    rig.change(13, closing("u", 1, 13, role="user"))
    assert tap.told() == [("delta", "u", 1), ("state", "busy", 13, "id 12")]


async def test_states_merge_and_never_go_back() -> None:
    """A reader that was away gets the newest state only; an older one is no news."""
    rig = Rig()
    tap = rig.attach()
    rig.change(11, state="a")
    rig.change(12, state="b")
    assert tap.told() == [("state", "b", 12, "id 12")]
    rig.change(12, state="b")
    rig.change(11, state="a")
    assert tap.told() == []


async def test_held_state_is_not_put_off_by_later_messages() -> None:
    """A state waits for the completions up to it, not for those that keep coming after it."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.change(11, closing("a", 1, 11), state="one")
    assert tap.told() == [("delta", "a", 1)]
    rig.pass_ticks(9)
    rig.change(12, closing("b", 1, 12), state="two")
    assert tap.told() == [("delta", "b", 1)]
    rig.pass_ticks(7)
    assert tap.told() == [("completed", "a", 1), ("state", "one", 11, "id 11")]
    rig.pass_ticks(9)
    assert tap.told() == [("completed", "b", 1), ("state", "two", 12, "id 12")]


async def test_completion_is_told_once() -> None:
    """The end of a message is not repeated, and no position follows it."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    rig.change(11, closing("m", 1, 11))
    assert len(tap.told()) == 3
    rig.change(11, closing("m", 1, 11))
    rig.head("m", 1)
    rig.head("m", 2)
    assert tap.told() == []


async def test_bookkeeping_of_a_closed_message_is_forgotten() -> None:
    """What a connection holds does not grow with the messages that have come and gone."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    for revision in range(11, 111):
        rig.change(revision, closing(f"m{revision}", 1, revision))
        assert len(tap.told()) == 3
    assert not tap.reader._backlog._tracks
    assert not tap.reader._backlog.waiting


async def test_waiting_levels_are_bounded_by_the_messages_that_changed() -> None:
    """Signals that nobody takes merge: one entry a message, however many were published."""
    rig = Rig()
    tap = rig.attach()
    for position in range(1, 1000):
        rig.head(f"m{position % 3}", position)
        rig.change(10 + position)
    assert len(tap.reader._backlog.waiting) == 3
    assert len(tap.told()) == 4


async def test_heartbeat_when_nothing_else_was_sent() -> None:
    """A heartbeat comes after a silence of its length, and again after the next one."""
    rig = Rig()
    tap = rig.attach(heartbeat=2000)
    assert tap.told() == []
    rig.pass_ticks(1999)
    assert tap.asleep
    rig.pass_ticks(1)
    assert tap.told() == [("heartbeat",)]
    assert tap.told() == []
    rig.pass_ticks(1000)
    rig.head("m", 1)
    assert tap.told() == [("delta", "m", 1)]
    assert tap.told() == []
    rig.pass_ticks(1999)
    assert tap.asleep
    rig.pass_ticks(1)
    assert tap.told() == [("heartbeat",)]


async def test_heartbeat_longer_than_the_patience_with_a_send() -> None:
    """The limit on a send may be shorter than the heartbeat, and does not bring it forward."""
    rig = Rig(slow_reader_s=3000 * TICK)
    tap = rig.attach(heartbeat=6000)
    assert tap.told() == []
    for _ in range(59):
        rig.pass_ticks(100)
    assert tap.asleep
    rig.pass_ticks(100)
    assert tap.told() == [("heartbeat",)]


async def test_no_wake_for_what_is_not_due() -> None:
    """A publish that changes nothing for a reader yet leaves it asleep."""
    rig = Rig()
    tap = rig.attach(throttle=100)
    rig.head("m", 1)
    tap.take()
    tap.take()
    rig.head("m", 2)
    rig.pass_ticks(60)
    rig.head("m", 3)
    assert tap.asleep


async def test_no_wake_for_a_state_that_is_held_back() -> None:
    """The end of a turn wakes a reader for the delta and for the rest, not for what must wait."""
    rig = Rig()
    tap = rig.attach(throttle=16)
    rig.head("m", 1)
    tap.take()
    tap.take()
    rig.change(11, closing("m", 2, 11), state="idle")
    assert tap.asleep


async def test_named_framing_names_the_type() -> None:
    """`named` puts the type in front of each event; the data are the same."""
    rig = Rig()
    plain, named = rig.attach(throttle=0), rig.attach(throttle=0, named=True)
    rig.head("m", 1)
    rig.change(11, closing("m", 1, 11))
    plain_events, named_events = parse(plain.take() or b""), parse(named.take() or b"")
    assert [event.signal for event in plain_events] == [event.signal for event in named_events]
    assert [event.name for event in plain_events] == [None] * 3
    names = ["content_delta", "message_completed", "state_changed"]
    assert [event.name for event in named_events] == names
    assert [event.id for event in named_events] == [None, None, 11]


async def test_readers_of_one_context_share_the_bytes() -> None:
    """A signal is encoded once: two readers get the same object."""
    rig = Rig()
    one, other = rig.attach(), rig.attach()
    rig.head("m", 1)
    first, second = one.take(), other.take()
    assert first is not None
    assert first is second


async def test_readers_get_their_own_context_only() -> None:
    """What is published of one context does not reach readers of another."""
    rig = Rig()
    tap = rig.attach()
    rig.hub.publish_head(
        Head(
            context_id="x", message_id="m", role="tool", kind="text", position=1, opened_revision=1
        )
    )
    assert tap.told() == []
    assert rig.hub.watched() == (CONTEXT,)


async def test_a_long_backlog_goes_in_blocks_and_the_state_last() -> None:
    """A write is bounded; what is left over comes with the next ones, in the same order."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    count = 3 * BLOCK_FRAMES_MAX
    for number in range(count):
        rig.change(11 + number, closing(f"m{number}", 1, 11 + number))
    blocks = list(tap.drain())
    assert all(len(parse(block)) <= BLOCK_FRAMES_MAX + 1 for block in blocks)
    told = [brief for block in blocks for brief in briefs(block)]
    completed = [brief[1] for brief in told if brief[0] == "completed"]
    assert sorted(completed) == sorted(f"m{number}" for number in range(count))
    assert [brief for brief in told if brief[0] == "state"] == [
        ("state", "busy", 10 + count, f"id {10 + count}")
    ]
    assert told[-1][0] == "state"


async def test_counters_count() -> None:
    """Frames and blocks are counted as they are handed over, the snapshot's included."""
    rig = Rig()
    tap = rig.attach(throttle=0)
    before = (rig.hub.stats.blocks_sent, rig.hub.stats.frames_sent)
    rig.head("m", 1)
    rig.change(11)
    tap.take()
    assert before == (1, 2)
    assert (rig.hub.stats.blocks_sent, rig.hub.stats.frames_sent) == (2, 4)


async def test_open_message_of_the_snapshot_goes_on_throttled() -> None:
    """The delta of the snapshot counts: the next one keeps its distance from it."""
    rig = Rig()
    tap = rig.attach(throttle=16, open_heads=(head("m", 4, 9),))
    rig.head("m", 5, 9)
    assert tap.told() == []
    rig.pass_ticks(16)
    assert tap.told() == [("delta", "m", 5)]
