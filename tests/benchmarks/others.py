"""Servers of the Durable Streams protocol beside contextd: 64 writers, a file or a message each.

They are measured where they are installed, outside of this project, and left out elsewhere. All have
written to the disk before they answer, which is their default where they have files at all.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.figures import Goal, Round, Row, alternate, make_row
from benchmarks.processes import Command, Running, answer, contextd_alone
from benchmarks.producers import Options, Protocol, Shape
from benchmarks.scale import Scale

HERE = Path(__file__).resolve().parent
CONNECTIONS = 64
BATCH = 20
DURABLE_STREAMS = "BENCH_DURABLE_STREAMS"  # the folder in which npm installed it
RAKAIA = "BENCH_RAKAIA"  # a Python that has it
SETTINGS = frozenset({DURABLE_STREAMS, RAKAIA})


class Side(msgspec.Struct, frozen=True):
    """One of the two servers."""

    server: Running
    protocol: Protocol


def measure_durable_streams(scale: Scale) -> Row | None:
    """@durable-streams/server with files, or nothing."""
    installed = os.environ.get(DURABLE_STREAMS)
    node = shutil.which("node")
    if not installed or node is None:
        return None
    name = "@durable-streams/server, file storage"
    command = [node, str(HERE / "durable_streams.mjs"), installed]
    return compare(scale, "durable_streams", name, command)


def measure_rakaia(scale: Scale) -> Row | None:
    """rakaia-streams with files, or nothing."""
    python = os.environ.get(RAKAIA)
    if not python:
        return None
    name = "rakaia-streams, JsonlStreamStore"
    return compare(scale, "rakaia", name, [python, "-m", "benchmarks.rakaia_streams"])


def compare(scale: Scale, name: str, other_name: str, command: Sequence[str]) -> Row:
    """A chunk a request in turn; in the detail also several a request, the best that others have."""
    batches = alternately(scale, command, "batches")
    return make_row(
        name=name,
        what=f"durable 20-byte appends, one a request, {CONNECTIONS} connections",
        unit="appends/s",
        limit_is=other_name,
        goal=Goal(on="ratio", at_least=1),
        rounds=alternately(scale, command, "posts"),
        detail={f"chunks_per_s_in_batches_of_{BATCH}": [[one.value, one.limit] for one in batches]},
    )


def alternately(scale: Scale, command: Sequence[str], shape: Shape) -> list[Round]:
    """Rounds of one shape, on new servers, which have been warmed up."""
    with (
        contextd_alone() as contextd,
        tempfile.TemporaryDirectory() as folder,
        Command([*command, folder]) as other,
    ):
        ours = Side(contextd, "contextd")
        theirs = Side(Running(other.read_url(), other), "durable_streams")
        runs = iter(range(1000))

        def run_ours() -> float:
            return generate(ours, shape, f"run-{next(runs)}", scale.other_posts)

        def run_theirs() -> float:
            # The same streams each time: with more than a hundred of them, one server loses some.
            return generate(theirs, shape, "runs", scale.other_posts)

        run_ours()
        run_theirs()
        return alternate(scale.other_rounds, run_ours, run_theirs)


def generate(side: Side, shape: Shape, run: str, requests: int) -> float:
    """Chunks a second of one run."""
    chunks = 1 if shape == "posts" else BATCH
    options = Options(
        url=side.server.url,
        server_pid=side.server.child.pid,
        run=run,
        shape=shape,
        connections=CONNECTIONS,
        requests=requests,
        chunks=chunks,
        protocol=side.protocol,
    )
    return float(CONNECTIONS * requests * chunks / answer("producers", options)["seconds"])
