"""Who owns a turn, and what happens to one whose owner is gone (§6).

A process that lives renews its lease (`contextd/store/leases.py`). When that has run out, any other may
claim its turns: it becomes the owner, raises the fence, and goes on from the state that is stored.
Several processes share what a dead one leaves by the keys of the turns, so that they do not wait for
each other; what one does not get to, the others claim a little later. What is found by a look is read
off the writer; only what is acted on is locked and looked at again.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import ContextNotFound, Overloaded, ShuttingDown, defect_in
from contextd.core.machine import RESPONDING_STATES, WAITING_STATES, Trigger
from contextd.core.message import Problem
from contextd.service.ledger import Ledger
from contextd.service.steps import Steps
from contextd.service.turn_rows import interrupt_messages, running_turn
from contextd.store import unattended
from contextd.store.edit import ContextEdit
from contextd.store.leases import Leases
from contextd.store.notices import StartedTurn
from contextd.store.reader import Reader
from contextd.store.tables import contexts, turns
from contextd.store.unattended import IS_RUNNING, Unattended, is_abandoned

log = structlog.get_logger(__name__)

FOUND_MAX = 1000  # of what a look returns; the next look returns the next
CLAIMED_MAX = 50  # turns in one transaction, which others wait for
INTERRUPTED = Problem(type="interrupted", message="The server stopped while this was written.")
OVERDUE = Problem(type="waiting_timeout", message="Nobody decided or answered in time.")


class Recovery:
    """Finds turns that nobody works on. `patience_s` is how long others have for their share."""

    def __init__(
        self, ledger: Ledger, reader: Reader, steps: Steps, leases: Leases, *, patience_s: float
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._steps = steps
        self.leases = leases
        self._patience_s = patience_s
        self._seen: dict[int, float] = {}  # when an abandoned turn was first seen

    async def look(self) -> Unattended:
        """What this process is to do now. Raises `Overloaded`."""
        return await unattended.look(self._reader, self._ledger.owner_id, limit=FOUND_MAX)

    async def take_up(self, keys: Sequence[int]) -> None:
        """Starts these turns where they are this process's and nobody works on them.

        That is so after a commit whose answer was lost. It is asked in the order of the commits: what
        the listener has been told by then is all that has happened.
        """

        async def work(connection: AsyncConnection) -> list[StartedTurn]:
            rows = await connection.execute(
                select(turns.c.key, turns.c.id, turns.c.fence, contexts.c.id.label("context_id"))
                .join(contexts, contexts.c.key == turns.c.context_key)
                .where(turns.c.key.in_(keys), IS_RUNNING)
                .where(turns.c.owner_id == self._ledger.owner_id)
            )
            return [StartedTurn(**row._mapping) for row in rows]

        def tell(started: Sequence[StartedTurn]) -> None:
            for turn in started:
                self._ledger.listener.turn_started(turn)

        await self._ledger.writer.change(work, tell)

    async def recover(self, found: Unattended) -> bool:
        """Claims turns whose owner is gone, and starts queued ones of contexts at rest (§6).

        At most so many of them; says whether it did all that was found and is this process's to do.
        """
        due = list(dict.fromkeys([*found.at_rest, *self._share(found)]))
        batch = due[:CLAIMED_MAX]
        try:
            if batch:
                await self._ledger.edit_free(batch, self._recover_in)
        except (Overloaded, ShuttingDown):
            raise
        except Exception:
            # One context that cannot be looked after must not keep the others from it.
            for context_id in batch:
                await self._recover_one(context_id)
        return batch == due

    async def fail_overdue(self, waiting_ms: int) -> None:
        """Fails the turns that have waited for somebody outside for longer than that (§6)."""
        before = self._ledger.clock.latest_ms(waiting_ms)

        async def work(edit: ContextEdit) -> None:
            row = await running_turn(edit)
            overdue = edit.elapsed_ms(edit.row.state_since) > waiting_ms
            if row is not None and edit.state in WAITING_STATES and overdue:
                await self._steps.fail_in(edit, row, OVERDUE)

        for context_id in await unattended.overdue(self._reader, before, limit=FOUND_MAX):
            with suppress(ContextNotFound):
                await self._ledger.edit(context_id, work)

    def _share(self, found: Unattended) -> list[str]:
        """Of what is abandoned first this process's part, then what others left for too long."""
        now = asyncio.get_running_loop().time()
        self._seen = {key: self._seen.get(key, now) for key in found.abandoned}
        if not self.leases.judges:
            return []
        parts = max(1, len(found.living))
        me = self._ledger.owner_id
        part = found.living.index(me) if me in found.living else 0
        own = [key for key in found.abandoned if key % parts == part]
        # From the end, because the others begin at the beginning.
        left = [key for key in reversed(found.abandoned) if key % parts != part]
        late = [key for key in left if now - self._seen[key] >= self._patience_s]
        return [found.abandoned[key] for key in (*own, *late)]

    async def _recover_one(self, context_id: str) -> None:
        try:
            await self._ledger.edit_free([context_id], self._recover_in)
        except (Overloaded, ShuttingDown):
            raise
        except Exception as error:
            what = "recovering a context failed"
            log.error(what, context_id=context_id, exc_info=defect_in(error))

    async def _recover_in(self, edit: ContextEdit) -> None:
        row = await running_turn(edit, is_abandoned(self._ledger.owner_id).label("is_abandoned"))
        if row is None:
            await self._steps.start_next(edit)
            return
        if not row.is_abandoned:
            return
        responding = edit.state in RESPONDING_STATES
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
