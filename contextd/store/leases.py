"""Who lives: each process renews a *lease*, a row of its own, by the database's clock (§6).

A turn names its owner, and an owner whose lease has run out, or that has none, is gone. So a renewal
is one statement, however many turns a process works on, and waits for nobody: on PostgreSQL it has a
connection of its own, where neither the writer's queue nor a lock of a turn is before it. SQLite has
one write lock for all, so there it is the first entry of the writer's next transaction.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy import ColumnElement, delete, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import ShuttingDown
from contextd.store.engines import WRITING, dialect_of, parse_url, postgresql_engine
from contextd.store.tables import database_now_ms, nodes
from contextd.store.trouble import translated
from contextd.store.writer import Writer

log = structlog.get_logger(__name__)

RENEWALS = 3  # in the time of one lease, so that one may be lost
RETRY_S = 0.5  # after a renewal that failed


class Leases:
    """This process's lease, and those of others. `lease_s` is how long a silent process counts as alive.

    `clock` are seconds that are never set, by default the loop's.
    """

    def __init__(
        self,
        database: str,
        writer: Writer,
        *,
        owner_id: str,
        lease_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        url = parse_url(database)
        self._engine = (
            postgresql_engine(url, connections=1, session=WRITING)
            if dialect_of(url) == "postgresql"
            else None
        )
        self._writer = writer
        self._clock = clock or asyncio.get_running_loop().time
        self._owner_id = owner_id
        self._lease_s = lease_s
        self._pause_s = lease_s / RENEWALS
        self._renewed_at: float | None = None
        self._judges_from = 0.0

    @property
    def judges(self) -> bool:
        """Whether this process may say of others that they are gone.

        Who could not renew its own lease in time, because the database or this process stood still,
        gives the others time to renew theirs first: they may have stood still as well.
        """
        return self._clock() >= self._judges_from

    async def renew(self) -> None:
        """This process lives, for the time of a lease from now. Raises what a write raises."""
        await self._write(self._renew)
        now = self._clock()
        if self._renewed_at is not None and now - self._renewed_at > 2 * self._pause_s:
            self._judges_from = now + self._pause_s
        self._renewed_at = now

    async def keep(self) -> None:
        """Background task: renews the lease, and tries again soon where that fails."""
        pause_s = self._pause_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(self._pause_s):
                    await self.renew()
                pause_s = self._pause_s
            except ShuttingDown:
                return
            except Exception as error:
                log.warning("the lease was not renewed", kind=type(error).__name__)
                pause_s = min(RETRY_S, self._pause_s / RENEWALS)

    async def give_back(self) -> None:
        """On a clean stop: nobody needs to wait for the lease to run out."""
        await self._write(_forget(nodes.c.id == self._owner_id))

    async def end_others(self) -> None:
        """For the only process on a database: whoever else had a lease is gone."""
        await self._write(_forget(nodes.c.id != self._owner_id))

    async def close(self) -> None:
        """Lets the connection go."""
        if self._engine is not None:
            await self._engine.dispose()

    async def _renew(self, connection: AsyncConnection) -> None:
        until = database_now_ms() + round(self._lease_s * 1000)
        renewed = await connection.execute(
            update(nodes).where(nodes.c.id == self._owner_id).values(lease_expires_at=until)
        )
        if renewed.rowcount == 0:  # the first time, or others took this process for gone
            await connection.execute(
                insert(nodes).values(id=self._owner_id, lease_expires_at=until)
            )

    async def _write(self, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        if self._engine is None:
            await self._writer.change(work, urgent=True)
            return
        try:
            async with self._engine.begin() as connection:
                await work(connection)
        except Exception as error:
            raise translated(error, event="the database did not take a lease") from None


def _forget(whose: ColumnElement[bool]) -> Callable[[AsyncConnection], Awaitable[None]]:
    async def work(connection: AsyncConnection) -> None:
        await connection.execute(delete(nodes).where(whose))

    return work
