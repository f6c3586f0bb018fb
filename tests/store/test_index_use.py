"""What is looked for all the time is found by an index, however many contexts there are."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import Executable, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.machine import State
from contextd.store.engines import make_engines
from contextd.store.reader import select_contexts
from contextd.store.tables import contexts, nodes, turns
from contextd.store.unattended import select_overdue, select_unattended
from contextd.store.upgrade import upgrade

CONTEXTS = 5000
BATCH = 500
WITHOUT_A_MATCH = [State.FAILED]
RARE = [State.FAILED, State.EXECUTING_TOOLS, State.AWAITING_TOOL_APPROVAL]
COMMON = [State.IDLE]
BOTH = [State.IDLE, *RARE]


def context_row(number: int, state: State) -> dict[str, Any]:
    return {
        "key": number, "id": f"c{number}", "state": state.value, "state_detail": {},
        "state_since": number, "revision": 1, "record_revision": 1, "active_branch": "main",
        "mode": "act", "tools": [], "approval_policy": {}, "on_busy": "enqueue", "metadata": {},
        "message_count": 0, "request_hash": "", "created_at": number, "changed_at": number % 1000,
    }  # fmt: skip


def turn_row(number: int, status: str, owner_id: str | None) -> dict[str, Any]:
    return {
        "key": number, "context_key": number, "id": f"t{number}", "branch": "main",
        "user_message_key": 1, "status": status, "owner_id": owner_id, "fence": 1, "attempt": 1,
        "phases": {}, "created_at": 1,
    }  # fmt: skip


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[AsyncConnection]:
    """Many contexts at rest whose turns have ended, and a few turns that are found."""
    await upgrade(database_url)
    engines = make_engines(database_url, readers=1)
    rows = [context_row(n, State.IDLE) for n in range(1, CONTEXTS)]
    rows += [context_row(CONTEXTS + n, state) for n, state in enumerate(RARE[1:])]
    ended = [turn_row(n, "completed", None) for n in range(1, CONTEXTS - 10)]
    found = [turn_row(CONTEXTS - n, "running", owner) for n, owner in enumerate(("gone", "me"))]
    waiting = [turn_row(CONTEXTS - 2, "queued", None)]
    lease = [{"id": "me", "lease_expires_at": 2**50}]
    for table, many in ((contexts, rows), (turns, [*ended, *found, *waiting]), (nodes, lease)):
        for start in range(0, len(many), BATCH):  # a writing connection does not wait for long
            async with engines.writer.begin() as writing:
                await writing.execute(insert(table), many[start : start + BATCH])
    async with engines.writer.begin() as writing:
        await writing.execute(text("ANALYZE"))
    async with engines.writer.connect() as reading:
        yield reading
    await engines.dispose()


async def plan_of(connection: AsyncConnection, query: Executable) -> str:
    dialect = connection.dialect
    sql = str(query.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))  # type: ignore[attr-defined]
    if dialect.name == "sqlite":
        rows = await connection.execute(text("EXPLAIN QUERY PLAN " + sql.replace(":", "\\:")))
        return "\n".join(row.detail for row in rows)
    return "\n".join((await connection.scalars(text("EXPLAIN " + sql.replace(":", "\\:")))).all())


def scans(plan: str) -> list[str]:
    """The tables that are read from end to end, in either database's words."""
    whole = r"Seq Scan on (contexts|turns)|^SCAN (contexts|turns)\b(?!.* USING)"
    return [a or b for a, b in re.findall(whole, plan, re.MULTILINE)]


async def test_the_look_for_turns_reads_no_table(connection: AsyncConnection) -> None:
    """Its own turns, those of the dead and those that wait for nothing: by indexes of just these."""
    query = select_unattended("me", limit=100)
    found = {(row.what, row.key) for row in await connection.execute(query)}
    assert found == {(0, CONTEXTS - 1), (1, CONTEXTS), (2, CONTEXTS - 2)}
    plan = await plan_of(connection, query)
    assert not scans(plan), plan
    assert "ix_turns_running" in plan
    assert "ix_turns_queued" in plan


async def test_who_waits_for_too_long_is_found_by_an_index(connection: AsyncConnection) -> None:
    """Contexts that wait for people are few among all."""
    query = select_overdue(CONTEXTS + 2, limit=100)
    assert (await connection.scalars(query)).all() == [f"c{CONTEXTS + 1}"]
    plan = await plan_of(connection, query)
    assert not scans(plan), plan


@pytest.mark.parametrize("states", [[], WITHOUT_A_MATCH, RARE, COMMON, BOTH], ids=len)
@pytest.mark.parametrize("before", [None, (500, 10)])
async def test_a_list_of_contexts_reads_a_page(
    connection: AsyncConnection, states: list[State], before: tuple[int, int] | None
) -> None:
    """§2: newest activity first, with any set of states, matched by none, few or nearly all."""
    query = select_contexts([state.value for state in states], before=before, limit=50)
    found = [(row.changed_at, row.key) for row in await connection.execute(query)]
    rows = await connection.execute(text("SELECT state, changed_at, key FROM contexts"))
    matching = [(row[1], row[2]) for row in rows if not states or row[0] in states]
    matching = sorted((one for one in matching if before is None or one < before), reverse=True)
    assert found == matching[:50]
    plan = await plan_of(connection, query)
    assert not scans(plan), plan
    if len(states) < len(RARE):
        assert "Sort" not in plan, plan
        assert "B-TREE" not in plan, plan
