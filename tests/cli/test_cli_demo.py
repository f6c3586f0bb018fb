"""`contextd demo`: it needs nothing, ends by itself, and was exact."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_kills_its_server_and_is_exact(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The whole of it, in a folder of its own, in which it leaves nothing behind."""
    ran = subprocess.run(
        [sys.executable, "-m", "contextd", "demo"],
        env=environment | {"TMPDIR": str(tmp_path), "CONTEXTD_PORT": "nonsense"},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    out = ran.stdout.decode()
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert "kill -9" in out
    assert "[interrupted at" in out
    assert "  text equal        yes\n" in out
    assert list(tmp_path.iterdir()) == []
