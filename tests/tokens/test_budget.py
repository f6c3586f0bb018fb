"""The budget of one request: whole turns, the newest first, and always the one that runs (§6)."""

from types import SimpleNamespace
from typing import Any

from contextd.store.history import Told
from contextd.turns.budget import Budget

WORDS = "word " * 100  # some 100 tokens
TIGHT, WIDE = 150, 10_000


def told(key: int, turn: str, *, running: bool = False, text: str = WORDS) -> Told:
    row: Any = SimpleNamespace(key=key)
    return Told(row, text, None, turn, running)


def kept(budget: Budget, *said: Told) -> list[int]:
    shown = budget.fit(said, model=None, system_prompt=None, offers=[]).told
    return [one.row.key for one in shown]


def test_the_running_turn_is_kept_whatever_came_after_it() -> None:
    """A note that was stored while it ran is newer, and takes no room from it."""
    said = [told(1, "a"), told(2, "b", running=True), told(3, "b", running=True), told(4, "note")]
    assert kept(Budget(TIGHT), *said) == [2, 3, 4]
    assert kept(Budget(WIDE), *said) == [1, 2, 3, 4]


def test_what_was_stored_in_the_midst_of_a_turn_goes_with_it() -> None:
    """No turn is cut, so no result is shown without its call."""
    said = [told(1, "a"), told(2, "note"), told(3, "a"), told(4, "b", running=True)]
    assert kept(Budget(TIGHT), *said) == [4]
    left_out = Budget(TIGHT).fit(said, model=None, system_prompt=None, offers=[]).left_out
    assert left_out is not None
    assert (left_out.turns, left_out.messages) == (1, 3)
    assert left_out.tokens > 300


def test_a_message_is_counted_once() -> None:
    """By its key: the text of a closed message never changes."""
    budget = Budget(TIGHT)
    assert kept(budget, told(1, "a"), told(2, "b", running=True)) == [2]
    assert kept(budget, told(1, "a", text="short"), told(2, "b", running=True)) == [2]
    assert kept(Budget(TIGHT), told(1, "a", text="short"), told(2, "b", running=True)) == [1, 2]
