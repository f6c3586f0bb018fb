"""How contextd opens its database: which URLs it takes, and how each driver is set up.

There are two engines. The writer has one connection, and each of its transactions begins with the
write lock (SQLite's BEGIN IMMEDIATE): a deferred one that reads first and writes then is refused
with "database is locked", however long it is willing to wait. The readers never write.

On PostgreSQL there is a third, for writes that wait for rows which another server holds. What a
connection may hold, and for how long, is set when it is made, so that neither a server that stands
still in a transaction nor a network that swallows everything can hold the others up.
"""

import importlib.util
import socket
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from contextd.store import sqlite_driver
from contextd.store.database_file import DatabaseFile
from contextd.store.incarnation import Incarnation, identify
from contextd.store.trouble import Kind, trouble_of

Dialect: TypeAlias = Literal["sqlite", "postgresql"]

SQLITE = "sqlite+aiosqlite"
POSTGRESQL = "postgresql+asyncpg"
SQLITE_VERSION_MIN = (3, 35)  # the first with RETURNING
BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
APPLICATION_NAME = "contextd"
WAITING_CONNECTIONS = 4  # for writes that wait for other servers, opened only while some do

_COMMON_PRAGMAS = {"temp_store": "MEMORY", "synchronous": "FULL"}
WRITER_PRAGMAS: Mapping[str, str] = {
    "journal_mode": "WAL",
    **_COMMON_PRAGMAS,
    "foreign_keys": "ON",
    "cache_size": "-16384",  # KiB
    # 16 MiB of log between checkpoints, because each checkpoint syncs the file once more; after a
    # burst that a long read kept from being checkpointed, the log is cut back to 64 MiB.
    "wal_autocheckpoint": "4096",
    "journal_size_limit": "67108864",
}
READER_PRAGMAS: Mapping[str, str] = {
    **_COMMON_PRAGMAS,
    "query_only": "ON",
    "cache_size": "-8192",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """How long a connection to PostgreSQL lets each thing take. 0: as long as it likes.

    `lock_ms` bounds a wait for a row, `idle_s` a transaction that does nothing: PostgreSQL ends it, and
    with it the locks of a process that was stopped. `statement_s` bounds a statement there, and a
    little more than that the wait for its answer here.
    """

    lock_ms: int = 0
    idle_s: int = 0
    statement_s: int = 0


# A write tries its rows without waiting; what waits all the same must not hold its neighbours.
WRITING = Session(lock_ms=50, idle_s=2, statement_s=10)
READING = Session(idle_s=60, statement_s=30)
MIGRATING = Session(idle_s=30)
ANSWER_MARGIN_S = 5
SOCKET_S = 10  # unanswered for so long, a socket is dead
SOCKET_PROBE_S = 2


class StoreError(Exception):
    """The database cannot be used. One line, for the operator; it never shows a password."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """Both ways to one database. `writer` has a single connection; `reader` is a pool of a few."""

    writer: AsyncEngine
    reader: AsyncEngine
    dialect: Dialect
    waiting: AsyncEngine | None = None  # on PostgreSQL, for writes that wait for another server
    file: DatabaseFile | None = None  # of SQLite, as it is now

    async def dispose(self) -> None:
        """Close every connection that is not in use. The engines can be used again afterwards."""
        await self.reader.dispose()
        await self.writer.dispose()
        if self.waiting is not None:
            await self.waiting.dispose()


def make_engines(
    database_url: str, *, readers: int, incarnation: Incarnation | None = None
) -> Engines:
    """Engines for `database_url`, with up to `readers` reading connections. Nothing connects yet.

    Run `upgrade` first: it finds out whether the database is there and is one of contextd's. SQLite's
    connections never make a file, and are refused when another one is at its path.
    Each connection to PostgreSQL is compared with `incarnation`, and is refused at another database.
    Raises `StoreError` for a URL that contextd cannot use.
    """
    url = parse_url(database_url)
    dialect = dialect_of(url)
    if dialect == "sqlite":
        return _sqlite_engines(url, readers=readers)
    connect = partial(postgresql_engine, url, incarnation=incarnation)
    return Engines(
        writer=connect(connections=1, session=WRITING),
        reader=connect(connections=readers + 1, session=READING),  # one looks
        waiting=connect(connections=WAITING_CONNECTIONS, kept=1, session=WRITING),
        dialect=dialect,
    )


def _sqlite_engines(url: URL, *, readers: int) -> Engines:
    file = DatabaseFile(cast("str", url.database))
    existing = sqlite_uri(sqlite_path(url), mode="rw")
    writer = sqlite_engine(existing, connections=1, begin="BEGIN IMMEDIATE", pragmas=WRITER_PRAGMAS)
    reader = sqlite_engine(existing, connections=readers, begin="BEGIN", pragmas=READER_PRAGMAS)
    for engine in (writer, reader):
        event.listen(engine.sync_engine, "do_connect", lambda *_: file.check_before_open())
    return Engines(writer=writer, reader=reader, dialect="sqlite", file=file)


def parse_url(database_url: str) -> URL:
    """`database_url`, checked as far as it can be without opening anything.

    Raises `StoreError` when it is no URL, names another driver, or names what two engines could not
    share; and when the driver that it names is missing or too old.
    """
    try:
        url = make_url(database_url)
    except (ArgumentError, ValueError):
        # The text is not repeated: what cannot be parsed may hold a password anywhere.
        raise StoreError(
            f"The database is not a URL such as {SQLITE}:///contextd.db or "
            f"{POSTGRESQL}://user:password@host/name"
        ) from None
    if url.drivername == SQLITE:
        _check_sqlite(url)
        if "?" in database_url:  # what follows would be left out of the path without a word
            raise StoreError(
                f"A SQLite database takes no parameters; a '?' in its path is written as %3F "
                f"(got {shown(url)})"
            )
    elif url.drivername == POSTGRESQL:
        _check_postgresql(url)
    else:
        raise StoreError(
            f"The database URL must begin with {SQLITE}:// or {POSTGRESQL}:// (got {shown(url)})"
        )
    return url


def dialect_of(url: URL) -> Dialect:
    """Which of the two databases a checked URL means."""
    return cast("Dialect", url.get_backend_name())


def shown(url: URL) -> str:
    """The URL as it may be printed: no password, and no parameters, which may hold one as well."""
    return url.set(query={}).render_as_string(hide_password=True)


def sqlite_path(url: URL) -> Path:
    """The file that a checked SQLite URL names: the same path for all names of one file.

    Raises `StoreError` for a path that leads nowhere: a circle of links, a name that is too long.
    """
    try:
        path = Path(cast("str", url.database)).resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        raise StoreError(f"The path of the database {shown(url)} leads nowhere") from None
    return path


def sqlite_uri(path: Path, *, mode: str) -> URL:
    """The file at `path` for SQLite itself: `mode` is "ro", or "rw" for one that is there already."""
    return URL.create(SQLITE, database=path.as_uri(), query={"mode": mode, "uri": "true"})


def sqlite_engine(
    url: URL,
    *,
    connections: int,
    begin: str,
    pragmas: Mapping[str, str],
    busy_timeout_s: float = BUSY_TIMEOUT_S,
) -> AsyncEngine:
    """An engine of at most `connections`, whose transactions start with the statement `begin`.

    The driver is told to leave transactions alone (`isolation_level=None`): by itself it would
    begin late and deferred, and commit before DDL. With that, savepoints work too.
    """
    engine = create_async_engine(
        url,
        connect_args={
            "isolation_level": None,
            "timeout": busy_timeout_s,
            "async_creator_fn": sqlite_driver.connect,
        },
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,  # they are chat text, and errors reach the log
    )

    @event.listens_for(engine.sync_engine, "connect")
    def set_pragmas(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for name, value in pragmas.items():
            cursor.execute(f"PRAGMA {name}={value}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: Any) -> None:
        # One trip to the driver's thread, where a cursor would take three.
        try:
            connection.connection.dbapi_connection.run_async(lambda driver: driver.execute(begin))
        except sqlite3.Error as error:
            raise wrapped(error) from None

    return engine


def wrapped(error: sqlite3.Error) -> DBAPIError:
    """An error of the driver itself, as SQLAlchemy would raise it, and without its words' values."""
    found = DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True)
    return cast("DBAPIError", found)


