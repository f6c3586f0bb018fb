"""Who owns a turn, and what happens to one whose owner is gone (§6).

A process that works on a turn renews its *lease* by the database's clock. When a lease has run out,
any process may claim the turn: it becomes the owner, raises the fence, and goes on from the state
that is stored. A process that is alone on its database need not wait for leases of the dead.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import structlog
from sqlalchemy import ScalarResult, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import ContextNotFound, ShuttingDown
from contextd.core.machine import State, Trigger
from contextd.core.message import Problem
from contextd.service.ledger import Ledger
from contextd.service.steps import WAITING_STATES, Steps
from contextd.service.turn_rows import QUEUED, RUNNING, interrupt_messages, running_turn
from contextd.store.edit import ContextEdit
from contextd.store.tables import AnyRow, contexts, database_now_ms, turns

log = structlog.get_logger(__name__)

RECOVERED_MAX = 100  # turns claimed in one sweep; the next sweep takes the next
INTERRUPTED = Problem(type="interrupted", message="The server stopped while this was written.")
OVERDUE = Problem(type="waiting_timeout", message="Nobody decided or answered in time.")
RESPONDING = frozenset({State.AWAITING_LLM_RESPONSE, State.STREAMING_LLM_RESPONSE})


class Recovery:
    """Keeps leases, and claims turns. `lease_ms` is how long a silent owner keeps a turn."""

    def __init__(self, ledger: Ledger, steps: Steps, *, lease_ms: int) -> None:
        self._ledger = ledger
        self._steps = steps
        self._lease_ms = lease_ms

    async def renew_leases(self, keys: Sequence[int]) -> set[int]:
        """Says that these turns are being worked on; returns those that this process still owns.

        A turn that nobody names here runs out of its lease and is recovered: none hangs.
        """

        async def work(connection: AsyncConnection) -> set[int]:
            rows = await connection.execute(
                update(turns)
                .where(
                    turns.c.owner_id == self._ledger.owner_id,
                    turns.c.status == RUNNING,
                    turns.c.key.in_(keys),
                )
                .values(lease_expires_at=database_now_ms() + self._lease_ms)
                .returning(turns.c.key)
            )
            return set(rows.scalars())

        return await self._ledger.writer.change(work)

    async def release_leases(self) -> None:
        """On a clean stop: another process need not wait for the leases to run out."""
        await self._expire(turns.c.owner_id == self._ledger.owner_id)

    async def expire_all_leases(self) -> None:
        """For the only process on a database: whoever owned these turns is gone."""
        await self._expire(turns.c.owner_id != self._ledger.owner_id)

    async def recover(self) -> None:
        """Claims every turn whose owner is gone, and starts queued ones of contexts at rest (§6)."""
        after = 0
        while waiting := await self._ledger.writer.change(partial(_contexts_to_recover, after)):
            for row in waiting:
                await self._recover_one(row.id)
            after = waiting[-1].key

    async def fail_overdue(self, waiting_ms: int) -> None:
        """Fails the turns that have waited for somebody outside for longer than that (§6)."""
        before = self._ledger.clock.latest_ms(waiting_ms)

        async def overdue(connection: AsyncConnection) -> Sequence[str]:
            rows: ScalarResult[str] = await connection.scalars(
                select(contexts.c.id)
                .where(contexts.c.state.in_(sorted(WAITING_STATES)))
                .where(contexts.c.state_since < before)
                .limit(RECOVERED_MAX)
            )
            return rows.all()

        async def work(edit: ContextEdit) -> None:
            row = await running_turn(edit)
            overdue = edit.elapsed_ms(edit.row.state_since) > waiting_ms
            if row is not None and edit.state in WAITING_STATES and overdue:
                await self._steps.fail_in(edit, row, OVERDUE)

        for context_id in await self._ledger.writer.change(overdue):
            with suppress(ContextNotFound):
                await self._ledger.edit(context_id, work)

    async def _recover_one(self, context_id: str) -> None:
        try:
            await self._ledger.edit(context_id, self._recover_in)
        except ContextNotFound:
            return
        except ShuttingDown:
            raise
        except Exception:
            # One context that cannot be looked after must not keep the others from it.
            log.exception("recovering a context failed", context_id=context_id)

    async def _recover_in(self, edit: ContextEdit) -> None:
        row = await running_turn(edit)
        if row is None:
            await self._steps.start_next(edit)
            return
        expired = await edit.connection.scalar(
            select(turns.c.key).where(
                turns.c.key == row.key, turns.c.lease_expires_at < database_now_ms()
            )
        )
        if expired is None:
            return
        responding = edit.state in RESPONDING
        detail = {"attempt": row.attempt, "error": msgspec.to_builtins(INTERRUPTED)}
        # Named, not given: the time since its owner fell silent is not work of the turn (§6).
        await edit.step(
            Trigger.RECOVER,
            turn_id=row.id,
            state_detail={**detail, "wait_ms": 0, "attempts_max": self._steps.attempts_max}
            if responding
            else edit.row.state_detail,
            detail=detail,
        )
        if responding:
            await interrupt_messages(edit, row, INTERRUPTED)
        await self._steps.claim(edit, row)

    async def _expire(self, whose: Any) -> None:
        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(turns).where(turns.c.status == RUNNING, whose).values(lease_expires_at=0)
            )

        await self._ledger.writer.change(work)


async def _contexts_to_recover(after: int, connection: AsyncConnection) -> Sequence[AnyRow]:
    """Contexts with a running turn whose lease has run out, or at rest with a queue: (key, id)."""
    abandoned = select(turns.c.context_key).where(
        turns.c.status == RUNNING, turns.c.lease_expires_at < database_now_ms()
    )
    queued = select(turns.c.context_key).where(turns.c.status == QUEUED)
    rows: Sequence[AnyRow] = (
        await connection.execute(
            select(contexts.c.key, contexts.c.id)
            .where(contexts.c.key > after)
            .where(
                or_(
                    contexts.c.key.in_(abandoned),
                    and_(contexts.c.state.in_(("idle", "failed")), contexts.c.key.in_(queued)),
                )
            )
            .order_by(contexts.c.key)
            .limit(RECOVERED_MAX)
        )
    ).all()
    return rows
