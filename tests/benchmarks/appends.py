"""Durable appends by 64 writers at once, against a bare group-commit loop on the same connection."""

import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.opening import LEASE_S, open_message
from benchmarks.processes import answer
from benchmarks.scale import Scale
from contextd.app import GC_THRESHOLDS, running
from contextd.service import Ledger
from contextd.settings import Settings
from contextd.store.edit import StartedTurn
from contextd.store.engines import make_engines
from contextd.store.tables import chunks
from contextd.store.tail import LiveMessage
from contextd.store.upgrade import upgrade
from contextd.store.writer import GROUP_MAX

WRITERS = 64
TEXT = "0123456789abcdefghij"

Append = Callable[[int], Awaitable[object]]


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


class BareLoop:
    """Group commit and nothing else: no head, no fence, no refusal, no tail and no signals."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._queue: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._sequences = [0] * WRITERS
        self._insert = insert(chunks)

    def append(self, writer: int) -> asyncio.Future[None]:
        """Resolves when the writer's next chunk is durable."""
        sequence = self._sequences[writer] = self._sequences[writer] + 1
        row = {
            "message_key": writer,
            "sequence": sequence,
            "content": TEXT,
            "end_bytes": sequence * len(TEXT),
            "created_at": time.time_ns() // 1_000_000,
        }
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((row, durable))
        self._wake.set()
        return durable

    async def run(self) -> None:
        """Commits what has queued, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                group, self._queue = self._queue[:GROUP_MAX], self._queue[GROUP_MAX:]
                async with self._connection.begin():
                    await self._connection.execute(self._insert, [row for row, _ in group])
                for _, durable in group:
                    if not durable.done():
                        durable.set_result(None)


async def per_second(append: Append, seconds: float) -> float:
    """Appends that became durable in a second, with all writers at work."""
    started = time.perf_counter()
    until = started + seconds

    async def write(writer: int) -> int:
        count = 0
        while time.perf_counter() < until:
            await append(writer)
            count += 1
        return count

    counts = await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    return sum(counts) / (time.perf_counter() - started)


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
        bare = BareLoop(connection)
        committing = asyncio.create_task(bare.run())
        append = through_service(ledger, opened)
        await per_second(append, options.seconds / 4)  # both have compiled their statements
        await per_second(bare.append, options.seconds / 4)
        commits, written = ledger.writer.commits, ledger.writer.chunks_written
        rounds = []
        for _ in range(options.rounds):
            limit = await per_second(bare.append, options.seconds)
            rounds.append((await per_second(append, options.seconds), limit))
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