def postgresql_engine(
    url: URL,
    *,
    connections: int,
    kept: int | None = None,
    session: Session = MIGRATING,
    incarnation: Incarnation | None = None,
) -> AsyncEngine:
    """An engine of at most `connections`, of which it keeps `kept`, READ COMMITTED by default.

    A connection is tried before it is handed out, so a restarted server costs a reconnect and no
    failed request. The just-in-time compiler is off: it costs more than these short queries do.
    """
    kept = connections if kept is None else kept
    return create_async_engine(
        url,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": session.statement_s + ANSWER_MARGIN_S
            if session.statement_s
            else None,
            "server_settings": _server_settings(session),
            "async_creator_fn": partial(_connect, incarnation),
        },
        pool_size=kept,
        max_overflow=connections - kept,
        hide_parameters=True,  # they are chat text, and errors reach the log
        pool_pre_ping=True,
    )


def _server_settings(session: Session) -> dict[str, str]:
    """Sent when a connection is made, which wins over what a role or a database sets."""
    return {
        "application_name": APPLICATION_NAME,
        "jit": "off",
        "default_transaction_isolation": "read committed",
        "lock_timeout": f"{session.lock_ms}ms",
        "idle_in_transaction_session_timeout": f"{session.idle_s}s",
        "statement_timeout": f"{session.statement_s}s",
        "tcp_keepalives_idle": str(SOCKET_S),
        "tcp_keepalives_interval": str(SOCKET_PROBE_S),
        "tcp_keepalives_count": "3",
    }


