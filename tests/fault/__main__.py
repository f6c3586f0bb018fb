"""Long runs by hand: `python tests/fault --cuts 2000 --kills 200 --seed 1` (docs/faults.md).

Each run works on databases of its own, in a temporary folder, or on the empty one that --database
names. What is printed at the end is what docs/faults.md holds.
"""

import asyncio
import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cut_run import run_cuts  # noqa: E402 - found by the paths above
from kill_run import KillRun  # noqa: E402
from nodes_run import run_nodes  # noqa: E402
from producer_run import ProducerRun  # noqa: E402
from shutdown_run import run_shutdown  # noqa: E402
from tool_run import ToolRun  # noqa: E402

RUNS = ("cuts", "kills", "takeovers", "streams", "producers", "tools", "tool_takeovers", "faults")

Show = Callable[[int], None]
Run = Callable[[Path, Show], Awaitable[dict[str, Any]]]


def main() -> int:
    """The exit code: 1 when anything was wrong."""
    arguments = _parse()
    shown = Console(stderr=True)
    done: dict[str, dict[str, Any]] = {}
    try:
        with _progress(shown) as progress:
            for name, total, run in _runs(arguments):
                done[name] = _run_one(progress, name, total, run)
    except AssertionError as error:
        shown.print(str(error), style="red", markup=False, highlight=False)
        return 1
    if arguments.json:
        print(json.dumps(done, indent=2, ensure_ascii=False))
    else:
        for name, figures in done.items():
            Console().print(_table(name, figures))
    return 0


def _parse() -> Namespace:
    parser = ArgumentParser(prog="python tests/fault", description=__doc__)
    parser.add_argument("--cuts", type=int, default=0, metavar="N", help="cut N connections")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill the server N times")
    parser.add_argument(
        "--takeovers", type=int, default=0, metavar="N", help="kill or freeze one of two, N times"
    )
    parser.add_argument(
        "--streams", type=int, default=0, metavar="N", help="stop a server with N open streams"
    )
    parser.add_argument(
        "--producers", type=int, default=0, metavar="N", help="do N faults to producers"
    )
    parser.add_argument(
        "--tools", type=int, default=0, metavar="N", help="kill it N times, under calls of tools"
    )
    parser.add_argument(
        "--tool-takeovers", type=int, default=0, metavar="N", help="the same with one of two"
    )
    parser.add_argument(
        "--faults",
        type=int,
        default=0,
        metavar="N",
        help="do N faults to several servers and their PostgreSQL, which the run makes for itself",
    )
    parser.add_argument(
        "--nodes", type=int, default=3, metavar="N", help="servers of such a run (default: 3)"
    )
    parser.add_argument(
        "--servers",
        type=int,
        default=1,
        metavar="N",
        help="that work on the database of cuts, kills, producers and tools, round robin",
    )
    parser.add_argument("--seed", default="1", help="the same seed makes the same plans")
    parser.add_argument(
        "--database", metavar="URL", help="an empty database (default: SQLite files)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the servers that are killed, such as tail_bytes_max=1",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    chosen = [getattr(arguments, name) for name in RUNS]
    if not any(chosen):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in RUNS)
        parser.error(f"nothing to do: name one of {options}")
    if arguments.database and sum(map(bool, chosen)) > 1:
        parser.error("one empty database serves one run")
    if arguments.database and arguments.faults:
        parser.error("--faults stops and replaces its database, so it makes one for itself")
    return arguments


def _runs(arguments: Namespace) -> list[tuple[str, int, Run]]:
    seed, url, servers = str(arguments.seed), arguments.database, arguments.servers
    settings = dict(pair.split("=", 1) for pair in arguments.set)

    def cuts(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        return run_cuts(
            cuts=arguments.cuts, seed=seed, folder=folder, url=url, servers=servers, show=show
        )

    def kills(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        run = KillRun(seed=seed, folder=folder, url=url, servers=servers, settings=settings)
        return run.run(arguments.kills, show)

    def takeovers(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        run = KillRun(seed=seed, folder=folder, url=url, servers=2, settings=settings)
        return run.run(arguments.takeovers, show)

    def streams(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        count = arguments.streams
        return run_shutdown(streams=count, turns=20, seed=seed, folder=folder, url=url)

    def producers(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        run = ProducerRun(seed=seed, folder=folder, url=url, servers=servers, settings=settings)
        return run.run(arguments.producers, show)

    def tools(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        run = ToolRun(seed=seed, folder=folder, url=url, servers=servers, settings=settings)
        return run.run(arguments.tools, show)

    def tool_takeovers(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        run = ToolRun(seed=seed, folder=folder, url=url, servers=2, settings=settings)
        return run.run(arguments.tool_takeovers, show)

    def faults(folder: Path, show: Show) -> Awaitable[dict[str, Any]]:
        return run_nodes(
            arguments.faults,
            show=show,
            nodes=arguments.nodes,
            seed=seed,
            folder=folder,
            settings=settings,
        )

    named: list[tuple[str, int, Run]] = [
        ("cuts", arguments.cuts, cuts),
        ("kills", arguments.kills, kills),
        ("takeovers", arguments.takeovers, takeovers),
        ("streams", arguments.streams, streams),
        ("producers", arguments.producers, producers),
        ("tools", arguments.tools, tools),
        ("tool_takeovers", arguments.tool_takeovers, tool_takeovers),
        ("faults", arguments.faults, faults),
    ]
    return [(name, total, run) for name, total, run in named if total]


def _run_one(progress: Progress, name: str, total: int, run: Run) -> dict[str, Any]:
    task = progress.add_task(name, total=total)

    async def running(folder: Path) -> dict[str, Any]:
        return await run(folder, lambda count: progress.update(task, completed=count))

    with tempfile.TemporaryDirectory(prefix="contextd-fault-") as folder:
        figures = asyncio.run(running(Path(folder)))
    progress.update(task, completed=total)
    return figures


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _table(name: str, figures: dict[str, Any]) -> Table:
    table = Table("what", "how many", title=name)
    for what, figure in figures.items():
        table.add_row(what, str(figure))
    return table


if __name__ == "__main__":
    sys.exit(main())
