"""The benchmarks run, and each row says what a reader of it needs. No speed is asserted here."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import bare_hosting
from benchmarks.figures import Goal, Row, alternate, percentile
from contextd import app

HERE = Path(__file__).resolve().parent
FIGURES = {"appends", "pulls", "readers", "replay", "latency", "idle", "stopping"}


def test_bare_servers_run_under_the_options_of_contextd() -> None:
    """What is compared differs in what it does, and not in how it is served."""
    for name in ("BACKLOG", "KEEP_ALIVE_S", "GC_THRESHOLDS"):
        assert getattr(bare_hosting, name) == getattr(app, name)


@pytest.mark.slow
def test_quick_run_measures_every_figure_against_a_limit(tmp_path: Path) -> None:
    """`python tests/benchmarks --quick` gives one complete row per figure and exits cleanly."""
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, str(HERE), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = [msgspec.json.decode(line, type=Row) for line in path.read_text().splitlines()]
    assert {row.name for row in rows} == FIGURES
    for row in rows:
        assert row.unit
        assert row.what
        assert row.limit_is
        assert row.value > 0
        assert row.limit > 0
        assert row.ratio > 0
        assert row.met is row.goal.met(row.ratio, row.value)
        assert (row.goal.at_least is None) is not (row.goal.at_most is None)
        assert row.name in done.stderr


@pytest.mark.parametrize(
    ("goal", "ratio", "value", "met"),
    [
        (Goal(on="ratio", at_least=0.7), 0.7, 1.0, True),
        (Goal(on="ratio", at_least=0.7), 0.69, 1.0, False),
        (Goal(on="ratio", at_most=1.5), 1.5, 9.0, True),
        (Goal(on="ratio", at_most=1.5), 1.51, 9.0, False),
        (Goal(on="value", at_most=3), 9.0, 3.0, True),
        (Goal(on="value", at_most=3), 0.1, 3.1, False),
    ],
)
def test_goal_is_inclusive_and_looks_at_what_it_names(
    goal: Goal, ratio: float, value: float, met: bool
) -> None:
    """A bound itself is met, and a ratio's goal does not look at the value."""
    assert goal.met(ratio, value) is met


def test_rounds_alternate_which_side_goes_first() -> None:
    """Neither side always has the warmer machine."""
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return 1.0 if name == "value" else 2.0

    rounds = alternate(2, lambda: side("value"), lambda: side("limit"))
    assert order == ["limit", "value", "value", "limit"]
    assert [one.ratio for one in rounds] == [0.5, 0.5]


def test_percentile_is_a_measured_value() -> None:
    """The 99th of 100 values is the largest, the median of three the middle one."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(100)), 0.99) == 99
