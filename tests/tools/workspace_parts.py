"""What tests of the workspace share."""

import stat
from pathlib import Path

from contextd.tools.workspace import FilePart, Workspace

SECRET = "the secret outside"
ROOM_BYTES = 1_000


def read(workspace: Workspace, path: str, bytes_max: int = ROOM_BYTES, **lines: int) -> FilePart:
    return workspace.read(path, bytes_max=bytes_max, **lines)


def snapshot(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Everything below `folder`, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = stat.filemode(path.lstat().st_mode)
        found[str(path)] = mode, path.read_bytes() if mode.startswith("-") else b""
    return found
