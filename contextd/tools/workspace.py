"""A folder that tools may read and write, and that no path leads out of (§8).

Theory of operation. A path is taken apart and its folders are opened one by one, each relative to the
one before and never through a symbolic link, by the system call itself. What was checked is what is
used: there is no moment between the two in which something else could be put there. Symbolic links are
not followed at all, also not where they stay inside. The functions here block: run them in a thread.
"""

import codecs
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import BinaryIO, Literal, NoReturn

import msgspec

from contextd.core.text import storable
from contextd.tools import ToolError
from contextd.tools.text import one_line

PATH_BYTES_MAX = 4096
PARTS_MAX = 64
FILE_BYTES_MAX = 8 * 1024 * 1024  # of a larger file only this much is looked at
BLOCK_BYTES = 65_536
WRITE_BYTES_MAX = 8 * 1024 * 1024
ENTRIES_MAX = 1000

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO would wait for its other end. O_NOCTTY: a terminal is not to become ours.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class WorkspaceError(ToolError):
    """The path is not allowed, or it cannot be done there; says which, in words for a model."""


class FilePart(msgspec.Struct, frozen=True, kw_only=True):
    """Lines `first_line` to `last_line` of a file; 0 for both where it has none.

    `text` is exactly these lines, unless `is_cut`: then it ends before the end of what was asked for,
    perhaps within a line. `lines` is how many the file has, null where it is too large to count.
    """

    path: str
    text: str
    first_line: int
    last_line: int
    lines: int | None
    is_cut: bool


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a folder under one name. `size_bytes` is of files only."""

    name: str
    kind: Literal["file", "folder", "link", "other"]
    size_bytes: int | None = None


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A folder's entries by name; some are missing where `is_cut`."""

    path: str
    entries: list[Entry]
    is_cut: bool


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What a write did."""

    path: str
    size_bytes: int
    is_new: bool


class Workspace:
    """The folder `root`. Paths are relative to it, with `/` between their parts."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Raises `WorkspaceError` where `root` is no folder, or this system cannot keep paths inside."""
        if os.open not in os.supports_dir_fd:
            raise WorkspaceError("A workspace is not possible on this system.")
        self._root = os.path.realpath(root)
        if not os.path.isdir(self._root):
            raise WorkspaceError("The workspace is not a folder.")

    def read(
        self,
        path: str,
        *,
        first_line: int | None = None,
        last_line: int | None = None,
        bytes_max: int,
    ) -> FilePart:
        """The file's text, or these lines of it (from 1, both included), in at most `bytes_max` bytes.

        What is not UTF-8 becomes U+FFFD. Raises `WorkspaceError`, also for a file that is not text and
        for a first line that it does not have.
        """
        parts = path_parts(path)
        check_lines(first_line, last_line)
        with _in_words(path), self._folder(parts[:-1]) as folder, _open_file(folder, parts) as file:
            data = file.read(FILE_BYTES_MAX + 1)
        is_whole = len(data) <= FILE_BYTES_MAX
        data = data[:FILE_BYTES_MAX]
        if b"\x00" in data:
            raise WorkspaceError(f"{path!r} is not a text file.")
        return _part(path, data, is_whole, first_line, last_line, bytes_max)

    def entries(self, path: str = ".") -> Listing:
        """What is in the folder: at most `ENTRIES_MAX`, by name. Raises `WorkspaceError`."""
        with _in_words(path), self._folder(path_parts(path)) as folder, os.scandir(folder) as found:
            listed = [_entry(item) for item in islice(found, ENTRIES_MAX + 1)]
        entries = sorted(listed[:ENTRIES_MAX], key=lambda entry: entry.name)
        return Listing(path=path, entries=entries, is_cut=len(listed) > ENTRIES_MAX)

    def write(self, path: str, content: str) -> Written:
        """Makes `content` the file's text, at once and wholly, and the folders on the way.

        An existing file keeps its mode. What is no file, a read-only file and a symbolic link are left
        alone. After a crash in the middle a file `.contextd-….tmp` may stay beside it. Raises
        `WorkspaceError`.
        """
        parts = path_parts(path)
        if not parts:
            raise WorkspaceError(f"{path!r} is a folder.")
        try:
            data = content.encode()
        except UnicodeEncodeError:
            raise WorkspaceError("The content holds half of a surrogate pair.") from None
        if len(data) > WRITE_BYTES_MAX:
            raise WorkspaceError(f"The content is larger than {WRITE_BYTES_MAX} bytes.")
        with _in_words(path), self._folder(parts[:-1], create=True) as folder:
            mode = _writable_mode(folder, parts[-1])
            _replace(folder, parts[-1], data, mode)
        return Written(path=path, size_bytes=len(data), is_new=mode is None)

    @contextmanager
    def _folder(self, parts: list[str], *, create: bool = False) -> Iterator[int]:
        """An open folder. No part of the way to it was a symbolic link when it was gone."""
        opened = os.open(self._root, _FOLDER)
        try:
            for part in parts:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=opened)
                inner = os.open(part, _FOLDER, dir_fd=opened)
                os.close(opened)
                opened = inner
            yield opened
        finally:
            os.close(opened)


