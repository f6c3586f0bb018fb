"""A folder of workflows that a test fills."""

from pathlib import Path
from textwrap import dedent

import pytest
from workflow_writing import Write

from contextd.workflows import Workflows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the workflows are."""
    folder = tmp_path / "workflows"
    folder.mkdir()
    return folder


@pytest.fixture
def write(folder: Path) -> Write:
    def write_file(name: str, front_matter: str = "", body: str = "Hello.") -> Path:
        path = folder / f"{name}.md"
        path.write_text(f"---\n{dedent(front_matter).strip()}\n---\n{body}\n", encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def workflows(folder: Path) -> Workflows:
    return Workflows(folder)
