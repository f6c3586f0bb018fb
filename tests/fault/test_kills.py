"""The short runs of the kills: `python tests/fault --kills 200` is the long one (docs/faults.md)."""

from pathlib import Path

from kill_run import KillRun


async def test_a_killed_server_has_lost_nothing_that_it_told(tmp_path: Path) -> None:
    """After SIGKILL: what was answered, signalled or pulled is there, and every turn ends once."""
    done = await KillRun(seed="short", folder=tmp_path, crowds=4).run(4)
    assert done["kills"] >= 4
    assert done["messages compared after a kill"] > 0
    assert done["conversations compared at the end"] >= 4


async def test_another_server_takes_over(tmp_path: Path) -> None:
    """Of two servers on one database either may die: the other one finishes what it had begun."""
    run = KillRun(seed="short", folder=tmp_path, servers=2, crowds=3)
    done = await run.run(2)
    assert done["conversations compared at the end"] >= 3
