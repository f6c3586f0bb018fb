"""`Client.produce` and `follow` with a real server: restarts, cancels, several at once."""
# ruff: noqa: PT012 - what is tested is how a block ends, so the block is in `raises`

import asyncio
import re
from contextlib import aclosing
from pathlib import Path

import pytest
from book import Book, is_current, is_state, read
from serving import Server

from contextd.client import (
    ApiError,
    CancelledByViewerError,
    Client,
    Closed,
    MessageClosedError,
    TakenOverError,
    Text,
    Usage,
)

SETTINGS = {"scripted_rate": 0}


@pytest.fixture
async def context_id(real: Client) -> str:
    return (await real.create_context()).id


async def test_a_message_is_written_and_read(real: Client, context_id: str) -> None:
    """Text of every kind comes back as it was written, and the end says what it was told."""
    texts = ["Hé", "😀\n", "\u202e\x01", "a" * 200_000, "é€😀" * 50_000]
    async with real.produce(context_id, metadata={"job": 7}, media_type="text/html") as message:
        for text in texts:
            await message.write(text)
        message.finish_reason = "stop"
        message.usage = Usage(prompt_tokens=1, completion_tokens=2)
        await message.flush()
        assert await message.stored_text() == "".join(texts)
    stored = await real.get_message(context_id, message.id)
    assert (stored.status, stored.finish_reason, stored.usage) == (
        "completed",
        "stop",
        message.usage,
    )
    assert (stored.metadata, stored.media_type, stored.epoch) == ({"job": 7}, "text/html", 1)
    assert (await real.get_context(context_id)).state == "idle"


async def test_the_server_may_restart_while_a_message_is_written(tmp_path: Path) -> None:
    """Killed and started again with writes going on: all the text is there, once."""
    server = Server(tmp_path / "contextd.db", settings=SETTINGS).start()
    port = server.port
    try:
        async with Client(server.url) as client:
            context_id = (await client.create_context()).id
            async with client.produce(context_id) as message:
                for number in range(300):
                    await message.write(f"{number} ")
                    if number % 50 == 0:
                        await message.flush()
                    if number == 100:
                        await asyncio.to_thread(server.kill)
                        server = Server(tmp_path / "contextd.db", settings=SETTINGS, port=port)
                        starting = asyncio.create_task(asyncio.to_thread(server.start))
                        await message.write("while it is away ")
                        await starting
            text = (await client.pull(context_id, message.id)).content
            assert text.replace("while it is away ", "") == "".join(f"{n} " for n in range(300))
            assert text.count("while it is away ") == 1
            assert (await client.get_message(context_id, message.id)).status == "completed"
    finally:
        server.stop()


async def test_a_viewers_cancel_ends_all_producers(real: Client, context_id: str) -> None:
    """Each hears of it at its next flush; what was written stays, the context is idle."""
    with pytest.raises(CancelledByViewerError):
        async with real.produce(context_id) as first, real.produce(context_id) as second:
            for message in (first, second):
                await message.write("kept")
                await message.flush()
            await real.cancel(context_id)
            for message in (first, second):
                await message.write("lost")
                with pytest.raises(CancelledByViewerError) as caught:
                    await message.flush()
                assert caught.value.final_sequence == 1
    assert (await real.get_context(context_id)).state == "idle"
    assert {m.status.value async for m in real.messages(context_id)} == {"cancelled"}


async def test_a_silent_producer_loses_its_message(tmp_path: Path) -> None:
    """Unless it gives signs of life."""
    settings = {**SETTINGS, "producer_silence_s": 1}
    with Server(tmp_path / "contextd.db", settings=settings) as server:
        async with Client(server.url) as client:
            context_id = (await client.create_context()).id
            async with client.produce(context_id, sign_of_life_s=0.1) as living:
                with pytest.raises(MessageClosedError) as caught:
                    async with client.produce(context_id) as silent:
                        while (
                            await client.get_message(context_id, silent.id)
                        ).completed_at is None:
                            await asyncio.sleep(0.05)
                        await silent.write("late")
                assert caught.value.message_status == "interrupted"
                await living.write("there")
            assert (await client.get_message(context_id, living.id)).status == "completed"


