"""SIGTERM under load; `python tests/fault --streams 1000` is the large one (docs/faults.md)."""

from pathlib import Path

from shutdown_run import EXIT_S_MAX, run_shutdown


async def test_a_stop_ends_all_streams_and_loses_nothing(tmp_path: Path) -> None:
    """300 streams and 20 turns: gone in seconds, each stream ended cleanly, each turn recovered."""
    done = await run_shutdown(streams=300, turns=20, seed="short", folder=tmp_path)
    assert done["exit_s"] < EXIT_S_MAX
    assert done["streams that ended cleanly"] == 300
    assert done["sends answered before the end"] >= 20
