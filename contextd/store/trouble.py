"""Classifies the errors of both databases: which may pass by themselves, and which never do.

An error that may pass becomes `overloaded` (503), and a turn tries its write again. An error that never
passes becomes `internal_error` (500), and nobody tries again: a defect of a statement or its values
concerns one caller, a broken database concerns all of them until an operator mends it. The error's code
decides. Its text is never shown or logged, because it may quote a row, and a row holds chat text.
"""

import sqlite3
from collections.abc import Mapping
from enum import Enum, auto

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from contextd.core.errors import ContextdError, InternalError, Overloaded

log = structlog.get_logger(__name__)


class Kind(Enum):
    """The kinds of database errors. The first four may pass."""

    HELD = auto()  # a trigger holds this one write back
    BUSY = auto()  # locked by others, or rolled back in their favour
    AWAY = auto()  # no connection: cut, refused, starting, stopping
    FULL = auto()  # the disk is full or fails
    BROKEN = auto()  # an operator has to mend it: damaged, read-only, replaced, access denied
    DEFECT = auto()  # the database will never accept this statement with these values


class Trouble(msgspec.Struct, frozen=True):
    """An error of the database: `code` is SQLSTATE, SQLite's name, or the driver's class.

    `reason` ends a sentence that begins with "The database"; empty for a defect.
    """

    kind: Kind
    code: str
    reason: str = ""

    @property
    def may_pass(self) -> bool:
        """Whether the same write may succeed later without an operator."""
        return self.kind in {Kind.HELD, Kind.BUSY, Kind.AWAY, Kind.FULL}

    @property
    def sentence(self) -> str:
        """The reason as a sentence for the operator, without names, paths or chat text."""
        return f"The database {self.reason}."


class DatabaseMovedError(Exception):
    """The file at the database's path is not the one that was opened: deleted or replaced."""


class AnotherDatabaseError(Exception):
    """A new connection found another database, or one without a log, in the place of ours (§18)."""


_LOCKED = (Kind.BUSY, "is locked by another program")
_HELD = (Kind.HELD, "holds this write back by a trigger")
_AWAY = (Kind.AWAY, "does not answer")
_FULL = (Kind.FULL, "cannot be written: the disk is full")
_FAILING = (Kind.FULL, "cannot be read or written: the disk fails")
_READ_ONLY = (Kind.BROKEN, "cannot be written: it is read-only")
_DAMAGED = (Kind.BROKEN, "is damaged")
_NOT_ALLOWED = (Kind.BROKEN, "does not let contextd in")
_MOVED = (Kind.BROKEN, "was deleted or replaced while the server ran")
_DEFECT = (Kind.DEFECT, "")

# A trigger of an operator's that holds writes back cannot set a code. It can say what SQLite says itself.
_LOCKED_WORDS = "database is locked"

# The longest prefix of SQLite's extended name decides.
_SQLITE: Mapping[str, tuple[Kind, str]] = {
    "SQLITE_BUSY": _LOCKED,
    "SQLITE_LOCKED": _LOCKED,
    "SQLITE_PROTOCOL": _LOCKED,
    "SQLITE_SCHEMA": _LOCKED,
    "SQLITE_ABORT": _LOCKED,
    "SQLITE_INTERRUPT": _LOCKED,
    "SQLITE_NOMEM": (Kind.BUSY, "has no memory left"),
    "SQLITE_FULL": _FULL,
    "SQLITE_IOERR": _FAILING,
    "SQLITE_IOERR_CORRUPTFS": _DAMAGED,
    "SQLITE_CANTOPEN": (Kind.AWAY, "cannot be opened"),
    "SQLITE_CORRUPT": _DAMAGED,
    "SQLITE_NOTADB": (Kind.BROKEN, "is not a SQLite database; it was left as it is"),
    "SQLITE_READONLY": _READ_ONLY,
    "SQLITE_READONLY_DBMOVED": _MOVED,
    "SQLITE_PERM": _NOT_ALLOWED,
    "SQLITE_AUTH": _NOT_ALLOWED,
}

