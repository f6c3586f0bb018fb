"""The tree of messages: branches, the segments that they are made of, and their leaves (§9).

A branch is a name for a leaf. Its messages stand in its own segment and, above the place where it
forked off, in the segments of its ancestors. So a fork copies nothing.

A path can be thousands of segments long, so nobody reads all of it. Whoever needs a piece names its
depths (`between`, `newest`), and the database walks from the leaf to that piece only. Each segment
knows its parent and, for the long way, one *jump* to a segment further up. Jumps are chosen when the
segment is made, so that any depth is reached in a number of steps that grows with the logarithm of
the path (Myers, "An applicative random-access stack", 1983).

A fork can be moved up later, past messages that have left the conversation (`close_up`). Jumps stay as
they are then: above the segment that is left out both ways are the same.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import (
    CTE,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    delete,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import BranchNotFound, IdTaken, MessageNotFound
from contextd.core.values import ID_PATTERN
from contextd.store.tables import AnyRow, Key, branches, messages, segments

WINDOW_MIN, WINDOW_MAX = 64, 4096  # depths of a path that one statement looks at


class BranchTip(msgspec.Struct, frozen=True, kw_only=True):
    """Where a branch ends, and what its next message hangs on."""

    name: str
    segment_key: int
    leaf_depth: int
    leaf_id: str | None


_TIP = (
    select(branches, messages.c.id.label("leaf_id"))
    .join(messages, messages.c.key == branches.c.leaf_key, isouter=True)
    .where(
        branches.c.context_key == bindparam("of_context"), branches.c.name == bindparam("branch")
    )
)
_MOVE_LEAF = update(branches).where(
    branches.c.context_key == bindparam("of_context"), branches.c.name == bindparam("branch")
)


class Tree:
    """The tree of one context, to be changed inside a transaction that holds the context's lock."""

    def __init__(self, connection: AsyncConnection, context_key: int, now: int) -> None:
        self._connection = connection
        self._context_key = context_key
        self._now = now

    async def tip(self, name: str) -> BranchTip:
        """Where the branch ends. Raises `BranchNotFound`."""
        place = {"of_context": self._context_key, "branch": name}
        row = (await self._connection.execute(_TIP, place)).one_or_none()
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
            _MOVE_LEAF,
            {
                "of_context": self._context_key,
                "branch": branch,
                "leaf_key": key,
                "leaf_depth": depth,
            },
        )

    async def close_up(self, superseded: Sequence[AnyRow]) -> None:
        """Lets branches end, and fork, before messages that have left the conversation.

        Their places are taken by the next attempt, which is not what was forked from.
        """
        for row in superseded:
            place = await self._place_before(row)
            after = and_(
                segments.c.parent_key == row.segment_key, segments.c.parent_depth == row.depth
            )
            ending = or_(
                branches.c.segment_key == row.segment_key,
                branches.c.segment_key.in_(select(segments.c.key).where(after)),
            )
            await self._connection.execute(
                update(branches)
                .where(branches.c.context_key == self._context_key, ending)
                .where(branches.c.leaf_key == row.key)
                .values(
                    leaf_key=place.key if place else None, leaf_depth=place.depth if place else 0
                )
            )
            await self._connection.execute(
                update(segments)
                .where(after)
                .values(
                    parent_key=place.segment_key if place else None,
                    parent_depth=place.depth if place else 0,
                )
            )

    async def _place_before(self, row: AnyRow) -> AnyRow | None:
        """The last message above this one that is in the conversation; null at the beginning."""
        above = Path(self._context_key, row.segment_key, row.depth - 1)
        query = select(messages.c.key, messages.c.segment_key, messages.c.depth)
        found = await above.newest(self._connection, query, limit=1)
        return found[0] if found else None

    async def fork(self, *, from_message_id: str | None, name: str | None = None) -> str:
        """Makes a branch that starts after a message, copying nothing; returns its name.

        From null it starts empty. Raises `MessageNotFound` where the message has no place on a
        branch, and `IdTaken`.
        """
        if name is not None and await self._is_taken(name):
            raise IdTaken(name)
        leaf = None if from_message_id is None else await self._placed(from_message_id)
        number = await self._segments_made() + 1
        name = name or await self._free_branch_name(number)
        inserted = await self._connection.execute(
            insert(segments)
            .values(
                context_key=self._context_key,
                number=number,
                **await self._above(leaf),
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
        path = await find_path(self._connection, self._context_key, branch)
        place = select(messages.c.key, messages.c.segment_key, messages.c.depth)
        rows = await self._connection.execute(
            place.where(messages.c.key == message_key, ~messages.c.superseded)
        )
        if not await path.holding(self._connection, rows.all()):
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

    async def _is_taken(self, name: str) -> bool:
        found = await self._connection.scalar(
            select(branches.c.name).where(
                branches.c.context_key == self._context_key, branches.c.name == name
            )
        )
        return found is not None

    async def _segments_made(self) -> int:
        """How many there have been: each has a branch, which may be gone."""
        last = await self._connection.scalar(
            select(segments.c.number)
            .where(segments.c.context_key == self._context_key)
            .order_by(segments.c.number.desc())
            .limit(1)
        )
        return last or 0

    async def _free_branch_name(self, number: int) -> str:
        """`branch-2`, `branch-3`, …; where a name was given before, soon far away from it."""
        step = 1
        while await self._is_taken(f"branch-{number}"):
            number += step
            step *= 2
        return f"branch-{number}"

    async def _above(self, leaf: AnyRow | None) -> dict[str, int | None]:
        """What a new segment knows of the path that it continues."""
        if leaf is None:
            return {"parent_key": None, "parent_depth": 0, "rank": 0, "jump_key": None}
        parent, jump, far = segments, segments.alias("jump"), segments.alias("far")
        row = (
            await self._connection.execute(
                select(
                    parent.c.rank,
                    parent.c.jump_key,
                    jump.c.rank.label("jump_rank"),
                    far.c.key.label("far_key"),
                    far.c.rank.label("far_rank"),
                )
                .join(jump, jump.c.key == parent.c.jump_key, isouter=True)
                .join(far, far.c.key == jump.c.jump_key, isouter=True)
                .where(parent.c.key == leaf.segment_key)
            )
        ).one()
        twice = row.far_key is not None and row.rank - row.jump_rank == row.jump_rank - row.far_rank
        return {
            "parent_key": leaf.segment_key,
            "parent_depth": leaf.depth,
            "rank": row.rank + 1,
            "jump_key": row.far_key if twice else leaf.segment_key,
        }


class Path(msgspec.Struct, frozen=True):
    """The way from the root to a leaf: what stands at depth `leaf_depth` or above it.

    `segment_key` is the segment that the leaf, or the branch's next message, stands in.
    """

    context_key: int
    segment_key: int
    leaf_depth: int

    async def after(
        self, connection: AsyncConnection, query: Select[Any], depth: int, *, limit: int
    ) -> list[AnyRow]:
        """The next rows of `query`, which selects messages, below `depth`; in conversation order."""
        found: list[AnyRow] = []
        window = min(max(limit, WINDOW_MIN), WINDOW_MAX)
        while len(found) < limit and depth < self.leaf_depth:
            piece = self.between(query, depth, min(depth + window, self.leaf_depth))
            ordered = piece.order_by(messages.c.depth).limit(limit - len(found))
            found += (await connection.execute(ordered)).all()
            depth, window = depth + window, min(2 * window, WINDOW_MAX)
        return found

    async def newest(
        self, connection: AsyncConnection, query: Select[Any], *, limit: int, above: int = 0
    ) -> list[AnyRow]:
        """The last rows of `query`, which selects messages, below depth `above`; the newest first."""
        found: list[AnyRow] = []
        depth, window = self.leaf_depth, min(max(limit, WINDOW_MIN), WINDOW_MAX)
        while len(found) < limit and depth > above:
            piece = self.between(query, max(above, depth - window), depth)
            ordered = piece.order_by(messages.c.depth.desc()).limit(limit - len(found))
            found += (await connection.execute(ordered)).all()
            depth, window = depth - window, min(2 * window, WINDOW_MAX)
        return found

    async def holding(
        self, connection: AsyncConnection, rows: Sequence[AnyRow]
    ) -> dict[int, AnyRow]:
        """Those of these placed messages that stand on the path, by their keys.

        Looked for segment by segment, at the top and the bottom of what is asked of each.
        """
        asked: dict[int, list[AnyRow]] = {}
        for row in rows:
            if row.depth is not None:
                asked.setdefault(row.segment_key, []).append(row)
        ends = await self._ends(connection, asked)
        return {
            row.key: row
            for segment_key, group in asked.items()
            for row in group
            if row.depth <= ends.get(segment_key, 0)
        }

    def between(self, query: Select[Any], low: int, high: int) -> Select[Any]:
        """Of `query`, which selects messages, those of the path with a depth in (low, high]."""
        way = self._way(low, high)
        return (
            query.join(
                way,
                and_(messages.c.segment_key == way.c.key, messages.c.depth <= way.c.end_depth),
            )
            .where(messages.c.depth > low, messages.c.depth <= high)
            .where(~messages.c.superseded)
        )

    async def _ends(
        self, connection: AsyncConnection, asked: Mapping[int, Sequence[AnyRow]]
    ) -> dict[int, int]:
        """By segment of the path, the last depth of it that is on the path.

        Of the segments that are `asked` for; others come along.
        """
        ends: dict[int, int] = {}
        depths = sorted(min(row.depth for row in group) for group in asked.values())
        seen = 0
        for depth in depths:
            if depth > seen:
                low = depth - 1
                seen = max(d for d in depths if d <= low + WINDOW_MAX)
                ends |= await self._segments(connection, low, seen)
        return ends

    async def parting(self, connection: AsyncConnection, other: "Path") -> int:
        """The depth of the last place that both paths have; 0 where they have none."""
        depth, window = min(self.leaf_depth, other.leaf_depth), WINDOW_MIN
        while depth > 0:
            low = max(0, depth - window)
            mine = await self._segments(connection, low, depth)
            others = await other._segments(connection, low, depth)
            shared = [min(end, others[key]) for key, end in mine.items() if key in others]
            if shared:
                return max(shared)
            depth, window = low, min(2 * window, WINDOW_MAX)
        return 0

    async def _segments(self, connection: AsyncConnection, low: int, high: int) -> dict[int, int]:
        """The segments that have a place in (low, high], each with its last depth on the path."""
        way = self._way(low, high)
        rows = await connection.execute(
            select(way.c.key, way.c.end_depth)
            .join(segments, segments.c.key == way.c.key)
            .where(segments.c.parent_depth < high)
        )
        return dict(rows.all())

    def _way(self, low: int, high: int) -> CTE:
        """From the leaf to depth `low`: every segment from depth `high` on, and jumps before it.

        `end_depth` is where the path leaves the segment; of one that is jumped to it may be more.
        """
        here, far = segments.alias("here"), segments.alias("far")
        way = select(
            literal(self.segment_key, Key).label("key"),
            literal(self.leaf_depth, Integer).label("end_depth"),
        ).cte("way", recursive=True)
        jumps = far.c.parent_depth >= high
        return way.union_all(
            select(
                case((jumps, far.c.key), else_=here.c.parent_key),
                case(
                    (way.c.end_depth < here.c.parent_depth, way.c.end_depth),
                    else_=here.c.parent_depth,
                ),
            )
            .join(here, here.c.key == way.c.key)
            .join(far, far.c.key == here.c.jump_key, isouter=True)
            .where(here.c.parent_key.is_not(None), here.c.parent_depth > low)
        )


async def find_path(connection: AsyncConnection, context_key: int, name: str) -> Path:
    """The path of a branch. Raises `BranchNotFound`."""
    if not re.fullmatch(ID_PATTERN, name):
        raise BranchNotFound(name)
    branch = (
        await connection.execute(
            select(branches.c.segment_key, branches.c.leaf_depth).where(
                branches.c.context_key == context_key, branches.c.name == name
            )
        )
    ).one_or_none()
    if branch is None:
        raise BranchNotFound(name)
    return Path(context_key, branch.segment_key, branch.leaf_depth)


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
