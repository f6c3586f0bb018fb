"""What is written becomes chunks: any text, cut where it may be cut, numbered, batched, bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.client import outbox
from contextd.client.outbox import Outbox, pieces
from contextd.core.text import TextPieces, storable

LIMIT = outbox.CHUNK_BYTES_MAX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a", ["a"]),
        ("a" * LIMIT, ["a" * LIMIT]),
        ("a" * (LIMIT + 1), ["a" * LIMIT, "a"]),
        ("é" * (LIMIT // 2 + 1), ["é" * (LIMIT // 2), "é"]),
        ("a" + "é" * (LIMIT // 2), ["a" + "é" * (LIMIT // 2 - 1), "é"]),
        ("aa€" + "😀" * (LIMIT // 4), ["aa€" + "😀" * (LIMIT // 4 - 2), "😀😀"]),
    ],
    ids=["empty", "one", "full", "over", "two-byte", "odd start", "four-byte"],
)
def test_a_text_is_cut_between_code_points(text: str, expected: list[str]) -> None:
    """As few chunks as fit, none over the limit in UTF-8, nothing lost."""
    assert list(pieces(text)) == expected


@given(st.text(), st.integers(4, 40))
def test_pieces_are_the_text(text: str, limit: int) -> None:
    """For any text and any limit that has room for a code point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "CHUNK_BYTES_MAX", limit)
        cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(0 < len(piece.encode()) <= limit for piece in cut)


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        (["a\x00b"], "a\ufffdb"),
        (["\ud83d", "\ude00"], "😀"),
        (["x\ud83d", "", "\ude00y"], "x😀y"),
        (["\ud83d", "x"], "\ufffdx"),
        (["\ude00"], "\ufffd"),
        (["a\ud83d"], "a\ufffd"),
        (["\ud83d\ud83d", "\ude00"], "\ufffd😀"),
        (["e\u0301", "\u202e", "\r", "\n"], "e\u0301\u202e\r\n"),
    ],
)
def test_what_no_text_may_hold_is_replaced(written: list[str], stored: str) -> None:
    """Pairs that came in two pieces are joined; U+0000 and half pairs become U+FFFD (§3.1)."""
    text = TextPieces()
    assert "".join(map(text.add, written)) + text.rest() == stored


@given(st.lists(st.text(st.characters(categories=None), max_size=4), max_size=6))
def test_any_text_becomes_storable(written: list[str]) -> None:
    """However it is cut, it can be stored, and it is what the whole would be in one piece."""
    text = TextPieces()
    stored = "".join(map(text.add, written)) + text.rest()
    assert stored == storable("".join(written))
    assert "\x00" not in stored.encode().decode()


def test_chunks_are_numbered_from_the_head_and_let_go_when_durable() -> None:
    """Sequences are dense; what is not settled is offered again, in order."""
    box = Outbox(7)
    for content in ("a", "b"):
        box.add(content)
    batch = box.batch()
    assert [(chunk.sequence, chunk.content) for chunk in batch] == [(8, "a"), (9, "b")]
    box.add("c")
    assert (box.head, box.last) == (7, 10)
    box.settle(batch)
    assert (box.head, box.last) == (9, 10)
    assert [chunk.sequence for chunk in box.batch()] == [10]


def test_a_batch_is_bounded_by_chunks_and_by_bytes() -> None:
    """1,000 chunks or 1 MiB, whichever comes first, and one chunk at least."""
    box = Outbox(0)
    for _ in range(outbox.BATCH_CHUNKS_MAX + 1):
        box.add("é")
    assert len(box.batch()) == outbox.BATCH_CHUNKS_MAX
    heavy = Outbox(0)
    for _ in range(20):
        heavy.add("é" * (LIMIT // 2))
    assert len(heavy.batch()) == outbox.BATCH_BYTES_MAX // LIMIT


def test_it_is_full_by_chunks_or_by_bytes() -> None:
    """And has room again when a batch is durable."""
    many, heavy = Outbox(0), Outbox(0)
    while not many.is_full:
        many.add("a")
    while not heavy.is_full:
        heavy.add("a" * LIMIT)
    assert many.last == outbox.HELD_CHUNKS_MAX
    assert heavy.last == outbox.HELD_BYTES_MAX // LIMIT
    for box in (many, heavy):
        box.settle(box.batch())
        assert not box.is_full
