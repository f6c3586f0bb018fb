"""What a benchmark says: one row per figure, with its limit, its goal and whether that was met."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on the row's `ratio` or on its `value`, inclusive."""

    on: Literal["ratio", "value"]
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row_ratio: float, row_value: float) -> bool:
        """Whether the row keeps within the bound."""
        measured = row_ratio if self.on == "ratio" else row_value
        above = self.at_least is None or measured >= self.at_least
        return above and (self.at_most is None or measured <= self.at_most)

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"{self.on} ≥ {self.at_least:g}"
        return f"{self.on} ≤ {self.at_most:g}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. `value` and `limit` are in `unit`, medians of the run's rounds.

    `limit` is what the parts can do without contextd, measured in the same run; `limit_is` says what
    was measured. `ratio` is the median of the rounds' `value` / `limit`.
    """

    name: str
    what: str
    unit: str
    value: float
    limit: float
    limit_is: str
    ratio: float
    goal: Goal
    met: bool
    detail: dict[str, Any]


class Round(msgspec.Struct, frozen=True):
    """One measurement of contextd and one of the limit, taken next to each other."""

    value: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.value / self.limit


def make_row(
    *,
    name: str,
    what: str,
    unit: str,
    limit_is: str,
    goal: Goal,
    rounds: Sequence[Round],
    detail: dict[str, Any] | None = None,
) -> Row:
    """The row of a figure from its rounds."""
    value = statistics.median(one.value for one in rounds)
    ratio = statistics.median(one.ratio for one in rounds)
    return Row(
        name=name,
        what=what,
        unit=unit,
        value=value,
        limit=statistics.median(one.limit for one in rounds),
        limit_is=limit_is,
        ratio=ratio,
        goal=goal,
        met=goal.met(ratio, value),
        detail={"rounds": [[one.value, one.limit] for one in rounds], **(detail or {})},
    )


def alternate(
    count: int, measure: Callable[[], float], measure_limit: Callable[[], float]
) -> list[Round]:
    """`count` rounds, in which each of the two goes first in turn."""
    rounds = []
    for number in range(count):
        if number % 2:
            value = measure()
            limit = measure_limit()
        else:
            limit = measure_limit()
            value = measure()
        rounds.append(Round(value, limit))
    return rounds


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that is not below `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
