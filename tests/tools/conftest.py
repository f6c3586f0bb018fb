"""A workspace of its own for each test, and a folder beside it that nothing may reach."""

from pathlib import Path

import pytest
from workspace_parts import SECRET

from contextd.tools.workspace import Workspace


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the workspace, with a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    return tmp_path / "outside"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def workspace(root: Path) -> Workspace:
    return Workspace(root)
