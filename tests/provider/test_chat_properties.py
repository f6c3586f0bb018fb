"""Replies as models and servers may say them, made up with a ground truth: no wrong call ever runs.

`CHAT_REPLIES` sets how many are tried, over all tests.
"""

import json
import os
import random
from collections import Counter
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_corpus import Read, read

from contextd.tools.arguments import ArgumentsError, parse

REPLIES = int(os.environ.get("CHAT_REPLIES", "500"))
NAMES = ["lookup", "read", "read_file", "sweep"]
Call = tuple[str, str]  # name, and arguments as canonical JSON

texts = st.text(st.sampled_from('ab{}"\\[]:, \n1é😀'), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=2)
)
arguments = st.dictionaries(texts, values, max_size=3)
wanted = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)


def ran(got: Read) -> list[Call]:
    """The calls that would run: those of a whole answer, not refused, with an object for arguments."""
    finished = got.events[-1] if got.events and got.is_complete else None
    if finished is None or not finished.whole:  # type: ignore[union-attr]
        return []
    found = []
    for kind, name, text in (one for one in got.says() if len(one) == 3):
        try:
            if kind == "call":
                found.append((name, canonical(parse(text, bytes_max=1_000_000))))
        except ArgumentsError:
            continue
    return found


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


class Reply:
    """One reply in the making. `chance` decides on everything, so a seed says which it is."""

    def __init__(self, calls: list[tuple[str, dict[str, Any]]], chance: random.Random) -> None:
        self.truth = [(name, canonical(value)) for name, value in calls]
        self.chance = chance
        self.has_index = chance.random() < 0.7
        self.has_id = chance.random() < 0.7 or not self.has_index
        self.says_again = chance.choice(["", "", "whole", "arguments", "double-encoded"])
        self.is_mixed = self.has_index and not self.says_again and chance.random() < 0.4
        self.is_merged = not self.has_index and chance.random() < 0.2
        self.parts = [self._parts(number, *call) for number, call in enumerate(calls)]

    def _parts(self, number: int, name: str, value: dict[str, Any]) -> list[dict[str, Any]]:
        plain = json.dumps(value, ensure_ascii=self.chance.random() < 0.5)
        text = json.dumps(plain) if self.chance.random() < 0.2 else plain
        pieces = self._cut(text)
        # One that another call follows before the arguments is taken for a call without any.
        may_stand = bool(value) and not self.is_mixed and not self.is_merged
        placeholder = ["{}"] if may_stand and self.chance.random() < 0.2 else [""]
        again = []
        if self.says_again:
            again = [json.dumps(plain) if self.says_again == "double-encoded" else text]
        named = [name, *[""] * len(pieces)]
        parts = [
            self._part(number, function, piece)
            for function, piece in zip(named, [*placeholder, *pieces], strict=True)
        ]
        again_name = name if self.says_again != "arguments" else ""
        return [*parts, *(self._part(number, again_name, piece) for piece in again)]

    def _cut(self, text: str) -> list[str]:
        cuts = sorted(self.chance.sample(range(len(text) + 1), k=min(3, len(text))))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _part(self, number: int, name: str, piece: str) -> dict[str, Any]:
        part: dict[str, Any] = {"function": {"name": name or None, "arguments": piece}}
        if self.has_index:
            part["index"] = number
        # A merged reply names its calls once, and then gives pieces that name none.
        if self.has_id and not (self.is_merged and not name):
            part["id"] = f"c{number}"
        return part

    def deltas(self) -> list[dict[str, Any]]:
        """In one order that keeps that of each call."""
        if not self.is_mixed and not self.is_merged:
            return [part for parts in self.parts for part in parts]
        return [part for row in zip_longest(*self.parts) for part in row if part]


def body(deltas: list[dict[str, Any]], reason: str | None, *, at_once: int = 1) -> list[bytes]:
    groups = [deltas[at : at + at_once] for at in range(0, len(deltas), at_once)]
    chunks: list[Any] = [{"choices": [{"delta": {"tool_calls": group}}]} for group in groups]
    if reason is not None:
        chunks.append({"choices": [{"delta": {}, "finish_reason": reason}]})
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]


