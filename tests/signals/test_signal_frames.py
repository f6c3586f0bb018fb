"""Frames, cursors and the bookkeeping of revisions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signals_rig import CONTEXT, WALL_MS, closing, head, standing

from contextd.core.values import SEQUENCE_MAX, timestamp
from contextd.signals import Closing, Head, Level, Standing, cursor, parse_cursor
from contextd.signals.frames import Frame, Heartbeats, Progress


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (
            head("m", 41),
            {
                "type": "content_delta",
                "context_id": CONTEXT,
                "message_id": "m",
                "current_sequence": 41,
                "role": "assistant",
                "kind": "text",
            },
        ),
        (
            closing("m", 57, 119),
            {
                "type": "message_completed",
                "context_id": CONTEXT,
                "message_id": "m",
                "final_sequence": 57,
                "role": "assistant",
                "kind": "text",
                "status": "completed",
                "revision": 119,
            },
        ),
        (
            standing(118, "streaming_llm_response"),
            {
                "type": "state_changed",
                "context_id": CONTEXT,
                "new_state": "streaming_llm_response",
                "revision": 118,
                "record_revision": 118,
            },
        ),
    ],
)
def test_frames_are_the_contracts(level: Level, expected: dict[str, object]) -> None:
    """A frame is `data:`, the signal as JSON in one line, and an empty line (§4)."""
    block = Frame(level, WALL_MS).data(named=False)
    assert block.startswith(b"data: ")
    assert block.endswith(b"\n\n")
    assert block.count(b"\n") == 2
    assert json.loads(block[6:]) == expected | {"timestamp": timestamp(WALL_MS)}
    named = Frame(level, WALL_MS).data(named=True)
    assert named == f"event: {expected['type']}\n".encode() + block


def test_longest_signals_stay_under_1_kb() -> None:
    """Ids, words and numbers at their limits fit."""
    longest = {
        "context_id": "c" * 64,
        "message_id": "m" * 64,
        "role": "assistant",
        "kind": "k" * 64,
    }
    levels: list[Level] = [
        Head(**longest, position=SEQUENCE_MAX, opened_revision=1),
        Closing(**longest, final=SEQUENCE_MAX, status="interrupted", revision=SEQUENCE_MAX),
        Standing(
            context_id="c" * 64,
            state="s" * 64,
            revision=SEQUENCE_MAX,
            record_revision=SEQUENCE_MAX,
        ),
    ]
    line = Progress("d" * 32).id_line(SEQUENCE_MAX)
    assert all(len(line + Frame(level, WALL_MS).data(named=True)) < 1000 for level in levels)


def test_heartbeat_is_shared_for_a_moment() -> None:
    """Readers of the same moment share its bytes; a later one, or a clock set back, makes new ones."""
    beats = Heartbeats(fresh_ms=10)
    first = beats.data(WALL_MS, named=False)
    assert beats.data(WALL_MS + 9, named=False) is first
    assert beats.data(WALL_MS + 9, named=True) == b"event: heartbeat\n" + first
    assert timestamp(WALL_MS + 10).encode() in beats.data(WALL_MS + 10, named=False)
    assert timestamp(WALL_MS - 500).encode() in beats.data(WALL_MS - 500, named=False)


@given(st.integers(min_value=0, max_value=SEQUENCE_MAX), st.sampled_from(["k3f9", "a-1", "x"]))
def test_cursor_comes_back(revision: int, database_id: str) -> None:
    """What was given out is read back."""
    assert parse_cursor(database_id, cursor(database_id, revision)) == revision


@pytest.mark.parametrize(
    "text",
    [
        "", "k3f9", "k3f9-", "k3f9--1", "k3f9-+1", "k3f9-1.0", "k3f9- 1", "k3f9-1 ", "k3f9-01",
        "k3f9-\u00b2", "k3f9-\u0661", "k3f9-1_0", "k3f8-1", "1", "-1", "k3f9-k3f9-1", "K3F9-1",
        f"k3f9-{SEQUENCE_MAX + 1}", "k3f9-" + "9" * 5000,
    ],
)  # fmt: skip
def test_garbage_is_no_cursor(text: str) -> None:
    """Another database's cursor and garbage are not known."""
    assert parse_cursor("k3f9", text) is None


@given(st.text(max_size=40))
def test_parse_cursor_takes_any_text(text: str) -> None:
    """Only a text that the same revision would give is a cursor, and no text raises."""
    revision = parse_cursor("k3f9", text)
    assert revision is None or cursor("k3f9", revision) == text


@given(
    st.integers(10, 20),
    st.permutations(range(11, 26)),
    st.sets(st.integers(11, 25)),
)
def test_progress_never_promises_a_revision_that_was_not_published(
    base: int, order: list[int], lost: set[int]
) -> None:
    """In whatever order revisions come and go missing, `through` has everything before it."""
    progress = Progress("base")
    progress.anchor(base)
    published: set[int] = set()
    for revision in order:
        if revision not in lost:
            progress.note(revision)
            published.add(revision)
        assert progress.through is not None
        low = min(base, *published) if published else base
        missing = [r for r in range(low, progress.through + 1) if r > base and r not in published]
        assert not missing
        ahead = [r for r in published if r > progress.through]
        assert bool(ahead) == progress.gap