# A commit is durable when it is answered, whatever a role sets; where a standby is to have applied
# it as well, that stays. The other is not known to every PostgreSQL, and then it is left out.
_SETTLE = """SELECT set_config('synchronous_commit', 'on', false)
             WHERE current_setting('synchronous_commit') <> 'remote_apply';
             SELECT set_config(name, '10s', false) FROM pg_settings
             WHERE name = 'tcp_user_timeout'"""


async def _connect(incarnation: Incarnation | None, *arguments: Any, **options: Any) -> Any:
    """asyncpg's `connect`, whose errors come as SQLAlchemy's, with the session settled and checked."""
    import asyncpg  # noqa: PLC0415 - an extra

    try:
        driver = await asyncpg.connect(*arguments, **options)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise _unusable(error) from error
    try:
        _guard_socket(driver)
        await driver.execute(_SETTLE)
        if incarnation is not None:
            incarnation.check(await identify(driver))
    except BaseException as error:
        driver.terminate()
        if isinstance(error, Exception):
            raise _unusable(error) from error
        raise
    return driver


def _unusable(error: Exception) -> OperationalError:
    return OperationalError(None, None, error, hide_parameters=True)


def _guard_socket(driver: Any) -> None:
    """The system gives a connection up from which nothing is answered, as far as it can."""
    transport = getattr(driver, "_transport", None)
    connection = None if transport is None else transport.get_extra_info("socket")
    if connection is None or connection.family == getattr(socket, "AF_UNIX", None):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", SOCKET_S), ("TCP_KEEPINTVL", SOCKET_PROBE_S)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SOCKET_S * 1000)


def reason(error: Exception) -> str:
    """What the driver says, as the end of a sentence of one line."""
    trouble = trouble_of(error)
    if (
        trouble is not None
        and trouble.code.startswith("SQLITE_")
        and trouble.kind is not Kind.DEFECT
    ):
        return trouble.reason
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"cannot be used: {lines[0]}"


def sqlite_error_name(error: BaseException) -> str:
    """SQLite's name of the error, such as `SQLITE_BUSY_SNAPSHOT`; empty for any other error."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(cause, "sqlite_errorname", ""))


def _check_sqlite(url: URL) -> None:
    if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
        needed = ".".join(str(part) for part in SQLITE_VERSION_MIN)
        raise StoreError(
            f"contextd needs SQLite {needed} or newer; this Python has {sqlite3.sqlite_version}"
        )
    name = url.database or ""
    if url.host or url.username or url.port:
        raise StoreError(
            f"A SQLite database is on this machine: three slashes, then its path, as in "
            f"{SQLITE}:///contextd.db (got {shown(url)})"
        )
    if name in {"", ":memory:"} or url.query.get("mode") == "memory":
        raise StoreError(
            f"contextd cannot keep its database in memory: name a file, as in {SQLITE}:///contextd.db"
        )
    if name.startswith("file:") or url.query:
        raise StoreError(
            f"A SQLite database is given as a plain path, without 'file:' and without parameters "
            f"(got {shown(url)})"
        )


def _check_postgresql(url: URL) -> None:
    if importlib.util.find_spec("asyncpg") is None:
        raise StoreError("PostgreSQL needs the driver asyncpg: install contextd[postgres]")
    if not url.database:
        raise StoreError(f"The database URL names no database (got {shown(url)})")
