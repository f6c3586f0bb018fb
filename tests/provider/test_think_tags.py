"""Reasoning between tags, told apart from the answer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.provider.think_tags import ThinkTags


def parts(*pieces: str) -> list[tuple[str, str]]:
    """The parts, with those of one kind in a row joined."""
    tags = ThinkTags()
    found = [part for piece in pieces for part in tags.add(piece)] + list(tags.rest())
    assert all(content for _, content in found)
    joined: list[tuple[str, str]] = []
    for kind, content in found:
        if joined and joined[-1][0] == kind:
            joined[-1] = kind, joined[-1][1] + content
        else:
            joined.append((kind, content))
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi", [("text", "Hi")]),
        ("  Hi ", [("text", "  Hi ")]),
        ("<think>a</think>b", [("thinking", "a"), ("text", "b")]),
        ("\n<think>\na\n\nb\n</think>\n\nc", [("thinking", "a\n\nb"), ("text", "c")]),
        ("<thinking>a</think>b</thinking>c", [("thinking", "a</think>b"), ("text", "c")]),
        ("<thought>a</thought>b", [("thinking", "a"), ("text", "b")]),
        ("[THINK]a[/THINK]b", [("thinking", "a"), ("text", "b")]),
        ("<think>a</think> <think>b</think>c", [("thinking", "ab"), ("text", "c")]),
        ("<think></think>b", [("text", "b")]),
        ("<think>a", [("thinking", "a")]),
        ("<think>a</thi", [("thinking", "a</thi")]),
        ("<think>a\n</thi", [("thinking", "a\n</thi")]),
        ("<thi", [("text", "<thi")]),
        ("<b>a</b>", [("text", "<b>a</b>")]),
        ("Use <think>a</think>", [("text", "Use <think>a</think>")]),
        ("<think>a</think>b<think>c", [("thinking", "a"), ("text", "b<think>c")]),
    ],
)
def test_parts(text: str, expected: list[tuple[str, str]]) -> None:
    """A tag counts only before the answer has begun."""
    assert parts(text) == expected
    assert parts(*text) == expected


tokens = st.sampled_from(["<think>", "</think>", "<thought>", "</thought>", "<", "\n", " ", "a"])


@given(st.lists(tokens, max_size=12).map("".join), st.data())
def test_any_cutting_gives_the_same(text: str, draw: st.DataObject) -> None:
    """Tags and line breaks may be cut in two."""
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert parts(*(text[a:b] for a, b in pairwise([0, *cuts, len(text)]))) == parts(text)
