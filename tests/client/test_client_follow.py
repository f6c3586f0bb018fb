"""`follow`: what is told, in which order, and what it costs (§4.4)."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import pytest
from book import Book, is_current, is_state, read
from fake_contextd import FakeContextd
from fake_wire import FakeContext, signal_json

from contextd.client import (
    ApiError,
    Client,
    Closed,
    Disconnected,
    StateChange,
    Text,
)
from contextd.client.follow import Levels
from contextd.core.message import MessageStatus, Pull
from contextd.core.signal import ContentDelta, Signal


async def test_attaching_tells_what_is_there_then_that_it_is_current(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The snapshot's text comes before its state, and `Current` after both (§4.1)."""
    fake.append(context, "m", "He", "llo")
    fake.close(context, "m")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
    kinds = [type(event).__name__ for event in book.events]
    assert kinds == ["Text", "Closed", "StateChange", "Current"]
    assert book.texts == {"m": "Hello"}
    assert book.closed == {"m": "completed"}


async def test_live_text_is_told_as_it_comes(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Each append after `Current` is told; the state that ends a turn comes after all its text."""
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.append(context, "m", "one ")
        await read(events, book, lambda event: isinstance(event, Text))
        fake.append(context, "m", "two")
        fake.append(context, "n", "hm", kind="thinking")
        fake.close(context, "m")
        fake.close(context, "n", "cancelled")
        fake.set_state(context, "processing_llm_response")
        await read(events, book, is_state("processing_llm_response"))
    assert book.texts == {"m": "one two", "n": "hm"}
    assert book.closed == {"m": "completed", "n": "cancelled"}


async def test_a_message_without_text_is_only_closed(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A turn that fails before its first chunk leaves an empty message (§6)."""
    fake.append(context, "m")
    fake.close(context, "m", "failed")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
    assert book.texts == {}
    assert book.closed == {"m": "failed"}


async def test_repeated_signals_repeat_no_text_and_no_end(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Signals are levels: every one twice is as good as once."""
    fake.faults.repeat = 3
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        for word in ["a", "b", "c"]:
            fake.append(context, "m", word)
        fake.close(context, "m")
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
        fake.set_state(context, "idle")
        await read(events, book, is_state("idle"))
    assert book.texts == {"m": "abc"}
    assert [event for event in book.events if isinstance(event, Closed)] == [
        Closed(message_id="m", role="assistant", kind="text", status="completed", final_sequence=3)
    ]


async def test_a_late_signal_of_a_closed_message_tells_nothing(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A position below the end is looked into, and found to be old news."""
    fake.append(context, "m", "a", "b")
    late = signal_json(context, context.messages["m"]) | {"current_sequence": 1}
    fake.close(context, "m")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        for queue in context.readers:
            queue.put_nowait(late)
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
    assert fake.pulls == [("m", 0), ("m", 2)]
    assert sum(isinstance(event, Closed) for event in book.events) == 1


async def test_lost_deltas_cost_no_text(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The completion alone is enough to have everything."""
    fake.faults.lose = lambda signal: signal["type"] == "content_delta"
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.append(context, "m", *"abcdef")
        fake.close(context, "m")
        await read(events, book, lambda event: isinstance(event, Closed))
    assert book.texts == {"m": "abcdef"}


async def test_a_signal_for_what_is_held_asks_nothing(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Deltas at the held position and repeated ends cost no pull."""
    fake.append(context, "m", "x")
    fake.append(context, "done", "y")
    fake.close(context, "done")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        asked = list(fake.pulls)
        fake.append(context, "m")
        fake.close(context, "done")
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
    assert fake.pulls == asked
    assert sorted(asked) == [("done", 0), ("m", 0)]


async def test_a_cut_connection_comes_back_with_its_cursor(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The last `id:` comes back as Last-Event-ID, the gap is told, and the caller hears of it."""
    fake.faults.cut_streams = [4]  # the snapshot's two, then two live ones
    book = Book()
    async with aclosing(client.follow("c", cursor="f-0")) as events:
        await read(events, book, is_current)
        fake.append(context, "m", "one ")
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
        cursor = f"f-{context.revision}"
        fake.append(context, "m", "two")
        fake.close(context, "m")
        await read(events, book, is_current)
    assert fake.streams == ["f-0", cursor]
    assert sum(isinstance(event, Disconnected) for event in book.events) == 1
    assert book.texts == {"m": "one two"}
    assert book.closed == {"m": "completed"}


async def test_a_state_is_told_once(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Attaching again repeats the snapshot's state on the wire, but not to the caller."""
    fake.faults.end_streams = [2]
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.disconnect(context)
        await read(events, book, is_current)
    assert len(fake.streams) == 2
    assert [event for event in book.events if isinstance(event, StateChange)] == [
        StateChange(state="idle", revision=1)
    ]


async def test_a_clean_end_with_retry_is_followed_again(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A server that stops says when to come back (§4.2), and the reader does."""
    fake.faults.end_streams = [2]
    fake.append(context, "m", "x")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        lost = await read(events, book, lambda event: isinstance(event, Disconnected))
        await read(events, book, is_current)
    assert isinstance(lost, Disconnected)
    assert lost.reason == "the server ended the stream"
    assert lost.retry_s == 0.025
    assert book.texts == {"m": "x"}


async def test_a_silent_connection_counts_as_dead(fake: FakeContextd, context: FakeContext) -> None:
    """After 2.5 heartbeats without a byte the reader attaches anew."""
    fake.faults.silent_streams = 1
    book = Book()
    async with (
        Client(fake.url, heartbeat_s=0.1) as client,
        aclosing(client.follow(context.id)) as events,
    ):
        await read(events, book, is_current)
    assert len(fake.streams) == 2
    assert book.events[0] == Disconnected(reason="ReadTimeout", retry_s=book.events[0].retry_s)


async def test_an_unknown_context_is_raised(fake: FakeContextd, client: Client) -> None:
    """404 before the stream starts (§4.1)."""
    with pytest.raises(ApiError) as caught:
        await read(client.follow("nowhere"), Book())
    assert (caught.value.status, caught.value.code) == (404, "context_not_found")
    assert len(fake.streams) == 0


async def test_a_deletion_ends_the_follow(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """`deleted` is the last event; pulls that meet the deletion are no error."""
    fake.faults.hold_pulls = asyncio.Event()
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.append(context, "m", "never seen")
        reading = asyncio.create_task(read(events, book))
        await fake.until(lambda: fake.pulls == [("m", 0)])
        fake.faults.refuse_pulls = [503]
        fake.delete(context)
        fake.faults.hold_pulls.set()
        assert await reading is None
    assert isinstance(book.events[-1], StateChange)
    assert book.events[-1].state == "deleted"


def delta(position: int) -> ContentDelta:
    return ContentDelta(
        context_id="c",
        message_id="m",
        current_sequence=position,
        role="assistant",
        kind="text",
        timestamp="",
    )


def answer(from_sequence: int, content: str) -> Pull:
    """A chunk a character."""
    sequence = from_sequence + len(content)
    return Pull(
        context_id="c",
        message_id="m",
        from_sequence=from_sequence,
        sequence=sequence,
        content=content,
        head_sequence=sequence,
        status=MessageStatus.STREAMING,
        final=False,
    )


async def test_what_a_pull_brought_already_is_not_pulled_again() -> None:
    """A signal that arrives during a pull which brings its text costs nothing more."""
    pulling, noted = asyncio.Event(), asyncio.Event()
    pulls: list[int] = []

    async def signals() -> AsyncGenerator[Signal]:
        yield delta(1)
        await pulling.wait()
        yield delta(2)
        noted.set()

    async def pull_from(_: str, from_sequence: int) -> Pull:
        pulls.append(from_sequence)
        pulling.set()
        await noted.wait()
        return answer(0, "ab")

    levels = Levels({}, pull_from)
    watch = asyncio.create_task(levels.watch(signals()))
    told = [event async for event in levels.events(watch)]
    assert [event.content for event in told if isinstance(event, Text)] == ["ab"]
    assert pulls == [0]


async def test_an_answer_from_another_sequence_is_not_appended() -> None:
    """Only what begins where the reader is can go on there; it asks again (§4.4)."""
    answers = [answer(0, "a"), answer(0, "ab"), answer(1, "b")]

    async def signals() -> AsyncGenerator[Signal]:
        yield delta(1)
        await first.wait()
        yield delta(2)
        await asyncio.Event().wait()

    async def pull_from(_: str, __: int) -> Pull:
        first.set()
        return answers.pop(0)

    first = asyncio.Event()
    levels = Levels({}, pull_from)
    watch = asyncio.create_task(levels.watch(signals()))
    texts: list[str] = []
    async with aclosing(levels.events(watch)) as events:
        async for event in events:
            texts += [event.content] if isinstance(event, Text) else []
            if not answers:
                break
    watch.cancel()
    assert texts == ["a", "b"]


async def test_one_pull_at_a_time_for_a_message_but_several_messages_at_once() -> None:
    """Concurrency is across messages, at most eight, and never within one."""
    ids = [f"m{number}" for number in range(11)]
    pulling: Counter[str] = Counter()
    most: list[int] = []
    gate = asyncio.Event()

    async def signals() -> AsyncGenerator[Signal]:
        for id_ in ids:
            yield msgspec.structs.replace(delta(1), message_id=id_)
        await gate.wait()
        for id_ in ids:
            yield msgspec.structs.replace(delta(2), message_id=id_)

    async def pull_from(message_id: str, held: int) -> Pull:
        pulling[message_id] += 1
        most.append(pulling.total())
        assert pulling[message_id] == 1
        if len(most) == 8:
            gate.set()
        await gate.wait()
        await asyncio.sleep(0)
        pulling[message_id] -= 1
        return answer(held, "xy"[held])

    levels = Levels({}, pull_from)
    watch = asyncio.create_task(levels.watch(signals()))
    told = [event async for event in levels.events(watch)]
    assert max(most) == 8
    for id_ in ids:
        texts = [e.content for e in told if isinstance(e, Text) and e.message_id == id_]
        assert texts == ["x", "y"]


async def test_long_text_comes_in_several_pulls(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """`sequence` below `head_sequence` means: pull again (§3.3)."""
    fake.faults.chunks_per_pull = 3
    fake.append(context, "m", *"abcdefgh")
    fake.close(context, "m")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
    assert fake.pulls == [("m", 0), ("m", 3), ("m", 6)]
    assert book.texts == {"m": "abcdefgh"}


async def test_what_the_caller_holds_is_not_told_again(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """With `held` the text goes on from there."""
    fake.append(context, "m", "a", "b", "c")
    book = Book()
    book.sequences["m"] = 2
    async with aclosing(client.follow("c", held={"m": 2})) as events:
        await read(events, book, is_current)
    assert book.texts == {"m": "c"}
    assert fake.pulls == [("m", 2)]


async def test_a_reader_that_stops_leaves_nothing_behind(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Closing the iterator closes the connection and ends its task."""
    before = asyncio.all_tasks()
    async with aclosing(client.follow("c")) as events:
        await read(events, Book(), is_current)
        assert len(context.readers) == 1
    own = {task for task in asyncio.all_tasks() - before if "watch" in repr(task)}
    assert own == set()
    while context.readers:
        await asyncio.sleep(0)
