"""How much a run measures: enough to mean something, or just enough to see that it works."""

from typing import Final

import msgspec


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one run. Seconds and counts are per round and per side."""

    append_rounds: int
    append_s: float
    pull_rounds: int
    pulls: int
    reader_rounds: int
    readers: int
    reader_signals: int
    replay_rounds: int
    replay_chunks: int
    latency_rounds: int
    latency_signals: int
    idle_rounds: int
    idle_readers: int
    exit_rounds: int
    exit_streams: int
    exit_turns: int
    cancels: int
    produced_rounds: int
    produced_lines: int
    produced_batches: int
    produced_posts: int
    line_latency_rounds: int
    line_latency_chunks: int
    flood_rounds: int
    flood_mib: int
    other_rounds: int
    other_posts: int


FULL: Final = Scale(
    append_rounds=6,
    append_s=1.0,
    pull_rounds=5,
    pulls=40_000,
    reader_rounds=5,
    readers=1000,
    reader_signals=60,
    replay_rounds=7,
    replay_chunks=100_000,
    latency_rounds=3,
    latency_signals=200,
    idle_rounds=1,
    idle_readers=5000,
    exit_rounds=2,
    exit_streams=1000,
    exit_turns=20,
    cancels=50,
    produced_rounds=5,
    produced_lines=320_000,
    produced_batches=200,
    produced_posts=250,
    line_latency_rounds=3,
    line_latency_chunks=300,
    flood_rounds=2,
    flood_mib=400,
    other_rounds=3,
    other_posts=100,
)

QUICK: Final = Scale(
    append_rounds=1,
    append_s=0.1,
    pull_rounds=1,
    pulls=400,
    reader_rounds=1,
    readers=20,
    reader_signals=10,
    replay_rounds=1,
    replay_chunks=2000,
    latency_rounds=1,
    latency_signals=10,
    idle_rounds=1,
    idle_readers=50,
    exit_rounds=1,
    exit_streams=20,
    exit_turns=2,
    cancels=2,
    produced_rounds=1,
    produced_lines=6400,
    produced_batches=2,
    produced_posts=4,
    line_latency_rounds=1,
    line_latency_chunks=10,
    flood_rounds=1,
    flood_mib=8,
    other_rounds=1,
    other_posts=2,
)
