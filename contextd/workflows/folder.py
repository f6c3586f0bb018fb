"""The files of a folder: found, bounded, read. Nothing outside of the folder is ever opened."""

import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from contextd.core.values import WHOLE_ID_PATTERN

FILE_BYTES_MAX = 65_536
FILES_MAX = 1_000
ENTRIES_MAX = 10_000  # how much of a folder full of other things is looked at

SUFFIX = ".md"
Stamp: TypeAlias = tuple[int, int, int, int]


class UnreadableFile(Exception):
    """The file is there and cannot be read; in words for its author."""


def find(folder: Path) -> dict[str, tuple[Path, Stamp]]:
    """Each workflow's file by its name, in the order of names, and a stamp that changes with it.

    Hidden files, files with another kind of name, and links that lead out of the folder are passed
    over. A folder that is not there has no files.
    """
    try:
        inside = folder.resolve(strict=True)
        with os.scandir(inside) as entries:
            names = sorted(_names(entry.name for entry in islice(entries, ENTRIES_MAX)))
    except OSError:
        return {}
    found = ((name, _look_at(inside, name)) for name in names)
    return dict(islice(((name, seen) for name, seen in found if seen), FILES_MAX))


def read(path: Path) -> str:
    """The text of a file that `find` found. Raises `UnreadableFile`."""
    try:
        # It may have become something else since: a link is not followed, a pipe not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UnreadableFile("its file cannot be read") from error
    if len(data) > FILE_BYTES_MAX:
        raise UnreadableFile(f"its file is larger than {FILE_BYTES_MAX} bytes")
    if b"\0" in data:
        raise UnreadableFile("its file has U+0000 in it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnreadableFile("its file is not UTF-8") from error


def _names(file_names: Iterator[str]) -> Iterator[str]:
    for file_name in file_names:
        name = file_name.removesuffix(SUFFIX)
        hidden = name.startswith(".")
        if name != file_name and not hidden and re.match(WHOLE_ID_PATTERN, name):
            yield name


def _look_at(inside: Path, name: str) -> tuple[Path, Stamp] | None:
    try:
        path = (inside / (name + SUFFIX)).resolve(strict=True)
        status = path.stat()
    except (OSError, RuntimeError):  # gone, or a link in a circle
        return None
    if not path.is_relative_to(inside) or not stat.S_ISREG(status.st_mode):
        return None
    return path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
