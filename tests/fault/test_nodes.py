"""The short run over several servers and their PostgreSQL: `--faults 200` is the long one."""

from pathlib import Path

import pytest
from nodes_run import run_nodes

FAULTS = (
    "kill a server",
    "freeze in a transaction",
    "end all connections",
    "end all connections",
    "stop the database",
    "stop the database",
    "freeze",
    "another database",
)


@pytest.mark.slow
async def test_three_servers_and_their_database_may_fail_at_any_moment(tmp_path: Path) -> None:
    """Texts, sequences and turns are whole, what was acknowledged is kept, another database is noticed."""
    done = await run_nodes(
        len(FAULTS),
        seed="short",
        folder=tmp_path,
        crowds=1,
        beside=1,
        deck=FAULTS,
        ways=["made anew"],
    )
    assert done["chunks acknowledged"] > 0
    assert done["servers that served another database"] == 3
    assert done["texts compared with the database after"] > 0
    assert done["conversations compared at the end"] > 0
