"""Group commit and nothing else: what the database takes of writers that each wait for the commit."""

import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import uvloop
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.pacing import TEXT
from contextd.app import GC_THRESHOLDS
from contextd.store.engines import make_engines
from contextd.store.tables import chunks
from contextd.store.upgrade import upgrade
from contextd.store.writer import GROUP_MAX

Append = Callable[[int], Awaitable[object]]
Row = tuple[int, int, str, int, int]  # key, sequence, content, end_bytes and created_at of a chunk


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """So many writers, each of so many chunks at a time."""

    writers: int
    chunks: int
    seconds: float


class BareLoop:
    """No head, no fence, no refusal, no tail and no signals."""

    def __init__(self, connection: AsyncConnection, *, writers: int, chunks_each: int = 1) -> None:
        self._connection = connection
        self._chunks_each = chunks_each
        self._queue: list[tuple[list[Row], asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._sequences = [0] * writers
        # In the driver's own words: taking dicts apart would cost more than large commits do.
        self._insert = str(insert(chunks).compile(dialect=connection.dialect))

    def append(self, writer: int) -> asyncio.Future[None]:
        """Resolves when the writer's next chunks are durable."""
        before = self._sequences[writer]
        self._sequences[writer] += self._chunks_each
        now = time.time_ns() // 1_000_000
        rows: list[Row] = [
            (writer, sequence, TEXT, sequence * len(TEXT), now)
            for sequence in range(before + 1, self._sequences[writer] + 1)
        ]
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, durable))
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
                    rows = [row for rows, _ in group for row in rows]
                    await self._connection.exec_driver_sql(self._insert, rows)
                for _, durable in group:
                    if not durable.done():
                        durable.set_result(None)


async def per_second(append: Append, writers: int, seconds: float) -> float:
    """Appends that became durable in a second, with all writers at work."""
    started = time.perf_counter()
    until = started + seconds

    async def write(writer: int) -> int:
        count = 0
        while time.perf_counter() < until:
            await append(writer)
            count += 1
        return count

    counts = await asyncio.gather(*(write(writer) for writer in range(writers)))
    return sum(counts) / (time.perf_counter() - started)


async def measure(folder: Path, options: Options) -> float:
    """Chunks a second, in a database of its own."""
    url = f"sqlite+aiosqlite:///{folder}/bare.db"
    await upgrade(url)
    engines = make_engines(url, readers=1)
    async with engines.writer.connect() as connection:
        bare = BareLoop(connection, writers=options.writers, chunks_each=options.chunks)
        committing = asyncio.create_task(bare.run())
        await per_second(bare.append, options.writers, options.seconds / 4)
        found = await per_second(bare.append, options.writers, options.seconds)
        committing.cancel()
    await engines.dispose()
    return found * options.chunks


def main() -> None:
    """The measuring process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    gc.set_threshold(*GC_THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder:
        found = uvloop.run(measure(Path(folder), options))
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
