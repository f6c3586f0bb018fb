"""The benchmarks run, and each row says what a reader of it needs. No speed is asserted here."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import bare_hosting, others, producers
from benchmarks.command import FIGURES
from benchmarks.figures import Goal, Row, alternate, percentile
from benchmarks.pacing import TEXT
from contextd import app, listening
from contextd.settings import Settings

HERE = Path(__file__).resolve().parent
INSIDE = {"appends", "pulls", "readers", "replay", "latency", "idle", "stopping", "cancelling"}
PRODUCED = {"lines_1", "lines_64", "batches", "posts", "line_latency", "line_flood"}
OTHERS = {"durable_streams", "rakaia"}


def test_bare_servers_run_under_the_options_of_contextd() -> None:
    """What is compared differs in what it does, and not in how it is served."""
    assert bare_hosting.BACKLOG == listening.BACKLOG
    assert Settings().keep_alive_s == bare_hosting.KEEP_ALIVE_S
    assert bare_hosting.GC_THRESHOLDS == app.GC_THRESHOLDS


def test_every_figure_is_measured_in_a_quick_run() -> None:
    """None is registered without being tried here."""
    assert set(FIGURES) == INSIDE | PRODUCED | OTHERS


@pytest.mark.parametrize(
    "names",
    [
        {"pulls", "posts"},
        pytest.param(INSIDE, marks=pytest.mark.long),
        pytest.param(PRODUCED, marks=pytest.mark.long),
    ],
)
def test_quick_run_measures_every_figure_against_a_limit(tmp_path: Path, names: set[str]) -> None:
    """`python tests/benchmarks --quick` gives one complete row per figure and exits cleanly."""
    path = tmp_path / "rows.jsonl"
    done = run("--quick", "--json", str(path), names=names)
    assert done.stdout == ""
    rows = [msgspec.json.decode(line, type=Row) for line in path.read_text().splitlines()]
    assert {row.name for row in rows} == names
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


def test_what_is_not_installed_is_left_out() -> None:
    """The run says so, prints no row for it, and exits cleanly."""
    done = run("--quick", names=OTHERS)
    assert done.stdout == ""
    for name in OTHERS:
        assert f"left out {name}" in done.stderr


def run(*arguments: str, names: set[str]) -> subprocess.CompletedProcess[str]:
    """The command, on a machine on which the others are not."""
    only = [part for name in sorted(names) for part in ("--only", name)]
    environ = {name: value for name, value in os.environ.items() if name not in others.SETTINGS}
    done = subprocess.run(
        [sys.executable, str(HERE), *arguments, *only],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_body_of_lines_in_pieces_is_what_a_server_puts_together_again() -> None:
    """The producers' bytes are numbered lines, in pieces whose lengths are right."""
    body = producers.lines(5)
    assert [msgspec.json.decode(line) for line in body.splitlines()] == [
        {"sequence": sequence, "content": TEXT} for sequence in range(1, 6)
    ]
    left, pieces = producers.in_pieces(body, lines_each=2), []
    while left:
        length, _, left = left.partition(b"\r\n")
        pieces.append(left[: int(length, 16)])
        assert left[int(length, 16) :].startswith(b"\r\n")
        left = left[int(length, 16) + 2 :]
    assert [piece.count(b"\n") for piece in pieces] == [2, 2, 1, 0]
    assert b"".join(pieces) == body


@pytest.mark.parametrize("shape", ["batches", "posts"])
def test_requests_of_a_connection_number_its_chunks_without_a_gap(shape: producers.Shape) -> None:
    """So that a lost or doubled request would be refused, and the run would fail."""
    chunks = 1 if shape == "posts" else 3
    options = producers.Options(
        url="http://127.0.0.1:1",
        server_pid=0,
        run="run",
        shape=shape,
        connections=1,
        requests=4,
        chunks=chunks,
    )
    sequences = []
    for head, body in producers.requests(options, "/path", list(producers.bodies(options))):
        assert b"Content-Length: %d\r\n" % len(body) in head
        decoded = msgspec.json.decode(body)
        sequences += [chunk["sequence"] for chunk in decoded.get("chunks", [decoded])]
    assert sequences == list(range(1, 4 * chunks + 1))


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
