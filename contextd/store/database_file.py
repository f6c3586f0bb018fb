"""Checks that the SQLite file at the database's path is still the one that the server opened.

A process can write on into a file that was deleted or replaced, but those writes are lost at the next
start. So the writer checks before each commit. Device and inode identify a file. The write-ahead log is
checked as well, because it holds the newest commits.
"""

import os

from contextd.store.trouble import DatabaseMovedError

FREE_BYTES_MIN = 1024 * 1024  # with less than this on the disk the next commits may fail


class DatabaseFile:
    """The file that `path` named when this object was made. Each check follows a link anew.

    A file that was moved away and is put back passes the check again; a copy of it does not.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._log_path = f"{os.path.realpath(path)}-wal"
        self._file = _identity(self._path)
        self._log: tuple[int, int] | None = None

    def opened(self) -> None:
        """A new writing connection was opened, which may have made a new log."""
        self._log = None

    def check(self) -> None:
        """Raises `DatabaseMovedError` if the file or its log is gone or another one.

        To be called in a transaction that writes: from then on there is a log.
        """
        if self._log is None:
            self._log = _identity(self._log_path)
        self.check_before_open()
        if self._log is None:
            raise DatabaseMovedError

    def check_before_open(self) -> None:
        """The same before one more connection is opened, when there may be no log yet."""
        if self._file is None or _identity(self._path) != self._file:
            raise DatabaseMovedError
        if self._log is not None and _identity(self._log_path) != self._log:
            raise DatabaseMovedError

    def set_log_aside(self) -> str | None:
        """Renames the log of a file that was replaced; returns the log's new path.

        Otherwise SQLite would apply that log to the file in its place at the next start, and mix the two.
        To be called after every connection is closed.
        """
        now = _identity(self._path)
        if now in (None, self._file) or self._log is None or _identity(self._log_path) != self._log:
            return None
        aside = f"{self._log_path}.replaced-{self._log[1]}"
        os.rename(self._log_path, aside)
        return aside

    def disk_is_full(self) -> bool:
        """Whether less than `FREE_BYTES_MIN` is free. False where the file system does not say."""
        try:
            found = os.statvfs(os.path.dirname(self._path))
        except OSError:
            return False
        free = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        return found.f_blocks > 0 and free * found.f_frsize < FREE_BYTES_MIN


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
