"""Trimming keeps the newest turns, whole, within the budget."""

from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from contextd.trimming import trim


class Said(msgspec.Struct, frozen=True):
    """A message as trimming sees it."""

    tokens: int


TURNS = st.lists(st.lists(st.builds(Said, st.integers(0, 50)), max_size=6), max_size=12)
BUDGETS = st.integers(-50, 600)
RESERVED = st.integers(0, 100)


def weight(turns: list[list[Said]]) -> int:
    return sum(message.tokens for turn in turns for message in turn)


def turns_of(*sizes: int) -> list[list[Said]]:
    return [[Said(size)] for size in sizes]


@given(TURNS, BUDGETS, RESERVED)
def test_what_is_kept_is_the_end_of_the_conversation(
    turns: list[list[Said]], budget: int, reserved: int
) -> None:
    """Whole turns, in their order, with no gap; what is left out is counted."""
    trimmed = trim(turns, budget, reserved)
    assert [*turns[: trimmed.left_out_turns], *trimmed.kept] == turns
    assert trimmed.left_out_messages + sum(map(len, trimmed.kept)) == sum(map(len, turns))
    assert trimmed.tokens == weight(trimmed.kept)


@given(TURNS, BUDGETS, RESERVED)
def test_it_fits_unless_only_the_newest_turn_is_left(
    turns: list[list[Said]], budget: int, reserved: int
) -> None:
    """The newest turn is always kept."""
    trimmed = trim(turns, budget, reserved)
    assert trimmed.tokens <= budget - reserved or len(trimmed.kept) == 1 or not turns
    assert not turns or trimmed.kept[-1] == turns[-1]


@given(TURNS, BUDGETS, RESERVED)
def test_nothing_is_left_out_that_had_room(
    turns: list[list[Said]], budget: int, reserved: int
) -> None:
    """One turn more would be too much."""
    trimmed = trim(turns, budget, reserved)
    if trimmed.left_out_turns:
        assert weight(turns[trimmed.left_out_turns - 1 :]) > budget - reserved


@given(TURNS, st.lists(BUDGETS, min_size=2, max_size=5))
def test_a_larger_budget_never_keeps_less(turns: list[list[Said]], budgets: list[int]) -> None:
    """What was shown with little room is shown with more."""
    kept = [len(trim(turns, budget).kept) for budget in sorted(budgets)]
    assert all(less <= more for less, more in pairwise(kept))


def test_a_turn_that_does_not_fit_ends_it_though_an_older_one_would_fit() -> None:
    """A gap in the middle would make the model answer something that was never asked."""
    trimmed = trim(turns_of(1, 90, 5, 5), 50)
    assert trimmed.kept == turns_of(5, 5)
    assert (trimmed.left_out_turns, trimmed.left_out_messages, trimmed.tokens) == (2, 2, 10)


def test_the_newest_turn_is_kept_over_the_budget() -> None:
    """Its tokens say that it does not fit."""
    trimmed = trim(turns_of(1, 90), 50)
    assert (trimmed.kept, trimmed.tokens) == (turns_of(90), 90)


def test_what_is_reserved_is_not_there_for_turns() -> None:
    """The system prompt, the tools and the answer need room too."""
    assert trim(turns_of(10, 10, 10), 30).left_out_turns == 0
    assert trim(turns_of(10, 10, 10), 30, 1).left_out_turns == 1


def test_an_empty_conversation_stays_empty() -> None:
    """There is nothing to keep."""
    trimmed = trim([], 100)
    assert (trimmed.kept, trimmed.tokens) == ([], 0)
