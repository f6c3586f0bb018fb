"""The tree of messages: branches, the segments that they are made of, and their leaves (§9).

A branch is a name for a leaf. Its messages stand in its own segment and, above the place where it
forked off, in the segments of its ancestors. So a fork copies nothing, and a list needs no walk.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import BranchNotFound, IdTaken, MessageNotFound
from contextd.core.values import ID_PATTERN
from contextd.store.tables import AnyRow, branches, messages, segments

PARTS_GROUP = 100  # segments of a path in one group of its condition


class BranchTip(msgspec.Struct, frozen=True, kw_only=True):
    """Where a branch ends, and what its next message hangs on."""

    name: str
    segment_key: int
    leaf_depth: int
    leaf_id: str | None


class Tree:
    """The tree of one context, to be changed inside a transaction that holds the context's lock."""

    def __init__(self, connection: AsyncConnection, context_key: int, now: int) -> None:
        self._connection = connection
        self._context_key = context_key
        self._now = now

    async def tip(self, name: str) -> BranchTip:
        """Where the branch ends. Raises `BranchNotFound`."""
        row = (
            await self._connection.execute(
                select(branches, messages.c.id.label("leaf_id"))
                .join(messages, messages.c.key == branches.c.leaf_key, isouter=True)
                .where(branches.c.context_key == self._context_key, branches.c.name == name)
            )
        ).one_or_none()
        if row is None:
            raise BranchNotFound(name)
        return BranchTip(
            name=name,
            segment_key=row.segment_key,
            leaf_depth=row.leaf_depth,
            leaf_id=row.leaf_id,
        )

    async def move_leaf(self, branch: str, key: int | None, depth: int) -> None:
        """The branch ends at this message from now on; at none where `key` is null."""
        await self._connection.execute(
            update(branches)
            .where(branches.c.context_key == self._context_key, branches.c.name == branch)
            .values(leaf_key=key, leaf_depth=depth)
        )

    async def close_up(self, superseded: Sequence[AnyRow]) -> None:
        """Lets branches end, and fork, before messages that have left the conversation.

        Their places are taken by the next attempt, which is not what was forked from.
        """
        for row in superseded:
            before = await self._connection.scalar(
                select(func.max(messages.c.depth)).where(
                    messages.c.segment_key == row.segment_key,
                    messages.c.depth < row.depth,
                    ~messages.c.superseded,
                )
            )
            place = (row.segment_key, before)
            if before is None:  # nothing is left of the segment: where it was forked off itself
                above = select(segments.c.parent_key, segments.c.parent_depth)
                found = await self._connection.execute(
                    above.where(segments.c.key == row.segment_key)
                )
                place = found.one()
            await self._connection.execute(
                update(segments)
                .where(segments.c.parent_key == row.segment_key)
                .where(segments.c.parent_depth == row.depth)
                .values(parent_key=place[0], parent_depth=place[1])
            )
        keys = [row.key for row in superseded]
        ending = await self._connection.execute(
            select(branches.c.name).where(
                branches.c.context_key == self._context_key, branches.c.leaf_key.in_(keys)
            )
        )
        for name in ending.scalars().all():
            await self.retreat_leaf(name)

    async def retreat_leaf(self, branch: str) -> None:
        """Moves the branch's leaf back over superseded messages, to what the next attempt follows."""
        leaf = (
            await self._connection.execute(
                select(messages.c.key, messages.c.depth)
                .where(messages.c.context_key == self._context_key)
                .where(await on_branch(self._connection, self._context_key, branch))
                .order_by(messages.c.depth.desc())
                .limit(1)
            )
        ).one_or_none()
        await self.move_leaf(branch, leaf.key if leaf else None, leaf.depth if leaf else 0)

    async def fork(self, *, from_message_id: str | None, name: str | None = None) -> str:
        """Makes a branch that starts after a message, copying nothing; returns its name.

        From null it starts empty. Raises `MessageNotFound` where the message has no place on a
        branch, and `IdTaken`.
        """
        taken = await self._branch_names()
        if name in taken:
            raise IdTaken(name)
        leaf = None if from_message_id is None else await self._placed(from_message_id)
        name = name or await self._free_branch_name(taken)
        inserted = await self._connection.execute(
            insert(segments)
            .values(
                context_key=self._context_key,
                parent_key=leaf.segment_key if leaf else None,
                parent_depth=leaf.depth if leaf else 0,
            )
            .returning(segments.c.key)
        )
        await self._connection.execute(
            insert(branches).values(
                context_key=self._context_key,
                name=name,
                segment_key=inserted.scalar_one(),
                leaf_key=leaf.key if leaf else None,
                leaf_depth=leaf.depth if leaf else 0,
                created_at=self._now,
            )
        )
        return name

    async def remove(self, name: str) -> None:
        """Takes the name away. Its messages, and what was forked from them, stay."""
        await self._connection.execute(
            delete(branches).where(
                branches.c.context_key == self._context_key, branches.c.name == name
            )
        )

    async def require(self, branch: str, message_key: int) -> None:
        """Raises `BranchNotFound` unless the message stands on the branch.

        A branch may be gone, and its name be given to another.
        """
        placed = await self._connection.scalar(
            select(messages.c.key)
            .where(messages.c.key == message_key)
            .where(await on_branch(self._connection, self._context_key, branch))
        )
        if placed is None:
            raise BranchNotFound(branch)

    async def _placed(self, message_id: str) -> AnyRow:
        """A message that stands in the tree. Raises `MessageNotFound`."""
        row: AnyRow | None = (
            await self._connection.execute(
                select(messages).where(
                    messages.c.context_key == self._context_key, messages.c.id == message_id
                )
            )
        ).one_or_none()
        if row is None or row.depth is None or row.superseded:
            raise MessageNotFound(message_id)
        return row

    async def _branch_names(self) -> set[str]:
        query = select(branches.c.name).where(branches.c.context_key == self._context_key)
        return set((await self._connection.execute(query)).scalars())

    async def _free_branch_name(self, taken: set[str]) -> str:
        """`branch-2`, `branch-3`, …: one above the number of branches that there have been."""
        made = await self._connection.scalar(
            select(func.count())
            .select_from(segments)
            .where(segments.c.context_key == self._context_key)
        )
        number = (made or 0) + 1
        while f"branch-{number}" in taken:
            number += 1
        return f"branch-{number}"


