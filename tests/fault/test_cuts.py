"""The short run of the cuts: `python tests/fault --cuts 2000` is the long one (docs/faults.md)."""

from pathlib import Path

from cut_run import run_cuts


async def test_readers_behind_cut_connections_are_exact(tmp_path: Path) -> None:
    """Whatever is cut, each reader ends with byte-equal texts, and no signal is ahead of its commit."""
    done = await run_cuts(cuts=100, seed="short", folder=tmp_path)
    assert done["cuts"] >= 100
    assert done["texts compared at the end"] > 0
    assert done["signals compared with the database"] > 0
    assert {where.split("/")[0] for where in done if where.startswith("cuts, ")} >= {
        "cuts, body",
        "cuts, head",
        "cuts, stream",
    }
