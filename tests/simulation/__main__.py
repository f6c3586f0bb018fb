"""Runs by hand: `python tests/simulation --seeds 10000`, or one again: `--seed 123 --servers 2`."""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from world import simulate, without_trace  # noqa: E402 - found by the paths above


def main() -> int:
    """The exit code: 1 when a promise was broken."""
    arguments = _parse()
    if arguments.seed is not None:
        outcome = simulate(arguments.seed, arguments.servers or 2)
        print("\n".join(outcome.trace))
        print(outcome.violation or "All promises were kept.")
        return int(outcome.violation is not None)
    servers = (arguments.servers,) if arguments.servers else (1, 2)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    return _many([(seed, count) for seed in seeds for count in servers], arguments.jobs)


def _many(runs: list[tuple[int, int]], jobs: int) -> int:
    began, counts = time.monotonic(), Counter[str]()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for outcome in pool.imap_unordered(without_trace, runs, chunksize=20):
            counts.update(outcome.counts)
            if outcome.violation:
                counts["broken"] += 1
                print(
                    f"--seed {outcome.seed} --servers {outcome.servers}: {outcome.violation}",
                    flush=True,
                )
    print(f"{len(runs)} runs in {time.monotonic() - began:.0f} s: {dict(sorted(counts.items()))}")
    return int(counts["broken"] > 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="one run, with its trace")
    parser.add_argument("--servers", type=int, choices=(1, 2), help="default: both for many seeds")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