# The longest prefix of SQLSTATE decides; its first two characters are the class.
_POSTGRESQL: Mapping[str, tuple[Kind, str]] = {
    "08": _AWAY,
    "25006": _READ_ONLY,
    "25P03": (Kind.BUSY, "ended a transaction that stood still"),
    "25P04": (Kind.BUSY, "ended a transaction that took too long"),
    "28": _NOT_ALLOWED,
    "3D": (Kind.BROKEN, "is not there"),
    "3F": (Kind.BROKEN, "has not the tables of contextd"),
    "40": (Kind.BUSY, "rolled the write back in favour of another"),
    "42501": _NOT_ALLOWED,
    "42P01": (Kind.BROKEN, "has not the tables of contextd"),
    "42703": (Kind.BROKEN, "has not the tables of contextd"),
    "53": (Kind.BUSY, "has no resources left"),
    "53100": _FULL,
    "53300": (Kind.AWAY, "has no connection left"),
    "55006": _LOCKED,
    "55P03": _LOCKED,
    "57": _AWAY,
    "57014": (Kind.BUSY, "took too long"),
    "57P04": (Kind.BROKEN, "is not there"),
    "58": _FAILING,
    "58P01": _DAMAGED,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}


def trouble_of(error: BaseException) -> Trouble | None:
    """The classification of `error`; None if it does not come from the database."""
    if isinstance(error, DatabaseMovedError):
        return _trouble("moved", _MOVED)
    if isinstance(error, PoolTimeoutError):
        return _trouble("pool", _LOCKED)
    if isinstance(error, OSError | TimeoutError | PendingRollbackError):
        return _trouble(type(error).__name__, _AWAY)
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    if isinstance(cause, AnotherDatabaseError):
        return _trouble("another", (Kind.AWAY, str(cause)))
    if state := getattr(cause, "sqlstate", None):
        return _trouble(state, _found(_POSTGRESQL, state))
    if name := getattr(cause, "sqlite_errorname", None):
        if name == "SQLITE_CONSTRAINT_TRIGGER" and str(cause) == _LOCKED_WORDS:
            return _trouble(name, _HELD)
        return _trouble(name, _found(_SQLITE, name))
    if isinstance(error, DBAPIError | sqlite3.Error) or _is_drivers(error):
        return _trouble(type(cause).__name__, _without_code(error, cause))
    return None


def translated(error: Exception, *, event: str) -> Exception:
    """The `ContextdError` for a database error, which is logged as `event` with its code.

    An error that does not come from the database is returned as it is.
    """
    trouble = trouble_of(error)
    if trouble is None or isinstance(error, ContextdError):
        return error
    log.error(event, code=trouble.code, kind=trouble.kind.name.lower(), may_pass=trouble.may_pass)
    if trouble.may_pass:
        return Overloaded(f"{trouble.sentence} Nothing was done.")
    return InternalError()


def _trouble(code: str, meaning: tuple[Kind, str]) -> Trouble:
    return Trouble(meaning[0], code, meaning[1])


def _found(table: Mapping[str, tuple[Kind, str]], code: str) -> tuple[Kind, str]:
    """An unknown code counts as a defect, because only errors that are known to pass are retried."""
    for length in range(len(code), 1, -1):
        if code[:length] in table:
            return table[code[:length]]
    return _DEFECT


def _is_drivers(error: BaseException) -> bool:
    """asyncpg raises its own errors while connecting. Told by name: it may not be installed."""
    return type(error).__module__.partition(".")[0] == "asyncpg"


def _without_code(error: BaseException, cause: BaseException) -> tuple[Kind, str]:
    """An error of the driver itself: the connection is closed, or a value cannot be sent."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return _AWAY
    # sqlite3 tells a closed connection from a bad value only by its text.
    is_bad_value = isinstance(cause, sqlite3.Error) and "closed" not in str(cause)
    return _DEFECT if is_bad_value else _AWAY
