"""The command: which figures, how large, and where the rows go."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import (
    appends,
    cancelling,
    idle,
    latency,
    line_flood,
    line_latency,
    others,
    producing,
    pulls,
    readers,
    replay,
    stopping,
)
from benchmarks.figures import Row
from benchmarks.processes import raise_file_limit
from benchmarks.scale import FULL, QUICK, Scale

FIGURES: dict[str, Callable[[Scale], Row | None]] = {
    "appends": appends.measure,
    "pulls": pulls.measure,
    "readers": readers.measure,
    "replay": replay.measure,
    "latency": latency.measure,
    "idle": idle.measure,
    "stopping": stopping.measure,
    "cancelling": cancelling.measure,
    "lines_1": producing.measure_one_body,
    "lines_64": producing.measure_bodies,
    "batches": producing.measure_batches,
    "posts": producing.measure_posts,
    "line_latency": line_latency.measure,
    "line_flood": line_flood.measure,
    "durable_streams": others.measure_durable_streams,
    "rakaia": others.measure_rakaia,
}
PARTS = ("contextd", "litestar", "uvicorn", "uvloop", "SQLAlchemy", "aiosqlite", "msgspec")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures; JSON rows go to standard output or a file, the table to standard error."""
    options = _parse(arguments)
    raise_file_limit()
    console = Console(stderr=True)
    console.print(_setting(), style="dim", highlight=False)
    rows: list[Row] = []
    for name in options.only or FIGURES:
        console.print(f"measuring {name} …", style="dim")
        row = FIGURES[name](QUICK if options.quick else FULL)
        if row is None:
            console.print(f"left out {name}: not installed, see docs/benchmarks.md", style="dim")
        else:
            rows.append(row)
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    if options.json is None:
        sys.stdout.write(lines.decode())
        sys.stdout.flush()
    else:
        options.json.write_bytes(lines)
    console.print(_table(rows))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="see only that it works; the figures mean nothing"
    )
    parser.add_argument(
        "--only", action="append", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args(arguments)


def _setting() -> str:
    parts = ", ".join(f"{name} {version(name)}" for name in PARTS)
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {parts}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="contextd against what its parts can do")
    for heading in ("figure", "ratio", "goal", "", "contextd", "limit", "unit"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for row in rows:
        met = "[green]met[/]" if row.met else "[red]missed[/]"
        cells = (row.name, f"{row.ratio:.2f}", str(row.goal), met)
        table.add_row(*cells, _short(row.value), _short(row.limit), row.unit)
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