def path_parts(path: str) -> list[str]:
    """The names that `path` is made of; none for the workspace itself.

    Raises `WorkspaceError` for a path that is absolute or has `..`, and for characters that no name
    needs and that mean something else elsewhere: backslash, control characters, halves of pairs.
    """
    if not path:
        raise WorkspaceError("The path is empty.")
    if storable(path) != path or _UNPRINTABLE.search(path):
        raise WorkspaceError("A path has no control characters and no broken ones.")
    if len(path.encode()) > PATH_BYTES_MAX:
        raise WorkspaceError(f"A path has at most {PATH_BYTES_MAX} bytes.")
    if "\\" in path:
        raise WorkspaceError(
            f"{_short(path)}: the parts of a path are separated by '/', not by '\\'."
        )
    if path.startswith("/"):
        raise WorkspaceError(
            f"{_short(path)}: a path is relative to the workspace, without a first '/'."
        )
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise WorkspaceError(f"{_short(path)}: a path has no '..'.")
    if len(parts) > PARTS_MAX:
        raise WorkspaceError(f"A path has at most {PARTS_MAX} parts.")
    return parts


def check_lines(first_line: int | None, last_line: int | None) -> None:
    """Raises `WorkspaceError` unless these are the ends of a range of lines, or none."""
    first, last = first_line or 1, last_line or first_line or 1
    if any(line is not None and line < 1 for line in (first_line, last_line)):
        raise WorkspaceError("Lines are counted from 1.")
    if last < first:
        raise WorkspaceError(f"The last line, {last}, comes before the first, {first}.")


def _short(path: str) -> str:
    return repr(one_line(path, 200))


@contextmanager
def _in_words(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _raise_in_words(path, error)


def _raise_in_words(path: str, error: OSError) -> NoReturn:
    reasons = {
        errno.ENOENT: "does not exist",
        errno.ENOTDIR: "leads through something that is not a folder (links are not followed)",
        errno.ELOOP: "is a symbolic link, and links are not followed",
        errno.EISDIR: "is a folder",
        errno.EACCES: "may not be accessed",
        errno.EPERM: "may not be accessed",
        errno.ENAMETOOLONG: "has a name that is too long",
        errno.ENXIO: "is not a file",  # a socket
        errno.EROFS: "cannot be written: the workspace is read-only",
        errno.ENOSPC: "cannot be written: there is no space left",
    }
    reason = reasons.get(error.errno or 0) or f"cannot be used: {error.strerror}"
    raise WorkspaceError(f"{_short(path)} {reason}.") from None


@contextmanager
def _open_file(folder: int, parts: list[str]) -> Iterator[BinaryIO]:
    if not parts:
        raise IsADirectoryError(errno.EISDIR, "the workspace itself")
    opened = os.open(parts[-1], _FILE, dir_fd=folder)
    with os.fdopen(opened, "rb") as file:
        mode = os.fstat(opened).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a folder")
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, "a device, a FIFO or the like")
        yield file


