"""Durable appends by 64 writers at once, against a bare group-commit loop on the same connection."""

import asyncio
import gc
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.bare_commits import Append, BareLoop, per_second
from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.opening import LEASE_S, open_message
from benchmarks.pacing import TEXT
from benchmarks.processes import answer
from benchmarks.scale import Scale
from contextd.app import GC_THRESHOLDS, running
from contextd.service import Ledger
from contextd.settings import Settings
from contextd.store.engines import make_engines
from contextd.store.notices import StartedTurn
from contextd.store.tail import LiveMessage
from contextd.store.upgrade import upgrade

WRITERS = 64


class Options(msgspec.Struct, frozen=True):
    """What the measuring process is told."""

    rounds: int
    seconds: float


def measure(scale: Scale) -> Row:
    """The figure."""
    found = answer("appends", Options(scale.append_rounds, scale.append_s))
    return make_row(
        name="appends",
        what=f"durable appends of one 20-byte chunk by {WRITERS} writers, each to a message of its own",
        unit="chunks/s",
        limit_is="a bare group-commit loop: one held SQLAlchemy connection, one INSERT a commit",
        goal=Goal(on="ratio", at_least=0.7),
        rounds=[Round(value, limit) for value, limit in found["rounds"]],
        detail={"writers": WRITERS, "chunks_per_commit": found["chunks_per_commit"]},
    )


def through_service(ledger: Ledger, opened: list[tuple[StartedTurn, LiveMessage]]) -> Append:
    """Appends as a turn does."""

    def append(writer: int) -> Awaitable[object]:
        turn, live = opened[writer]
        return ledger.append(live, fence=turn.fence, texts=(TEXT,))

    return append


async def compare(folder: Path, options: Options) -> dict[str, Any]:
    """Both in turn, in one process and on one loop, each on a database of its own."""
    settings = Settings(database=f"sqlite+aiosqlite:///{folder}/contextd.db", lease_s=LEASE_S)
    bare_url = f"sqlite+aiosqlite:///{folder}/bare.db"
    await upgrade(bare_url)
    engines = make_engines(bare_url, readers=1)
    async with running(settings) as contextd, engines.writer.connect() as connection:
        opened = [await open_message(contextd, f"c{number}") for number in range(WRITERS)]
        ledger = contextd.service.ledger
        bare = BareLoop(connection, writers=WRITERS)
        committing = asyncio.create_task(bare.run())
        append = through_service(ledger, opened)
        await per_second(
            append, WRITERS, options.seconds / 4
        )  # both have compiled their statements
        await per_second(bare.append, WRITERS, options.seconds / 4)
        commits, written = ledger.writer.commits, ledger.writer.chunks_written
        rounds = []
        for _ in range(options.rounds):
            limit = await per_second(bare.append, WRITERS, options.seconds)
            rounds.append((await per_second(append, WRITERS, options.seconds), limit))
        committing.cancel()
        grouped = (ledger.writer.chunks_written - written) / (ledger.writer.commits - commits)
    await engines.dispose()
    return {"rounds": rounds, "chunks_per_commit": round(grouped, 1)}


def main() -> None:
    """The measuring process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    gc.set_threshold(*GC_THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder:
        found = uvloop.run(compare(Path(folder), options))
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