async def test_racing_producers_leave_one_text(real: Client, context_id: str) -> None:
    """Four take one message from each other: each chunk is of one of them, and one completes it."""

    async def race(name: str) -> str:
        async with real.produce(context_id, message_id="race") as message:
            for number in range(100):
                await message.write(f"{name}{number} ")
        return name

    outcomes = await asyncio.gather(*map(race, "abcd"), return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert len(winners) == 1
    assert all(isinstance(error, TakenOverError | MessageClosedError) for error in refused)
    text = (await real.pull(context_id, "race")).content
    assert text.endswith("".join(f"{winners[0]}{number} " for number in range(100)))
    for name in "abcd":
        numbers = [int(number) for number in re.findall(rf"{name}(\d+)", text)]
        assert numbers == list(range(len(numbers)))


async def test_a_crashed_producer_goes_on(real: Client, context_id: str) -> None:
    """With the same message id, from the text that is stored, in the next epoch."""
    produced = real.produce(context_id, message_id="job")
    crashed = await produced.__aenter__()
    await crashed.write("one ")
    await crashed.flush()
    async with real.produce(context_id, message_id="job") as message:
        assert (message.epoch, message.sequence) == (2, 1)
        assert await message.stored_text() == "one "
        await message.write("two")
    with pytest.raises(TakenOverError):
        await crashed.write("never")
        await crashed.flush()
    with pytest.raises(TakenOverError):
        await produced.__aexit__(None, None, None)
    assert (await real.pull(context_id, "job")).content == "one two"
    with pytest.raises(MessageClosedError) as caught:
        await real.produce(context_id, message_id="job").__aenter__()
    assert (caught.value.message_status, caught.value.final_sequence) == ("completed", 2)


async def test_a_turn_keeps_producers_out(real: Client, context_id: str) -> None:
    """409 `context_busy` on opening."""
    await real.send(context_id, '{"script": [{"text": "x"}, {"delay_ms": 60000}]}')
    with pytest.raises(ApiError) as caught:
        await real.produce(context_id).__aenter__()
    assert caught.value.code == "context_busy"
    await real.cancel(context_id)


async def test_deleting_the_context_ends_its_producer(real: Client, context_id: str) -> None:
    """404 at the next flush and at the end."""
    with pytest.raises(ApiError) as caught:
        async with real.produce(context_id) as message:
            await real.delete_context(context_id)
            await message.write("x")
    assert caught.value.code == "context_not_found"


async def test_follow_tells_several_open_messages(real: Client, context_id: str) -> None:
    """Opened empty, written in turns, closed in different ways: each exact, then `idle`."""
    book = Book()
    async with aclosing(real.follow(context_id)) as events:
        await read(events, book, is_current)
        one, two = real.produce(context_id), real.produce(context_id, kind="thinking")
        first, second = await one.__aenter__(), await two.__aenter__()
        await read(events, book, is_state("producing"))
        for number in range(50):
            await first.write(f"{number} ")
            await second.write(f"{-number} ")
        await second.flush()
        await read(events, book, lambda event: isinstance(event, Text))
        await first.complete()
        await second.fail("model_error")
        await one.__aexit__(None, None, None)
        await two.__aexit__(None, None, None)
        async with real.produce(context_id) as empty:
            pass
        ended = {first.id, second.id, empty.id}
        await read(events, book, lambda _: book.closed.keys() == ended)
        await read(events, book, is_state("idle"))
    assert book.texts == {
        first.id: "".join(f"{number} " for number in range(50)),
        second.id: "".join(f"{-number} " for number in range(50)),
    }
    assert book.closed == {first.id: "completed", second.id: "failed", empty.id: "completed"}
    kinds = {event.message_id: event.kind for event in book.events if isinstance(event, Closed)}
    assert kinds == {first.id: "text", second.id: "thinking", empty.id: "text"}


async def test_a_context_is_changed(real: Client, context_id: str) -> None:
    """Named fields only; None takes one back."""
    changed = await real.update_context(context_id, title="Tea", metadata={"a": 1, "b": 2})
    assert (changed.title, changed.metadata) == ("Tea", {"a": 1, "b": 2})
    changed = await real.update_context(context_id, title=None, metadata={"a": None})
    assert (changed.title, changed.metadata) == (None, {"b": 2})
    with pytest.raises(ApiError) as caught:
        await real.update_context(context_id, colour="red")
    assert caught.value.code == "invalid_request"
