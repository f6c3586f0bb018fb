"""How tests write workflows."""

from pathlib import Path
from typing import Protocol


class Write(Protocol):
    """Writes a file: its front matter, and its body."""

    def __call__(self, name: str, front_matter: str = "", body: str = "Hello.") -> Path: ...
