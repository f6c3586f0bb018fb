"""Rows and names that another server has locked (§18): nobody in a group commit waits for them.

On SQLite the write lock of the whole transaction is enough, and all of this says nothing.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T", bound=tuple[Any, ...])
S = TypeVar("S")

WAITS_MS = "contextd_waits_ms"  # the execution option of a connection that does wait for rows
ADVISORY_NAMES = (
    0x63747865  # "ctxe": the first half of the locks of names; the second is their hash
)

_NOT_AVAILABLE = "55P03"
_DEADLOCK = "40P01"
# A connection whose session PostgreSQL has ended: it may not have heard the end of it yet.
_ENDED = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"})


def waits(connection: AsyncConnection) -> bool:
    """Whether this connection may wait for what others hold."""
    return WAITS_MS in connection.sync_connection.get_execution_options()  # type: ignore[union-attr]


def for_update(connection: AsyncConnection, query: Select[T], *, of: Any = None) -> Select[T]:
    """`query`, which locks its rows. Where the connection does not wait, a locked one is an error.

    Rows must be ordered by their key where there may be several.
    """
    return query.with_for_update(of=of, nowait=not waits(connection))


class Locking(Generic[S]):
    """A statement that is built once and locks rows as `for_update` does: `make` takes its `nowait`."""

    def __init__(self, make: Callable[[bool], S]) -> None:
        self._waiting, self._not_waiting = make(False), make(True)

    def on(self, connection: AsyncConnection) -> S:
        """The statement for this connection."""
        return self._waiting if waits(connection) else self._not_waiting


async def wait_for_rows(connection: AsyncConnection) -> None:
    """Lets a transaction that has just begun wait for as long as its connection may."""
    if waits(connection):
        waits_ms = connection.sync_connection.get_execution_options()[WAITS_MS]  # type: ignore[union-attr]
        await connection.execute(text(f"SET LOCAL lock_timeout = '{int(waits_ms)}ms'"))


async def lock_name(connection: AsyncConnection, name: str) -> None:
    """Locks an id that has no row yet: two servers may be about to insert it.

    Without this the second would wait for the first one's transaction, whatever it may wait for.
    """
    if connection.dialect.name != "postgresql":
        return
    key = {"kind": ADVISORY_NAMES, "name": name}
    if waits(connection):
        await connection.execute(_LOCK_NAME, key)
    elif not await connection.scalar(_TRY_NAME, key):
        raise DBAPIError(None, None, _LockedError(), hide_parameters=True)


def is_locked(error: BaseException | None) -> bool:
    """Whether a statement failed because another transaction has what it needs."""
    return _state(error) in {_NOT_AVAILABLE, _DEADLOCK}


async def is_closed(connection: AsyncConnection, error: Exception) -> bool:
    """Whether the database has ended the connection, or it broke."""
    if connection.invalidated or _state(error) in _ENDED:
        return True
    driver = (await connection.get_raw_connection()).driver_connection
    return bool(getattr(driver, "is_closed", lambda: False)())


class _LockedError(Exception):
    sqlstate = _NOT_AVAILABLE


_HASH = "CAST(:kind AS integer), hashtext(CAST(:name AS text))"
_LOCK_NAME = text(f"SELECT pg_advisory_xact_lock({_HASH})")
_TRY_NAME = text(f"SELECT pg_try_advisory_xact_lock({_HASH})")


def _state(error: BaseException | None) -> str | None:
    cause = error.orig if isinstance(error, DBAPIError) else error
    state: str | None = getattr(cause, "sqlstate", None)
    return state
