"""What the memory of committed text costs: a million empty and short messages through one process.

Run by hand, with `tests` on the path: `python -m benchmarks.remembering`. The messages are rows of a real
database and go through the ledger's commits and hooks, a thousand in a transaction, since a request for
each would take an hour. The same again with a tail that holds nothing is what to compare with.
"""

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from contextd.app import GC_THRESHOLDS, Contextd, running
from contextd.core.context import ContextRequest
from contextd.core.message import MessageStatus
from contextd.settings import Settings
from contextd.store.edit import ContextEdit
from contextd.store.notices import ClosedMessage, OpenedMessage

BATCH = 1000
LOOK_S = 0.002
MESSAGE_SQL = """INSERT INTO messages (key, context_key, id, superseded, revision, opened_revision, role,
    kind, status, final_sequence, media_type, metadata, client_metadata, created_at, changed_at)
    VALUES (?, ?, ?, 0, ?, ?, 'user', 'text', 'completed', ?, 'text/plain', '{}', '{}', 0, 0)"""
HEAD_SQL = """INSERT INTO heads (message_key, is_open, head, bytes, characters, fence, written_at)
    VALUES (?, 0, ?, ?, ?, 0, 0)"""
CHUNK_SQL = """INSERT INTO chunks (message_key, sequence, content, end_bytes, created_at)
    VALUES (?, 1, ?, ?, 0)"""


class Found(msgspec.Struct):
    """What one process measured."""

    tail_mib: float
    held: int
    weight_mib: float
    grown_mib: float
    worst_ms: float
    next_ms: list[float]


async def insert(edit: ContextEdit, first_key: int, count: int) -> None:
    """Closed messages of one context, every other of them empty, as one change."""
    edit.change()
    opened = [message(first_key + index, index % 2) for index in range(count)]
    now = edit.revision
    driver: Any = (await edit.connection.get_raw_connection()).driver_connection
    rows = [(m.key, edit.key, m.id, now, now, len(m.texts)) for m in opened]
    await driver.executemany(MESSAGE_SQL, rows)
    ends = [(m.key, len(m.texts), sum(m.ends), sum(m.ends)) for m in opened]
    await driver.executemany(HEAD_SQL, ends)
    await driver.executemany(CHUNK_SQL, [(m.key, m.texts[0], m.ends[0]) for m in opened if m.texts])
    edit.notice.opened.extend(opened)
    edit.notice.closed.extend(closed(m) for m in opened)


def message(key: int, chunks: int) -> OpenedMessage:
    text = f"hi {key}"
    return OpenedMessage(
        key=key,
        id=f"m{key:035d}",
        role="user",
        kind="text",
        texts=[text] * chunks,
        ends=[len(text)] * chunks,
        status=MessageStatus.COMPLETED,
        produced=False,
    )


def closed(opened: OpenedMessage) -> ClosedMessage:
    return ClosedMessage(
        key=opened.key,
        id=opened.id,
        role=opened.role,
        kind=opened.kind,
        status=opened.status,
        final=len(opened.texts),
    )


async def lateness(late: list[float]) -> None:
    """How late the loop wakes what sleeps, for as long as this is not cancelled."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(LOOK_S)
        late.append((time.monotonic() - began - LOOK_S) * 1000)


async def push(contextd: Contextd, context_id: str, first_key: int, count: int) -> None:
    await contextd.service.ledger.edit(context_id, lambda edit: insert(edit, first_key, count))


async def measure(messages: int, per_context: int, tail_bytes: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite+aiosqlite:///{Path(folder) / 'contextd.db'}"
        async with running(Settings(database=database, tail_bytes_max=tail_bytes)) as contextd:
            contexts = [f"c{number:035d}" for number in range(-(-messages // per_context))]
            for context_id in contexts:
                await contextd.service.contexts.create(ContextRequest(id=context_id))
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            before = psutil.Process().memory_info().rss
            late: list[float] = []
            looking = asyncio.create_task(lateness(late))
            for start in range(0, messages, BATCH):
                context_id = contexts[start // per_context]
                await push(contextd, context_id, start + 1, min(BATCH, messages - start))
            looking.cancel()
            grown = psutil.Process().memory_info().rss - before
            tail = contextd.service.ledger.tail
            worst = sorted(late, reverse=True)[:6]
            mib = 1 << 20
            return Found(
                tail_bytes / mib,
                len(tail),
                tail.weight_bytes / mib,
                grown / mib,
                worst[0],
                worst[1:],
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.remembering", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--per-context", type=int, default=BATCH, help="a multiple of 1,000")
    parser.add_argument("--tail-bytes", type=int, help="measure only this, in this process")
    options = parser.parse_args()
    if options.tail_bytes is not None:
        found = asyncio.run(measure(options.messages, options.per_context, options.tail_bytes))
        sys.stdout.write(f"{found}\n")
        return
    size = ["--messages", str(options.messages), "--per-context", str(options.per_context)]
    for tail_bytes in (1, 64 << 20):
        command = [sys.executable, "-m", "benchmarks.remembering", *size]
        subprocess.run([*command, "--tail-bytes", str(tail_bytes)], check=True)


if __name__ == "__main__":
    main()
