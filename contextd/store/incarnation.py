"""Which database this process serves, and how it notices another in its place (§18).

An *incarnation* is a short name that every node computes alike: from contextd's own id of the
database, PostgreSQL's system identifier, the timeline and the database's OID. An emptied database, a
restored one and a promoted standby each have a new one. Every new connection is compared with it.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from contextd.store.trouble import AnotherDatabaseError

INCARNATION_CHARS = 12

_ID_TABLE = "SELECT to_regclass('contextd_database') IS NOT NULL"
_IDS = "SELECT id FROM contextd_database"
_OID = "SELECT oid FROM pg_database WHERE datname = current_database()"
# What an operator may have taken from ordinary roles counts as nothing, alike at every node.
_WHERE_ALLOWED = (
    ("pg_control_system()", "SELECT system_identifier FROM pg_control_system()"),
    # The last checkpoint's timeline lags behind a promotion; that of the log written now does not.
    (
        "pg_walfile_name(pg_lsn)",
        "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)",
    ),
)
_ALLOWED = "SELECT has_function_privilege(to_regprocedure($1), 'EXECUTE')"


class Incarnation:
    """The database that is served. `value` is empty until it is known; then nothing is compared."""

    def __init__(self, value: str = "") -> None:
        self.value = value
        self.doubted = asyncio.Event()

    def check(self, found: str) -> None:
        """Compares what a connection has found. Raises `AnotherDatabaseError`, and raises the doubt."""
        if self.value and found != self.value:
            self.doubted.set()
            raise AnotherDatabaseError("is another one than before")


async def identify(driver: Any) -> str:
    """The incarnation that an asyncpg connection finds; empty where there is no contextd database.

    Raises `AnotherDatabaseError` at a standby, which has no timeline of its own and takes no writes.
    """
    if await driver.fetchval("SELECT pg_is_in_recovery()"):
        raise AnotherDatabaseError("is a standby")
    if not await driver.fetchval(_ID_TABLE):
        return ""
    ids = [str(row["id"]) for row in await driver.fetch(_IDS)]
    facts = [await driver.fetchval(_OID)]
    for function, query in _WHERE_ALLOWED:
        allowed = await driver.fetchval(_ALLOWED, function)
        facts.append(await driver.fetchval(query) if allowed else None)
    return incarnation_of(ids, facts)


def incarnation_of(ids: Sequence[str], facts: Sequence[object]) -> str:
    """The name of a database with this id and these facts; empty without exactly one id."""
    if len(ids) != 1:
        return ""
    said = ".".join(str(fact) for fact in (ids[0], *facts))
    return hashlib.sha256(said.encode()).hexdigest()[:INCARNATION_CHARS]
