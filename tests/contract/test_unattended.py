"""A running turn always has one process and one task that work on it, over both databases (§6)."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.app import Contextd, running
from contextd.core.context import ApprovalPolicy, ContextRequest
from contextd.core.errors import Overloaded
from contextd.core.message import SendRequest, TextPayload
from contextd.core.tool_call import ToolDecision
from contextd.provider import Event, ModelRequest, ToolCallDelta
from contextd.settings import Settings
from contextd.store.leases import Leases
from contextd.store.tables import journal as journal_rows
from contextd.store.unattended import Unattended
from contextd.store.writer import Unconfirmed
from contextd.turns import reply as reply_module
from contextd.turns import runner as runner_module

from .conftest import HeldProvider, Start
from .test_tool_turns import ASK
from .test_turns import DEADLINE_S, begin, conversation, idle, journal, send, until
from .test_unconfirmed import cutter_before

# Nothing but what a test does makes a process look, and no lease runs out.
NEVER: dict[str, Any] = {"poll_s": 3600, "lease_s": 3600}


async def comes(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.005)


async def persistently(write: Callable[[], Awaitable[Any]]) -> Any:
    """Does what a client does: says the same again until it is answered."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await write()
            except Overloaded:
                await asyncio.sleep(0.01)


async def test_a_send_whose_answer_is_lost_is_worked_on(postgresql_url: str) -> None:
    """At once, without a lease or a look that is due, by one task, and the model is asked once."""
    provider = HeldProvider()
    provider.say("Hi", None)
    async with cutter_before(postgresql_url) as (cutter, url):
        settings = Settings(database=url, **NEVER)
        async with running(settings, providers={"scripted": provider}) as contextd:
            await contextd.service.contexts.create(ContextRequest(id="a"))
            cutter.armed = True
            with pytest.raises(Unconfirmed):
                await send(contextd, "Hello", message_id="u1")
            context = await persistently(lambda: until(contextd, lambda c: c.message_count == 2))
            await persistently(lambda: until(contextd, idle))
            answer = await persistently(lambda: send(contextd, "Hello", message_id="u1"))
            turn = await contextd.service.records.turn("a", answer.turn_id)
            assert (turn.status, turn.attempt, context.message_count) == ("completed", 1, 2)
            assert "recover" not in await journal(contextd)
    assert len(provider.requests) == cutter.cuts == 1


async def test_an_end_whose_answer_is_lost_starts_the_next_turn(postgresql_url: str) -> None:
    """The turn that waited in the queue is this process's, and nobody was told of it."""
    provider = HeldProvider()
    async with cutter_before(postgresql_url) as (cutter, url):
        settings = Settings(database=url, **NEVER)
        async with running(settings, providers={"scripted": provider}) as contextd:
            await begin(contextd, provider)
            await send(contextd, "next")
            ends = contextd.service.call_steps.end_stream

            async def cut_once(turn: Any, **said: Any) -> Any:
                cutter.armed = not cutter.cuts
                return await ends(turn, **said)

            contextd.service.call_steps.end_stream = cut_once  # type: ignore[method-assign]
            provider.say("one", None, "two", None)
            await persistently(lambda: until(contextd, idle))
            found = [m.content for m in await conversation(contextd)]
            assert found == ["Hello", "one", "next", "two"]
            assert "recover" not in await journal(contextd)
    assert (len(provider.requests), cutter.cuts) == (2, 1)


@pytest.mark.parametrize("step", ["open_message", "end_stream", "fail_transiently", "take_up"])
async def test_a_step_whose_answer_is_lost_costs_no_attempt(postgresql_url: str, step: str) -> None:
    """What the model has said is not asked for again: it is stored once, whether it was or not."""
    provider = HeldProvider()
    async with cutter_before(postgresql_url) as (cutter, url):
        settings = Settings(database=url, backoff_initial_s=0.0, **NEVER)
        async with running(settings, providers={"scripted": provider}) as contextd:
            owner = contextd.service.call_steps if step == "end_stream" else contextd.service.steps
            original = getattr(owner, step)

            async def cut_once(*args: Any, **kwargs: Any) -> Any:
                cutter.armed = not cutter.cuts
                return await original(*args, **kwargs)

            setattr(owner, step, cut_once)
            await begin(contextd, provider)
            broken = step == "fail_transiently"
            provider.say(*([reply_module.TransientError("provider_timeout", "slow")] * broken))
            provider.say("Hi", " there", None)
            await persistently(lambda: until(contextd, idle))
            assert [m.content for m in await conversation(contextd)] == ["Hello", "Hi there"]
            turns = await contextd.service.records.turns("a", cursor=None, limit=10)
            assert [turn.attempt for turn in turns.items] == [1 + broken]
    assert (len(provider.requests), cutter.cuts) == (1 + broken, 1)


