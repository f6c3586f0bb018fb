"""Seeded runs with one and with two servers; docs/simulation.md says what is in them."""

import subprocess
import sys
from pathlib import Path

import pytest
from world import simulate

SEEDS = 100
RUNS_OF_A_TEST = 25
LINES_SHOWN = 80


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("first", range(1, SEEDS + 1, RUNS_OF_A_TEST))
def test_every_promise_is_kept(first: int, servers: int) -> None:
    """What fails says how to run it again."""
    for seed in range(first, first + RUNS_OF_A_TEST):
        outcome = simulate(seed, servers)
        if outcome.violation is not None:
            trace = "\n".join(outcome.trace[-LINES_SHOWN:])
            again = f"python tests/simulation --seed {seed} --servers {servers}"
            pytest.fail(f"{outcome.violation}\n{trace}\nAgain: {again}", pytrace=False)


def test_a_seed_does_the_same_again() -> None:
    """Here, and in a process that has not run others before and hashes otherwise."""
    here = "\n".join(simulate(3, 2).trace)
    command = [sys.executable, str(Path(__file__).parent), "--seed", "3", "--servers", "2"]
    there = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert here
    assert there.startswith(here)