@settings(max_examples=REPLIES // 5, deadline=None)
@given(wanted, st.integers(0, 2**32), st.sampled_from(["tool_calls", "stop", "length", None]))
def test_no_wrong_call_runs(
    calls: list[tuple[str, dict[str, Any]]], seed: int, reason: str | None
) -> None:
    """Whatever the form, each call runs once at the most, with the arguments that were meant."""
    chance = random.Random(seed)
    reply = Reply(calls, chance)
    deltas = reply.deltas()
    got = read(body(deltas, reason, at_once=chance.choice([1, 2, 5])))
    assert not Counter(ran(got)) - Counter(reply.truth)
    if reason in ("length", None):
        assert ran(got) == []


@settings(max_examples=REPLIES // 5, deadline=None)
@given(wanted, st.integers(0, 2**32))
def test_a_reply_by_the_api_runs_as_it_is(
    calls: list[tuple[str, dict[str, Any]]], seed: int
) -> None:
    """With index and id, all of it runs, however the calls are mixed, and said again."""
    chance = random.Random(seed)
    reply = Reply(calls, chance)
    reply.has_index = reply.has_id = True
    reply.parts = [reply._parts(number, *call) for number, call in enumerate(calls)]
    got = read(body(reply.deltas(), "tool_calls", at_once=chance.choice([1, 2, 5])))
    assert Counter(ran(got)) == Counter(reply.truth)


@settings(max_examples=REPLIES // 5, deadline=None)
@given(wanted, st.integers(0, 2**32), st.data())
def test_an_unfinished_reply_runs_nothing_that_was_not_meant(
    calls: list[tuple[str, dict[str, Any]]], seed: int, draw: st.DataObject
) -> None:
    """Pieces are lost at the end, and the server says that all is well."""
    reply = Reply(calls, random.Random(seed))
    deltas = reply.deltas()
    kept = draw.draw(st.integers(0, len(deltas)))
    got = read([*body(deltas[:kept], "tool_calls"), b"data: [DONE]\n\n"])
    # A call whose arguments never came, or only their placeholder, is one without arguments.
    empty = Counter({(name, "{}"): 1 for name, _ in calls})
    assert not Counter(ran(got)) - Counter(reply.truth) - empty - empty - empty


@settings(max_examples=REPLIES // 5, deadline=None)
@given(wanted, st.integers(0, 2**32), st.data())
def test_any_cutting_gives_the_same(
    calls: list[tuple[str, dict[str, Any]]], seed: int, draw: st.DataObject
) -> None:
    """Of the bytes, and of the events into chunks."""
    reply = Reply(calls, random.Random(seed))
    whole = b"".join(body(reply.deltas(), "tool_calls"))
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    got, other = read([whole]), read(pieces)
    assert other.says() == got.says()
    assert (other.error is None) == (got.error is None)
    assert read(body(reply.deltas(), "tool_calls", at_once=3)).says() == got.says()


@settings(max_examples=REPLIES // 5, deadline=None)
@given(wanted, st.integers(0, 2**32))
def test_any_order_of_the_pieces_runs_no_wrong_call(
    calls: list[tuple[str, dict[str, Any]]], seed: int
) -> None:
    """Calls mixed in any way, the pieces of each in their order, with index and id or without."""
    chance = random.Random(seed)
    reply = Reply(calls, chance)
    left = [list(parts) for parts in reply.parts]
    deltas = []
    while any(left):
        deltas.append(chance.choice([parts for parts in left if parts]).pop(0))
    got = read(body(deltas, "tool_calls"))
    assert not Counter(ran(got)) - Counter(reply.truth)


@pytest.mark.parametrize("seed", range(20))
def test_odd_values_anywhere_end_in_an_answer_or_a_named_error(seed: int) -> None:
    """No other exception escapes, whatever stands in a field."""
    chance = random.Random(seed)
    odd = [None, True, 0, -1, 1.5, "", "x", "\ud800", [], {}, [[]], [{}], {"a": {}}, [None]]
    fields = ["content", "refusal", "reasoning", "reasoning_content", "reasoning_details"]
    fields += ["tool_calls", "function_call", "extra_content", "thinking_blocks", "role"]
    for _ in range(20):
        chunks: list[Any] = []
        for _ in range(4):
            delta: dict[str, Any] = {name: chance.choice(odd) for name in chance.sample(fields, 4)}
            if chance.random() < 0.5:
                call = {name: chance.choice(odd) for name in ("index", "id", "function", "type")}
                delta["tool_calls"] = [call, {"function": {"name": "read", "extra": odd}}]
            chunks.append({"choices": [{"delta": delta, "finish_reason": chance.choice(odd)}]})
        got = read([b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks])
        assert got.error is not None or got.is_complete
