"""Which turns need somebody: reads off the writer, each by an index of its own (§6).

What is found here is only a hint: whoever acts on it looks again under the lock of the context.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    and_,
    literal_column,
    null,
    select,
    union_all,
)

from contextd.core.machine import REST_STATES, WAITING_STATES
from contextd.store.reader import Reader
from contextd.store.tables import AnyRow, contexts, database_now_ms, nodes, turns

# Written out, because an index that is only for these rows cannot be used for a parameter.
IS_RUNNING = turns.c.status == literal_column("'running'")
IS_QUEUED = turns.c.status == literal_column("'queued'")
_WAITS = contexts.c.state.in_([literal_column(f"'{state}'") for state in sorted(WAITING_STATES)])

MINE, ABANDONED, AT_REST = 0, 1, 2


class Unattended(msgspec.Struct, frozen=True):
    """What one look has found."""

    mine: dict[int, int]  # running turns of this process: their keys and fences
    abandoned: dict[int, str]  # running turns of processes that are gone: their keys and contexts
    at_rest: Sequence[str]  # ids of contexts where a turn waits for nothing
    living: Sequence[str]  # ids of processes, in order; empty where nothing is abandoned


def is_abandoned(owner_id: str) -> ColumnElement[bool]:
    """Of a running turn: another process owns it, and that one is gone."""
    lives = (
        select(nodes.c.id)
        .where(nodes.c.id == turns.c.owner_id, nodes.c.lease_expires_at >= database_now_ms())
        .exists()
    )
    return and_(turns.c.owner_id.is_not(None), turns.c.owner_id != owner_id, ~lives)


@lru_cache(maxsize=8)  # a process asks every second, and for itself
def select_unattended(owner_id: str, *, limit: int) -> CompoundSelect[Any]:
    """One statement for all three: (what, key of the turn, its fence, id of its context)."""
    columns = turns.c.key, turns.c.fence, contexts.c.id.label("context_id")
    with_context = turns.join(contexts, contexts.c.key == turns.c.context_key)
    mine = select(_what(MINE), turns.c.key, turns.c.fence, null().label("context_id")).where(
        IS_RUNNING, turns.c.owner_id == owner_id
    )
    abandoned = (
        select(_what(ABANDONED), *columns)
        .select_from(with_context)
        .where(IS_RUNNING, is_abandoned(owner_id))
        .order_by(turns.c.key)
        .limit(limit)
    )
    at_rest = (
        select(_what(AT_REST), *columns)
        .select_from(with_context)
        .where(IS_QUEUED, contexts.c.state.in_(sorted(REST_STATES)))
        .limit(limit)
    )
    return union_all(mine, *(select(one.subquery()) for one in (abandoned, at_rest)))


def select_overdue(before: int, *, limit: int) -> Select[Any]:
    """Ids of contexts that have waited since before then for somebody outside."""
    return select(contexts.c.id).where(_WAITS, contexts.c.state_since < before).limit(limit)


async def look(reader: Reader, owner_id: str, *, limit: int) -> Unattended:
    """What this process is to do now. Raises `Overloaded`."""
    found: dict[int, list[AnyRow]] = {MINE: [], ABANDONED: [], AT_REST: []}
    living: Sequence[str] = ()
    async with reader.snapshot() as connection:
        for row in await connection.execute(select_unattended(owner_id, limit=limit)):
            found[row.what].append(row)
        if found[ABANDONED]:
            living = (await connection.scalars(_LIVING)).all()
    return Unattended(
        mine={row.key: row.fence for row in found[MINE]},
        abandoned={row.key: row.context_id for row in found[ABANDONED]},
        at_rest=[row.context_id for row in found[AT_REST]],
        living=living,
    )


async def overdue(reader: Reader, before: int, *, limit: int) -> Sequence[str]:
    """As `select_overdue`. Raises `Overloaded`."""
    async with reader.snapshot() as connection:
        return (await connection.scalars(select_overdue(before, limit=limit))).all()


_LIVING = (
    select(nodes.c.id).where(nodes.c.lease_expires_at >= database_now_ms()).order_by(nodes.c.id)
)


def _what(number: int) -> ColumnElement[int]:
    return literal_column(str(number), Integer).label("what")
