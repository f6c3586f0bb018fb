"""Look-outs for long polls (§3.3)."""

import pytest
from signals_rig import CONTEXT, Rig, Stepped, closing, standing

from contextd.signals import Watch


def _wait(watch: Watch, after: int, timeout_s: float = 30.0) -> Stepped:
    waiting = Stepped(watch.reached(after, timeout_s))
    waiting.step()
    return waiting


async def test_position_above_wakes() -> None:
    """A position that the poller already holds does not wake it, a newer one does."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        waiting = _wait(watch, after=3)
        rig.head("m", 3)
        rig.head("other", 9)
        assert not waiting.step()
        rig.head("m", 4)
        assert waiting.step()


async def test_closing_wakes() -> None:
    """The end of the message wakes, whatever its position."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        waiting = _wait(watch, after=3)
        rig.change(11, closing("other", 1, 11))
        assert not waiting.step()
        rig.change(12, closing("m", 3, 12))
        assert waiting.step()


@pytest.mark.parametrize("news", ["head", "closing", "deleted", "shutdown", "fill"])
async def test_news_between_the_read_and_the_wait_is_not_missed(news: str) -> None:
    """What happens after entering and before waiting ends the wait at once."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        match news:
            case "head":
                rig.head("m", 4)
            case "closing":
                rig.change(11, closing("m", 3, 11))
            case "deleted":
                rig.hub.publish_deleted(CONTEXT, 11)
            case "shutdown":
                rig.hub.close_all()
            case _:
                rig.hub.fill(
                    CONTEXT, after=3, closings=[closing("m", 3, 11)], standing=standing(11)
                )
        assert _wait(watch, after=3).done


@pytest.mark.parametrize("end", ["deleted", "shutdown"])
async def test_end_of_everything_wakes(end: str) -> None:
    """Deletion and shutdown end a wait."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        waiting = _wait(watch, after=3)
        if end == "deleted":
            rig.hub.publish_deleted(CONTEXT, 11)
        else:
            rig.hub.close_all()
        assert waiting.step()


async def test_time_is_up() -> None:
    """Without news the wait ends with its time, and a time of 0 does not wait."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        assert _wait(watch, after=0, timeout_s=0).done
        waiting = _wait(watch, after=0, timeout_s=2.0)
        rig.pass_ticks(255)
        assert not waiting.step()
        rig.pass_ticks(1)
        assert waiting.step()


async def test_watch_after_shutdown_does_not_wait() -> None:
    """Who comes after shutdown began is not kept waiting."""
    rig = Rig()
    rig.hub.close_all()
    with rig.hub.watch(CONTEXT, "m") as watch:
        assert _wait(watch, after=3).done


async def test_watches_of_one_message_and_readers_live_side_by_side() -> None:
    """All who watch are woken; leaving takes nothing away from the others."""
    rig = Rig()
    tap = rig.attach()
    with rig.hub.watch(CONTEXT, "m") as one:
        with rig.hub.watch(CONTEXT, "m") as other:
            waits = [_wait(one, after=0), _wait(other, after=0)]
        rig.head("m", 1)
        assert waits[0].step()
        assert not waits[1].step()
    assert rig.hub.watched() == (CONTEXT,)
    assert tap.told() == [("delta", "m", 1)]


async def test_nothing_is_left_of_a_watch() -> None:
    """Leaving forgets the watch, its topic and its alarm, also after a deletion."""
    rig = Rig()
    with rig.hub.watch(CONTEXT, "m") as watch:
        assert rig.hub.watched() == (CONTEXT,)
        waiting = _wait(watch, after=0)
        rig.head("m", 1)
        assert waiting.step()
    assert rig.hub.watched() == ()
    assert not any(rig.hub._wheel._buckets.values())
    with rig.hub.watch(CONTEXT, "m"):
        rig.hub.publish_deleted(CONTEXT, 11)
        with rig.hub.watch(CONTEXT, "m"):
            assert rig.hub.watched() == (CONTEXT,)
    assert rig.hub.watched() == ()