@pytest.mark.parametrize("when", ["before it reads", "after it read"])
async def test_a_look_stops_no_task_that_began_since(
    start: Start, provider: HeldProvider, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A turn that was decided while a look was under way has a task that the look knows nothing of."""
    looking, decided = asyncio.Event(), asyncio.Event()
    async with start(**NEVER) as contextd:
        policy = ApprovalPolicy(mode="manual")
        await contextd.service.contexts.create(
            ContextRequest(id="a", tools=[ASK], approval_policy=policy)
        )
        await send(contextd, "Hello")
        await provider.asked.wait()
        look = contextd.service.recovery.look

        async def slow_look() -> Unattended:
            found = await look() if when == "after it read" else None
            looking.set()
            await decided.wait()
            return found or await look()

        monkeypatch.setattr(contextd.service.recovery, "look", slow_look)
        under_way = asyncio.create_task(contextd.turns.look())
        await looking.wait()
        provider.say(ToolCallDelta(id="1", name="ask", content="{}"), None)
        await until(contextd, lambda context: context.state == "awaiting_tool_approval")
        (call_id,) = (await contextd.service.contexts.get("a")).pending_tool_calls
        provider.asked.clear()
        await contextd.service.calls.decide(
            "a", [ToolDecision(tool_call_id=call_id, decision="deny")]
        )
        decided.set()
        await under_way
        provider.say("All right", None)
        await until(contextd, idle)
    assert len(provider.requests) == 2


async def test_a_commit_of_the_dead_is_taken_over_at_once(start: Start) -> None:
    """Who starts alone ends all leases; a turn that one of the dead commits after that has no owner."""
    dead, other = HeldProvider(), HeldProvider()
    async with start(dead, **NEVER) as zombie, start(other, lease_s=3600) as two:
        await zombie.service.contexts.create(ContextRequest(id="a"))
        await two.service.recovery.leases.end_others()
        answer = await send(zombie, "Hello")
        other.say("Hi", None)
        await until(two, idle)
        turn = await two.service.records.turn("a", answer.turn_id)
        assert turn.status == "completed"
    assert len(other.requests) == 1


class CountingProvider(HeldProvider):
    """Holds every request, and counts them by turn."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        await asyncio.Event().wait()
        yield Event  # type: ignore[misc]


async def test_the_turns_of_a_dead_process_are_shared(start: Start) -> None:
    """Each is claimed once, in a few transactions, by both that live; those of the living never."""
    count, models = 30, [CountingProvider() for _ in range(3)]
    async with AsyncExitStack() as stack:
        dead = await stack.enter_async_context(start(models[0], **NEVER))
        living = [await stack.enter_async_context(start(model, **NEVER)) for model in models[1:]]
        await asyncio.gather(*(_begin(dead, f"d{number}") for number in range(count)))
        await asyncio.gather(*(_begin(one, f"l{one.turns.running}{id(one)}") for one in living))
        await comes(lambda: all(one.turns.running == 1 for one in living))
        await comes(lambda: len(models[0].requests) == count)
        await dead.service.recovery.leases.give_back()  # as if it had died a lease ago
        # Each looks when it does: the other one's part is not touched before that has had its time.
        while not all([await one.turns.look() for one in living]):
            pass
        assert sum(one.turns.running for one in living) == count + 2
        await comes(lambda: sum(len(model.requests) for model in models[1:]) == count + 2)
        async with dead.service.contexts._reader.snapshot() as connection:
            rows = await connection.execute(
                select(journal_rows.c.context_key, journal_rows.c.at).where(
                    journal_rows.c.trigger == "recover"
                )
            )
            recovered = [tuple(row) for row in rows]
        assert len(recovered) == len({key for key, _ in recovered}) == count
        assert len({at for _, at in recovered}) <= count // 5
        assert all(one.turns.running >= count // 4 for one in living)
    asked = Counter(request.turn_id for model in models[1:] for request in model.requests)
    assert set(asked.values()) == {1}


async def _begin(contextd: Contextd, context_id: str) -> None:
    await contextd.service.contexts.create(ContextRequest(id=context_id))
    request = SendRequest(payload=TextPayload(content="Hello"))
    await contextd.service.messages.send(context_id, request)


async def test_nothing_that_waits_delays_a_renewal(start: Start) -> None:
    """Neither the writer's transaction (on PostgreSQL) nor what is queued behind it (on both)."""
    order: list[str] = []
    begun, gate = asyncio.Event(), asyncio.Event()

    async def held(connection: AsyncConnection) -> None:
        begun.set()
        await gate.wait()

    async with start(**NEVER) as contextd:
        ledger, leases = contextd.service.ledger, contextd.service.recovery.leases

        async def waiting(connection: AsyncConnection) -> None:
            order.append("queued")

        renew = leases._renew

        async def noted(connection: AsyncConnection) -> None:
            order.append("renewed")
            await renew(connection)

        leases._renew = noted  # type: ignore[method-assign]
        first = asyncio.create_task(ledger.writer.change(held))
        await begun.wait()
        queued = [asyncio.create_task(ledger.writer.change(waiting)) for _ in range(20)]
        await asyncio.sleep(0)
        renewal = asyncio.create_task(leases.renew())
        if leases._engine is not None:
            async with asyncio.timeout(DEADLINE_S):
                await renewal
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, renewal, *queued)
    assert order == ["renewed", *["queued"] * 20]


async def test_who_could_not_renew_in_time_judges_nobody(start: Start, database_url: str) -> None:
    """When the database was away for all, an owner that will be back has time to say so."""
    now = 0.0
    async with start(HeldProvider(), **NEVER) as contextd:
        writer = contextd.service.ledger.writer
        leases = Leases(database_url, writer, owner_id="x", lease_s=3, clock=lambda: now)
        for now, renews, judges in (
            (0.0, True, True),
            (1.5, True, True),
            (4.0, True, False),
            (4.9, False, False),
            (5.0, False, True),
        ):
            if renews:
                await leases.renew()
            assert leases.judges is judges, now
        await leases.close()


async def test_a_turn_is_not_taken_by_who_may_not_judge(start: Start) -> None:
    """It is taken later, by the same look."""
    async with start(HeldProvider(), **NEVER) as one, start(HeldProvider(), **NEVER) as two:
        await one.service.contexts.create(ContextRequest(id="a"))
        await send(one, "Hello")
        leases = two.service.recovery.leases
        await one.service.recovery.leases.give_back()
        leases._judges_from = float("inf")
        await two.turns.look()
        assert two.turns.running == 0
        leases._judges_from = 0
        await two.turns.look()
        assert two.turns.running == 1


async def test_a_defect_does_not_leave_a_turn_lying(
    start: Start, provider: HeldProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that should have ended it failed as well: it is taken up again from what is stored."""
    monkeypatch.setattr(runner_module, "DEFECT_WAIT_S", 0.0)
    async with start(**NEVER) as contextd:
        steps = contextd.service.steps
        fail, failures = steps.fail, [RuntimeError("a defect"), RuntimeError("another")]

        async def failing(*args: Any, **kwargs: Any) -> None:
            if failures:
                raise failures.pop()
            await fail(*args, **kwargs)

        monkeypatch.setattr(steps, "fail", failing)
        await begin(contextd, provider)
        provider.say("half an", RuntimeError("of the provider"), "answer", None)
        await until(contextd, idle)
        assert [m.content for m in await conversation(contextd)] == ["Hello", "answer"]
        turns = await contextd.service.records.turns("a", cursor=None, limit=10)
        assert [(turn.status, turn.attempt) for turn in turns.items] == [("completed", 2)]
        assert contextd.turns.running == 0


async def test_a_provider_that_cancels_itself_fails_its_turn(start: Start) -> None:
    """It is not waited for until the model would have been silent for too long."""

    class Cancelled(HeldProvider):
        async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
            raise asyncio.CancelledError
            yield

    async with start(Cancelled(), token_timeout_s=3600, **NEVER) as contextd:
        await begin(contextd, HeldProvider())
        context = await until(contextd, lambda context: context.state == "failed")
        assert context.state_detail["error"]["type"] == "provider_error"


async def test_an_append_is_said_again_for_as_long_as_it_takes(
    start: Start, provider: HeldProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a thousand refusals in a row, one after the other and not one inside the other."""
    monkeypatch.setattr(reply_module, "STORE_RETRY_S", 0)
    async with start(**NEVER) as contextd:
        ledger, refusals = contextd.service.ledger, 1500
        append = ledger.append

        def refusing(*args: Any, **kwargs: Any) -> Any:
            nonlocal refusals
            refusals -= 1
            if refusals >= 0:
                raise Overloaded("The database is away.")
            return append(*args, **kwargs)

        monkeypatch.setattr(ledger, "append", refusing)
        await begin(contextd, provider)
        provider.say("one ")
        await until(contextd, lambda context: context.state == "streaming_llm_response")
        provider.say("two", None)
        await until(contextd, idle)
        assert [m.content for m in await conversation(contextd)] == ["Hello", "one two"]