def _part(
    path: str,
    data: bytes,
    is_whole: bool,
    first_line: int | None,
    last_line: int | None,
    bytes_max: int,
) -> FilePart:
    lines = data.count(b"\n") + (not data.endswith(b"\n")) if data else 0
    first = first_line or 1
    start = line_start(data, first)
    if start == len(data) and first > 1:
        known = (
            f"has {lines} lines" if is_whole else f"has more than {FILE_BYTES_MAX} bytes before it"
        )
        raise WorkspaceError(f"{_short(path)} has no line {first} to be shown: it {known}.")
    end = len(data) if last_line is None else line_start(data, last_line + 1)
    text, is_cut = _head(data[start:end], bytes_max, is_cut=end == len(data) and not is_whole)
    return FilePart(
        path=path,
        text=text,
        first_line=first if data else 0,
        last_line=first + max(text.count("\n") - text.endswith("\n"), 0) if data else 0,
        lines=lines if is_whole else None,
        is_cut=is_cut,
    )


def line_start(data: bytes, line: int) -> int:
    """Where this line begins, or the end where there are fewer."""
    start, left = 0, line - 1
    while left > 0:
        end = min(start + BLOCK_BYTES, len(data))
        found = data.count(b"\n", start, end)  # counting a block is far faster than finding each
        if found >= left:
            for _ in range(left):
                start = data.find(b"\n", start) + 1
            return start
        if end == len(data):
            return end
        start, left = end, left - found
    return start


def _head(data: bytes, bytes_max: int, *, is_cut: bool) -> tuple[str, bool]:
    """As much of `data` as there is room for, and whether that is less than all."""
    is_cut = is_cut or len(data) > bytes_max
    # Not final: the first bytes of a character that the cut goes through are left out.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data[:bytes_max], final=not is_cut)
    encoded = text.encode()
    if len(encoded) > bytes_max:  # U+FFFD is longer than the byte that it stands for
        text, is_cut = encoded[:bytes_max].decode(errors="ignore"), True
    whole_lines = text.rfind("\n") + 1
    return (text[:whole_lines], True) if is_cut and whole_lines else (text, is_cut)


def _entry(item: os.DirEntry[str]) -> Entry:
    name = _UNPRINTABLE.sub("\ufffd", storable(item.name))
    if item.is_symlink():
        return Entry(name=name, kind="link")
    if item.is_dir(follow_symlinks=False):
        return Entry(name=name, kind="folder")
    if not item.is_file(follow_symlinks=False):
        return Entry(name=name, kind="other")
    try:
        return Entry(name=name, kind="file", size_bytes=item.stat(follow_symlinks=False).st_size)
    except OSError:  # it has gone since
        return Entry(name=name, kind="file")


def _writable_mode(folder: int, name: str) -> int | None:
    """The permissions of the file that is to be replaced; None where there is none."""
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "a link")
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, "a device, a FIFO or the like")
    if not mode & 0o222:  # asked of the mode, as root could write it all the same
        raise PermissionError(errno.EACCES, "read-only")
    return mode & 0o777


def _replace(folder: int, name: str, data: bytes, mode: int | None) -> None:
    temporary = f".contextd-{secrets.token_hex(8)}.tmp"
    opened = os.open(temporary, _NEW_FILE, 0o666, dir_fd=folder)
    try:
        with os.fdopen(opened, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(opened, mode)
            os.fsync(opened)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    with suppress(OSError):  # not every file system does; the file itself is written
        os.fsync(folder)
