"""Another database in the place of ours (§18): leave the old one behind, and serve the new as a new one.

What this process remembers, tells and works on belongs to one incarnation of the database. When a
connection finds another, or the tables that are there were made anew, all of it is dropped at once.
Then the new one is looked at until it is a whole contextd database, and is served.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy import select

from contextd.core.errors import Overloaded
from contextd.service.ledger import Ledger
from contextd.service.producers import Producers
from contextd.store.incarnation import Incarnation
from contextd.store.reader import Reader
from contextd.store.tables import database

log = structlog.get_logger(__name__)

ANOTHER = "database"  # what readiness calls it
REASON = "The database is another one than before."
LOOK_S = 0.5


class Succession:
    """Notices another database and moves this process to it. `find` gives its incarnation, if whole."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        producers: Producers,
        incarnation: Incarnation,
        *,
        find: Callable[[], Awaitable[str | None]],
        leave_turns: Callable[[], None],
        poll_s: float,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._producers = producers
        self._incarnation = incarnation
        self._find = find
        self._leave_turns = leave_turns
        self._poll_s = poll_s
        self._ids: list[str] | None = None

    async def keep(self) -> None:
        """Background task: moves to another database whenever there is one."""
        while True:
            await self._incarnation.doubted.wait()
            self._leave()
            await self._enter(await self._whole())

    async def compare(self) -> None:
        """Background task: looks whether the tables were made anew under connections that live on."""
        while True:
            await asyncio.sleep(self._poll_s)
            if not self._incarnation.doubted.is_set():
                await self._compare()

    async def _compare(self) -> None:
        try:
            ids = [str(row.id) for row in await self._reader.look(select(database.c.id))]
        except Overloaded:
            return  # it does not answer: the next connection tells
        except Exception:
            ids = []
        known, self._ids = self._ids, ids
        if known is not None and ids != known:
            self._incarnation.doubted.set()

    def _leave(self) -> None:
        log.error("another database is there; this server forgets the one before")
        ledger = self._ledger
        ledger.writer.readiness.lack(ANOTHER, REASON)
        self._leave_turns()
        self._producers.end_bodies()
        ledger.tail.clear()
        ledger.writer.start_anew(Overloaded(REASON))
        self._reader.start_anew()
        ledger.hub.end_all()

    async def _whole(self) -> str:
        while True:
            try:
                found = await self._find()
            except Exception as error:
                log.warning("the database cannot be looked at", kind=type(error).__name__)
                found = None
            if found is not None:
                return found
            await asyncio.sleep(LOOK_S)

    async def _enter(self, found: str) -> None:
        ledger = self._ledger
        # What was read or written from memory meanwhile was of neither database.
        ledger.tail.clear()
        ledger.database_id = ledger.hub.database_id = self._incarnation.value = found
        ledger.hub.end_all()
        self._ids = None
        self._incarnation.doubted.clear()
        ledger.writer.start_anew(Overloaded(REASON))
        self._reader.start_anew()
        ledger.writer.readiness.regain(ANOTHER)
