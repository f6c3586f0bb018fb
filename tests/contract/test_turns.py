"""Turns through crashes, take-overs and cancels, over SQLite and PostgreSQL."""

import asyncio
from collections.abc import Callable
from typing import Any

from contextd.app import Contextd
from contextd.core.context import Context, ContextRequest
from contextd.core.message import Message, SendRequest, TextPayload
from contextd.provider import FatalError, TextDelta, ThinkingDelta, TransientError

from .conftest import HeldProvider, Start

DEADLINE_S = 20


async def until(
    contextd: Contextd, true_of: Callable[[Context], bool], context_id: str = "a"
) -> Context:
    """Reads the context again until it is so; the deadline only bounds a failing test."""
    async with asyncio.timeout(DEADLINE_S):
        while not true_of(found := await contextd.service.contexts.get(context_id)):
            await asyncio.sleep(0.005)
    return found


async def send(contextd: Contextd, text: str, **options: Any) -> Any:
    request = SendRequest(payload=TextPayload(content=text), **options)
    return await contextd.service.messages.send("a", request)


async def conversation(contextd: Contextd) -> list[Message]:
    page = await contextd.service.messages.list(
        "a", branch=None, cursor=None, limit=100, include_content=True
    )
    return page.items


async def journal(contextd: Contextd) -> list[str]:
    page = await contextd.service.records.transitions("a", cursor=None, limit=1000)
    return [entry.trigger for entry in page.items]


async def begin(contextd: Contextd, provider: HeldProvider, text: str = "Hello") -> Any:
    await contextd.service.contexts.create(ContextRequest(id="a"))
    return await send(contextd, text)


def idle(context: Context) -> bool:
    return context.state == "idle" and not context.queued_messages


def streaming(context: Context) -> bool:
    return context.state == "streaming_llm_response"


async def test_a_turn_is_written_as_its_events_say(start: Start, provider: HeldProvider) -> None:
    """Thinking and text are messages of their own, in order; a NUL of the model is stored as U+FFFD."""
    async with start() as contextd:
        await begin(contextd, provider)
        provider.say(ThinkingDelta("hm"), ThinkingDelta("m"), "a\x00b", "", TextDelta("c"), None)
        await until(contextd, idle)
        found = [(m.role, m.kind, m.content, m.status) for m in await conversation(contextd)]
        assert found == [
            ("user", "text", "Hello", "completed"),
            ("assistant", "thinking", "hmm", "completed"),
            ("assistant", "text", "a\ufffdbc", "completed"),
        ]
        assert await journal(contextd) == [
            "receive_message", "request_llm", "first_chunk", "end_stream", "finish",
        ]  # fmt: skip


async def test_a_delta_beyond_the_limit_of_a_chunk_is_split(
    start: Start, provider: HeldProvider
) -> None:
    """No chunk is larger than the setting, and joining gives the text back."""
    async with start(chunk_bytes_max=64) as contextd:
        await begin(contextd, provider)
        text = "€𝄞x" * 100
        provider.say(text, None)
        await until(contextd, idle)
        answer = (await conversation(contextd))[-1]
        page = await contextd.service.content.chunks("a", answer.id, start=0, limit=1000)
        assert "".join(chunk.content for chunk in page.chunks) == text
        assert max(len(chunk.content.encode()) for chunk in page.chunks) <= 64


async def test_a_turn_without_an_answer_gets_an_empty_one(
    start: Start, provider: HeldProvider
) -> None:
    """Every turn's end is seen as a message's end (§6): completed, failed and cancelled alike."""
    async with start() as contextd:
        await begin(contextd, provider)
        provider.say(None)
        await until(contextd, idle)
        await send(contextd, "again")
        provider.say(FatalError("provider_rejected", "no"))
        await until(contextd, lambda context: context.state == "failed")
        await send(contextd, "and again")
        await provider.asked.wait()
        await contextd.service.steps.cancel("a", None)
        found = [(m.content, m.status) for m in (await conversation(contextd))[1::2]]
        assert found == [("", "completed"), ("", "failed"), ("", "cancelled")]


async def test_a_broken_attempt_leaves_the_conversation_but_stays_readable(
    start: Start, provider: HeldProvider
) -> None:
    """§6: closed as interrupted with what it had; the next attempt follows the user's message."""
    async with start() as contextd:
        answer = await begin(contextd, provider)
        provider.say("half an ", TransientError("provider_unreachable", "gone"))
        provider.say("whole", None)
        context = await until(contextd, idle)
        user, reply = await conversation(contextd)
        assert (reply.content, reply.parent_id) == ("whole", user.id)
        assert context.message_count == 2
        turn = await contextd.service.records.turn("a", answer.turn_id)
        assert turn.attempt == 2
        broken = next(i for i in turn.message_ids if i not in (user.id, reply.id))
        message = await contextd.service.messages.get("a", broken)
        assert (message.status, message.final_sequence) == ("interrupted", 1)
        pulled = await contextd.service.content.pull("a", broken, start=0, end=None)
        assert pulled.content == "half an "


