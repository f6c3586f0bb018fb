"""A worker writes a report, line by line. Kill it and start it again: it goes on where it stopped.

    python worker.py report.json

The checkpoint says which message the worker writes. How far it has got is in contextd: each line is
one chunk, so `message.sequence` is the number of lines that are stored.
"""

import argparse
import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from contextd.client import DEFAULT_URL, Client, MessageClosedError


async def report(start: int, lines: int) -> AsyncIterator[str]:
    """Stands for slow work that can be taken up at any line."""
    for number in range(start, lines):
        await asyncio.sleep(0.05)
        yield f"Line {number + 1} of {lines}.\n"


def load(checkpoint: Path) -> tuple[str, str]:
    """The ids of this job's context and message, the same at every start."""
    if not checkpoint.exists():
        new = checkpoint.with_suffix(".new")
        new.write_text(json.dumps([str(uuid.uuid4()), str(uuid.uuid4())]))
        new.replace(checkpoint)  # at once: a crash leaves no half of it
    context_id, message_id = json.loads(checkpoint.read_text())
    return context_id, message_id


async def work(url: str, checkpoint: Path, lines: int) -> None:
    context_id, message_id = load(checkpoint)
    async with Client(url) as client:
        await client.create_context(id=context_id, title="A report")  # made once (§2)
        print(f"context {context_id}", flush=True)
        try:
            async with client.produce(context_id, message_id=message_id) as message:
                print(f"from line {message.sequence + 1} in epoch {message.epoch}", flush=True)
                async for line in report(message.sequence, lines):
                    await message.write(line)
            print(f"done: {message.sequence} lines")
        except MessageClosedError as error:
            print(f"{error.message_status} already, with {error.final_sequence} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description="A worker that survives being killed.")
    parser.add_argument("checkpoint", type=Path, help="a file that remembers the job")
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", DEFAULT_URL))
    given = parser.parse_args()
    asyncio.run(work(given.url, given.checkpoint, given.lines))


if __name__ == "__main__":
    main()
