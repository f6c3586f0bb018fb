"""Text that says when it was made, at a fixed rate.

A chunk is 20 digits: the monotonic clock, which all processes of a machine share, in nanoseconds. So
whoever has the text knows how long it was on its way, and no clock has to be compared with another.
"""

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec

STAMP_DIGITS = 20
TEXT = "0123456789abcdefghij"  # a chunk as long, of those who measure no time


class Pace(msgspec.Struct, frozen=True):
    """How many chunks, and how many a second; 0 is as fast as can be."""

    chunks: int
    rate: float


def stamp() -> str:
    """Now, as a chunk."""
    return f"{time.monotonic_ns():0{STAMP_DIGITS}d}"


def read_stamps(text: str) -> list[int]:
    """The nanoseconds in a text that is made of stamps."""
    starts = range(0, len(text), STAMP_DIGITS)
    return [int(text[start : start + STAMP_DIGITS]) for start in starts]


async def beats(pace: Pace) -> AsyncIterator[int]:
    """1, 2, … at the pace. A late beat does not delay those after it."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    for sequence in range(1, pace.chunks + 1):
        if pace.rate:
            await asyncio.sleep(max(0.0, started + sequence / pace.rate - loop.time()))
        yield sequence
