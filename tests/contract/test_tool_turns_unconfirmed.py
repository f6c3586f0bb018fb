"""Turns with tools when a commit's answer is lost, on PostgreSQL: nothing runs twice (§6, §8).

A trigger makes the step of interest wait for a lock that the test holds. While it waits the test arms
the cutter, so the very transaction that has this step in it is committed and its answer is lost.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from contextd.app import Contextd, running
from contextd.core.context import ContextRequest
from contextd.core.errors import Overloaded
from contextd.settings import Settings

from .conftest import HeldProvider
from .test_tool_turns import (
    ASK,
    USER_TOOLS,
    answer,
    asks,
    calls_of,
    completed,
    decide,
    statuses,
    told,
)
from .test_turns import DEADLINE_S, idle, journal, send
from .test_unconfirmed import cutter_before

LOCK = 4711
# Step: the table it writes, how, and by what it is told from others.
STEPS = {
    "end_stream": ("INSERT ON journal", "NEW.trigger = 'end_stream'"),
    "require_approval": ("INSERT ON journal", "NEW.trigger = 'require_approval'"),
    "execute_tools": ("INSERT ON journal", "NEW.trigger = 'execute_tools'"),
    "start": ("UPDATE ON tool_calls", "NEW.status = 'running' AND OLD.status = 'approved'"),
    "end": ("UPDATE ON tool_calls", "NEW.status = 'succeeded' AND NEW.name = 'note'"),
    "await_results": ("INSERT ON journal", "NEW.trigger = 'await_results'"),
    "collect_results": ("INSERT ON journal", "NEW.trigger = 'collect_results'"),
    "request_llm": (
        "INSERT ON journal",
        "NEW.trigger = 'request_llm' AND NEW.from_state = 'processing_tool_results'",
    ),
}


class Gate:
    """Lets a step wait inside its transaction, as long as the test wants."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def close_before(self, step: str) -> None:
        event, condition = STEPS[step]
        await self._connection.execute(f"""
            CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN PERFORM pg_advisory_xact_lock_shared({LOCK}); RETURN NEW; END
            $$;
            CREATE TRIGGER gate BEFORE {event} FOR EACH ROW WHEN ({condition})
                EXECUTE FUNCTION wait_at_gate();
            SELECT pg_advisory_lock({LOCK});
        """)

    async def waits(self) -> bool:
        """Whether somebody stands before it."""
        query = "SELECT count(*) FROM pg_locks WHERE objid = $1 AND NOT granted"
        return bool(await self._connection.fetchval(query, LOCK))

    async def open(self) -> None:
        await self._connection.execute(f"SELECT pg_advisory_unlock({LOCK})")


@asynccontextmanager
async def gate_of(url: str) -> AsyncIterator[Gate]:
    direct = make_url(url)
    connection = await asyncpg.connect(
        host=direct.query["host"], user=direct.username, database=direct.database
    )
    try:
        yield Gate(connection)
    finally:
        await connection.close()


async def begin_turn(contextd: Contextd, provider: HeldProvider, notes: Path) -> str:
    """A tool that runs here, one that a person has to allow, and one of somebody else."""
    await contextd.service.contexts.create(ContextRequest(id="a", tools=[ASK, "note", "guarded"]))
    sent = await send(contextd, "Hello")
    guarded = {"path": str(notes), "line": "guarded"}
    provider.say(*asks(("note", {"path": str(notes)}), ("guarded", guarded), ("ask", {})))
    return str(sent.turn_id)


async def help_on(contextd: Contextd) -> None:
    """Does what people outside do until the turn ends; what is not confirmed to them they say again."""
    while not idle(context := await contextd.service.contexts.get("a")):
        assert context.state != "failed", context.state_detail
        calls = await calls_of(contextd)
        try:
            if context.state == "awaiting_tool_approval":
                await decide(contextd, calls[1], "approve")
            elif context.state == "awaiting_tool_results":
                await answer(contextd, calls[2])
        except Overloaded:
            pass  # it was not confirmed, or the writer is about to connect again
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_whose_answer_is_lost(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The turn goes on from what is stored: each tool at most once, one result each, one end."""
    monkeypatch.syspath_prepend(USER_TOOLS)
    provider, notes = HeldProvider(), tmp_path / "notes"
    async with cutter_before(postgresql_url) as (cutter, url), gate_of(postgresql_url) as gate:
        settings = Settings(
            database=url, backoff_initial_s=0.0, lease_s=3600, poll_s=3600, tools="user_tools"
        )
        async with running(settings, providers={"scripted": provider}) as contextd:
            await gate.close_before(step)
            turn_id = await begin_turn(contextd, provider, notes)
            people = asyncio.create_task(help_on(contextd))
            async with asyncio.timeout(DEADLINE_S):
                while not await gate.waits():
                    await asyncio.sleep(0.01)
                cutter.armed = True
                await gate.open()
                while not cutter.cuts:
                    await asyncio.sleep(0.01)
                provider.say("done", None)
                await people
            await completed(contextd, turn_id)
            ran = notes.read_text().splitlines() if notes.exists() else []
            found = {name: status for name, status, _ in await statuses(contextd)}
            assert len(ran) == len(set(ran)), ran
            for name, line in (("note", "ran"), ("guarded", "guarded")):
                assert found[name] == ("succeeded" if line in ran else "failed"), (found, ran)
            assert found["ask"] == "succeeded"
            assert len(await told(contextd)) == 3
            steps = await journal(contextd)
            assert [steps.count(one) for one in ("collect_results", "finish", "fail")] == [1, 1, 0]
            assert "recover" not in steps
            assert len(provider.requests) == 2
            assert cutter.cuts == 1