async def test_attempts_end_at_their_limit(start: Start, provider: HeldProvider) -> None:
    """The last attempt's error is the turn's, and what it wrote stays as a failed message."""
    async with start(attempts_max=2) as contextd:
        answer = await begin(contextd, provider)
        provider.say("one", TransientError("provider_timeout", "slow"))
        provider.say("two", TransientError("provider_unavailable", "down"))
        context = await until(contextd, lambda context: context.state == "failed")
        assert context.state_detail["error"]["type"] == "provider_unavailable"
        found = [(m.content, m.status) for m in await conversation(contextd)]
        assert found == [("Hello", "completed"), ("two", "failed")]
        turn = await contextd.service.records.turn("a", answer.turn_id)
        assert (turn.status, turn.attempt) == ("failed", 2)


async def test_a_retry_does_not_show_the_model_its_failed_answer(
    start: Start, provider: HeldProvider
) -> None:
    """A new turn with `retry_of` answers the same message."""
    async with start() as contextd:
        failed = await begin(contextd, provider)
        provider.say("rubbish", FatalError("provider_rejected", "no"))
        await until(contextd, lambda context: context.state == "failed")
        answer = await contextd.service.retries.retry("a")
        provider.say("better", None)
        await until(contextd, idle)
        shown = [(m.role, m.content) for m in provider.requests[-1].history]
        assert shown == [("user", "Hello")]
        turn = await contextd.service.records.turn("a", answer.turn_id)
        assert (turn.retry_of, turn.status) == (failed.turn_id, "completed")


async def test_a_cancel_closes_the_provider_and_the_queue_goes_on(
    start: Start, provider: HeldProvider
) -> None:
    """One transaction: the turn ends as cancelled, what it wrote stays, the next one starts."""
    async with start() as contextd:
        first = await begin(contextd, provider)
        provider.say("some")
        await until(contextd, streaming)
        second = await send(contextd, "next")
        assert second.queued
        closed = provider.closed.wait()
        cancelled = await contextd.service.steps.cancel("a", None)
        assert cancelled.cancelled_turn_id == first.turn_id
        assert cancelled.state == "processing_user_message"
        async with asyncio.timeout(DEADLINE_S):
            await closed
        provider.say("answer", None)
        await until(contextd, idle)
        found = [(m.content, m.status) for m in await conversation(contextd)]
        assert found == [
            ("Hello", "completed"), ("some", "cancelled"),
            ("next", "completed"), ("answer", "completed"),
        ]  # fmt: skip


async def test_a_restart_goes_on_where_the_turn_stood(start: Start, provider: HeldProvider) -> None:
    """A stopped process leaves its turns as they are; the next costs an attempt only in mid-answer."""
    async with start() as contextd:
        answer = await begin(contextd, provider)
        provider.say("half")
        await until(contextd, streaming)
        await send(contextd, "queued meanwhile")
    async with start() as contextd:
        provider.say("whole", None, "second", None)
        await until(contextd, idle)
        found = [(m.content, m.status) for m in await conversation(contextd)]
        assert found == [
            ("Hello", "completed"), ("whole", "completed"),
            ("queued meanwhile", "completed"), ("second", "completed"),
        ]  # fmt: skip
        turn = await contextd.service.records.turn("a", answer.turn_id)
        assert (turn.status, turn.attempt) == ("completed", 2)
        assert "recover" in await journal(contextd)


async def test_another_process_takes_over_when_the_lease_runs_out(start: Start) -> None:
    """Of two processes one owns the turn; when it falls silent the other ends the turn, exactly once."""
    mine, other = HeldProvider(), HeldProvider()
    async with start(mine, lease_s=3600) as one, start(other, lease_s=1) as two:
        await one.service.contexts.create(ContextRequest(id="a"))
        answer = await send(one, "Hello")
        mine.say("half")
        await until(one, streaming)
        await one.service.recovery.leases.give_back()  # as if it had hung for as long as a lease
        other.say("whole", None)
        await until(two, idle)
        mine.say(" too late", None)
        found = [(m.content, m.status) for m in await conversation(two)]
        assert found == [("Hello", "completed"), ("whole", "completed")]
        turn = await two.service.records.turn("a", answer.turn_id)
        assert (turn.status, turn.attempt) == ("completed", 2)


