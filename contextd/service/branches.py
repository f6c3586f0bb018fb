"""What can be done to branches: list, make, delete, merge (§9). Switching is a patch (§2)."""

from msgspec import UNSET
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.branch import (
    Branch,
    BranchPage,
    BranchRequest,
    MergeAnswer,
    MergeRequest,
)
from contextd.core.errors import (
    BranchActive,
    BranchBusy,
    BranchNotFound,
    ContextBusy,
    IdTaken,
)
from contextd.core.values import timestamp
from contextd.service.ledger import Ledger
from contextd.service.turn_rows import QUEUED, RUNNING, running_turn
from contextd.service.wire import decode_cursor, encode_cursor
from contextd.store.edit import ContextEdit
from contextd.store.merging import add_copies, choose
from contextd.store.reader import Reader, find_context
from contextd.store.tables import AnyRow, branches, messages, turns
from contextd.store.tree import BranchTip, select_branches


class Branches:
    """Reads and changes the branches of a context."""

    def __init__(self, ledger: Ledger, reader: Reader) -> None:
        self._ledger = ledger
        self._reader = reader

    async def list(self, context_id: str, *, cursor: str | None, limit: int) -> BranchPage:
        """Oldest first."""
        (after,) = decode_cursor(cursor, (0,))
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            rows = (
                await connection.execute(
                    select_branches(context.key)
                    .where(branches.c.segment_key > after)
                    .order_by(branches.c.segment_key)
                    .limit(limit + 1)
                )
            ).all()
        page = rows[:limit]
        more = len(rows) > limit
        return BranchPage(
            items=[_wire(row, context.active_branch) for row in page],
            next_cursor=encode_cursor(page[-1].segment_key) if more else None,
        )

    async def get(self, context_id: str, name: str) -> Branch:
        """Raises `ContextNotFound` or `BranchNotFound`."""
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            row = await _find(connection, context.key, name)
        return _wire(row, context.active_branch)

    async def create(self, context_id: str, request: BranchRequest) -> tuple[Branch, bool]:
        """The branch and whether it is new: one of that name that starts there is the one meant.

        Raises `IdTaken` and `MessageNotFound`.
        """

        async def work(edit: ContextEdit) -> tuple[Branch, bool]:
            start = request.from_message_id
            if start is UNSET:
                start = (await edit.tree.tip(edit.row.active_branch)).leaf_id
            try:
                found = await _find(edit.connection, edit.key, request.name)
            except BranchNotFound:
                edit.change(record=True)
                await edit.tree.fork(from_message_id=start, name=request.name)
                made = await _find(edit.connection, edit.key, request.name)
                return _wire(made, edit.row.active_branch), True
            if found.from_id != start:
                raise IdTaken(request.name)
            return _wire(found, edit.row.active_branch), False

        return (await self._ledger.edit(context_id, work))[1]

    async def delete(self, context_id: str, name: str) -> None:
        """Takes the name away; messages stay, and so does what was forked from them.

        Raises `BranchNotFound`, `BranchActive`, and `ContextBusy` while something is, or is to be,
        written there.
        """

        async def work(edit: ContextEdit) -> None:
            tip = await edit.tree.tip(name)
            if name == edit.row.active_branch:
                raise BranchActive(name)
            if await _in_use(edit, tip):
                raise BranchBusy(edit.state, name)
            edit.change(record=True)
            await edit.tree.remove(name)

        await self._ledger.edit(context_id, work)

    async def merge(self, context_id: str, name: str, request: MergeRequest) -> MergeAnswer:
        """Appends copies of the source's messages to the branch; says what went over and what not.

        Raises `BranchNotFound`, `ContextBusy` while a turn runs on the branch, `PayloadTooLarge`.
        """

        async def work(edit: ContextEdit) -> MergeAnswer:
            await edit.tree.tip(name)
            turn = await running_turn(edit)
            if turn is not None and turn.branch == name:
                raise ContextBusy(edit.state)
            selection = await choose(
                edit, source=request.source, target=name, message_ids=request.message_ids
            )
            ids = [self._ledger.new_id() for _ in selection.chosen]
            if ids:
                edit.change()
                await add_copies(edit, selection.chosen, ids, source=request.source, target=name)
            return MergeAnswer(added=ids, left_out=selection.left_out)

        return (await self._ledger.edit(context_id, work))[1]


def _wire(row: AnyRow, active_branch: str) -> Branch:
    return Branch(
        name=row.name,
        active=row.name == active_branch,
        from_message_id=row.from_id,
        leaf_message_id=row.leaf_id,
        created_at=timestamp(row.created_at),
    )


async def _find(connection: AsyncConnection, context_key: int, name: str) -> AnyRow:
    """Raises `BranchNotFound`."""
    query = select_branches(context_key).where(branches.c.name == name)
    row: AnyRow | None = (await connection.execute(query)).one_or_none()
    if row is None:
        raise BranchNotFound(name)
    return row


async def _in_use(edit: ContextEdit, tip: BranchTip) -> bool:
    """Whether a turn runs or waits on the branch, or a message of its own is open."""
    turning = await edit.connection.scalar(
        select(func.count())
        .select_from(turns)
        .where(turns.c.context_key == edit.key, turns.c.branch == tip.name)
        .where(turns.c.status.in_((RUNNING, QUEUED)))
    )
    writing = await edit.connection.scalar(
        select(func.count())
        .select_from(messages)
        .where(messages.c.context_key == edit.key, messages.c.status == "streaming")
        .where(messages.c.segment_key == tip.segment_key)
    )
    return bool(turning or writing)