async def on_branch(connection: AsyncConnection, context_key: int, name: str) -> Any:
    """A condition on `messages`: placed on the branch, and not superseded.

    A branch is its own segment and, of each ancestor, what stands above the fork. Raises
    `BranchNotFound`.
    """
    if not re.fullmatch(ID_PATTERN, name):
        raise BranchNotFound(name)
    branch = (
        await connection.execute(
            select(branches).where(branches.c.context_key == context_key, branches.c.name == name)
        )
    ).one_or_none()
    if branch is None:
        raise BranchNotFound(name)
    rows = await connection.execute(select(segments).where(segments.c.context_key == context_key))
    parents = {row.key: row for row in rows}
    parts = []
    segment_key, depth = branch.segment_key, branch.leaf_depth
    while segment_key is not None:
        parts.append(and_(messages.c.segment_key == segment_key, messages.c.depth <= depth))
        segment = parents[segment_key]
        depth = min(depth, segment.parent_depth)
        segment_key = segment.parent_key
    # In groups: a flat chain of a thousand forks is deeper than SQLite reads an expression.
    groups = [
        or_(*parts[start : start + PARTS_GROUP]).self_group()
        for start in range(0, len(parts), PARTS_GROUP)
    ]
    return and_(or_(*groups), ~messages.c.superseded)


def select_branches(context_key: int) -> Select[Any]:
    """The branches of a context, each with its `leaf_id` and the `from_id` that it was forked from."""
    leaf, start = messages.alias("leaf"), messages.alias("start")
    return (
        select(branches, leaf.c.id.label("leaf_id"), start.c.id.label("from_id"))
        .join(segments, segments.c.key == branches.c.segment_key)
        .join(leaf, leaf.c.key == branches.c.leaf_key, isouter=True)
        .join(
            start,
            and_(
                start.c.segment_key == segments.c.parent_key,
                start.c.depth == segments.c.parent_depth,
                ~start.c.superseded,
            ),
            isouter=True,
        )
        .where(branches.c.context_key == context_key)
    )