async def test_a_cancel_by_another_process_stops_the_owner(start: Start) -> None:
    """The owner finds its next write refused, and its provider is closed."""
    mine = HeldProvider()
    async with start(mine) as one, start(HeldProvider()) as two:
        await one.service.contexts.create(ContextRequest(id="a"))
        await send(one, "Hello")
        mine.say("some")
        await until(one, streaming)
        cancelled = await two.service.steps.cancel("a", None)
        assert cancelled.cancelled_turn_id is not None
        mine.say("more")
        async with asyncio.timeout(DEADLINE_S):
            await mine.closed.wait()
        found = [(m.content, m.status) for m in await conversation(one)]
        assert found == [("Hello", "completed"), ("some", "cancelled")]


async def test_a_silent_model_is_given_up_and_a_turn_has_a_limit(
    start: Start, provider: HeldProvider
) -> None:
    """60 s without a token is transient, 300 s of work is the end; both are settings."""
    async with start(token_timeout_s=0.05, attempts_max=2) as contextd:
        await begin(contextd, provider)
        context = await until(contextd, lambda context: context.state == "failed")
        assert context.state_detail["error"]["type"] == "provider_timeout"
    async with start(turn_timeout_s=0.05) as contextd:
        await send(contextd, "again")
        context = await until(contextd, lambda context: context.state == "failed")
        assert context.state_detail["error"]["type"] == "turn_timeout"


async def test_the_model_sees_the_branch_and_only_what_was_said_on_it(
    start: Start, provider: HeldProvider
) -> None:
    """A fork from an earlier message starts a new branch; the old one keeps its messages."""
    async with start() as contextd:
        await begin(contextd, provider, "one")
        provider.say("1", None)
        await until(contextd, idle)
        await send(contextd, "two")
        provider.say("2", None)
        await until(contextd, idle)
        first_answer = (await conversation(contextd))[1]
        await send(contextd, "other", parent_id=first_answer.id)
        provider.say("3", None)
        context = await until(contextd, idle)
        assert context.active_branch != "main"
        assert [m.content for m in provider.requests[-1].history] == ["one", "1", "other"]
        assert [m.content for m in await conversation(contextd)] == ["one", "1", "other", "3"]
        main = await contextd.service.messages.list(
            "a", branch="main", cursor=None, limit=100, include_content=True
        )
        assert [m.content for m in main.items] == ["one", "1", "two", "2"]


async def test_a_long_poll_hears_of_what_another_process_writes(start: Start) -> None:
    """§4.2: a notice that never comes between processes costs latency only."""
    mine = HeldProvider()
    async with start(mine) as one, start(HeldProvider()) as two:
        await one.service.contexts.create(ContextRequest(id="a"))
        await send(one, "Hello")
        mine.say("first ")
        context = await until(two, streaming)
        message = context.open_messages[0].message_id
        waiting = asyncio.ensure_future(
            two.service.content.wait("a", message, start=1, end=None, wait_s=DEADLINE_S)
        )
        await asyncio.sleep(0)
        mine.say("second")
        assert (await waiting).content == "second"
        closing = asyncio.ensure_future(
            two.service.content.wait("a", message, start=2, end=None, wait_s=DEADLINE_S)
        )
        mine.say(None)
        assert (await closing).status == "completed"


async def test_a_fork_from_a_broken_attempt_starts_before_it(
    start: Start, provider: HeldProvider
) -> None:
    """What was forked from has left the conversation; the next attempt must not take its place there."""
    async with start() as contextd:
        await begin(contextd, provider, "one")
        provider.say("half")
        context = await until(contextd, streaming)
        broken = context.open_messages[0].message_id
        await send(contextd, "other", parent_id=broken)
        provider.say(TransientError("provider_unreachable", "gone"), "whole", None, "3", None)
        await until(contextd, idle)
        assert [m.content for m in await conversation(contextd)] == ["one", "other", "3"]
        user, other, _ = await conversation(contextd)
        assert other.parent_id == user.id
        main = await contextd.service.messages.list(
            "a", branch="main", cursor=None, limit=100, include_content=True
        )
        assert [m.content for m in main.items] == ["one", "whole"]


async def test_the_time_that_a_server_was_down_is_not_work_of_the_turn(
    start: Start, provider: HeldProvider
) -> None:
    """§6: 300 s of server work a turn; a restart after a long stop does not use them up."""
    async with start(turn_timeout_s=5) as contextd:
        await begin(contextd, provider)
        await provider.asked.wait()
        ledger = contextd.service.ledger
        later = ledger.clock_ms() + 3_600_000
    async with start(turn_timeout_s=5, clock_ms=lambda: later) as contextd:
        provider.say("whole", None)
        await until(contextd, idle)
        assert [m.content for m in await conversation(contextd)] == ["Hello", "whole"]
