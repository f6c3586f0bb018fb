"""`follow`: exact text whatever happens to connections, signals and answers (§4.4)."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest
from fake_contextd import FakeContextd, Faults
from fake_wire import FakeContext, signal_json

from contextd.client import (
    ApiError,
    Client,
    Closed,
    Current,
    Disconnected,
    Event,
    Restarted,
    StateChange,
    Text,
)
from contextd.client import errors as client_errors
from contextd.client.follow import Levels
from contextd.core.message import MessageStatus, Pull
from contextd.core.signal import ContentDelta, Signal


class Book:
    """What a reader has after all events: the way a program would use them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.texts: dict[str, str] = {}
        self.sequences: dict[str, int] = {}
        self.closed: dict[str, str] = {}

    def note(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Text():
                assert event.from_sequence == self.sequences.get(event.message_id, 0)
                assert event.sequence > event.from_sequence
                assert event.message_id not in self.closed
                self.texts[event.message_id] = self.texts.get(event.message_id, "") + event.content
                self.sequences[event.message_id] = event.sequence
            case Closed():
                assert event.message_id not in self.closed
                assert self.sequences.get(event.message_id, 0) == event.final_sequence
                self.closed[event.message_id] = event.status
            case Restarted():
                self.texts.pop(event.message_id)
                self.sequences.pop(event.message_id)
                self.closed.pop(event.message_id, None)
            case _:
                pass


async def read(
    events: AsyncGenerator[Event], book: Book, until: Callable[[Event], bool] = lambda _: False
) -> Event | None:
    """Notes events to the first for which `until` is true, or to the end."""
    async for event in events:
        book.note(event)
        if until(event):
            return event
    return None


def is_current(event: Event) -> bool:
    return isinstance(event, Current)


def is_state(state: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StateChange) and event.state == state


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are real, but short."""
    monkeypatch.setattr(client_errors, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(client_errors, "BACKOFF_MAX_S", 0.01)


@pytest.fixture
def context(fake: FakeContextd) -> FakeContext:
    return fake.add("c")


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


async def test_a_refused_stream_is_tried_again(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """503 and 502 pass; the caller hears of each."""
    fake.faults.refuse_streams = [503, 502]
    book = Book()
    async with aclosing(client.follow(context.id)) as events:
        await read(events, book, is_current)
    lost = [event.reason for event in book.events if isinstance(event, Disconnected)]
    assert lost == ["Busy (overloaded)"] * 2


async def test_retry_after_of_a_refused_pull_is_honoured(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait before the next pull is at least what the server asked for."""
    waits: list[float] = []
    monkeypatch.setattr(client_errors, "WAIT_ASKED_MAX_S", 0.01)
    pause_s = client_errors.pause_s

    def noted(failures: int, asked_s: float = 0.0) -> float:
        waits.append(asked_s)
        return pause_s(failures, asked_s)

    monkeypatch.setattr("contextd.client.follow.pause_s", noted)
    fake.faults.refuse_pulls = [503]
    fake.faults.retry_after = "7"
    fake.append(context, "m", "x")
    book = Book()
    async with aclosing(client.follow(context.id)) as events:
        await read(events, book, is_current)
    assert waits == [7.0]
    assert book.texts == {"m": "x"}


async def test_broken_and_refused_pulls_are_asked_again(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A pull that breaks off in the middle, or meets 503, is repeated from the same sequence."""
    fake.faults.cut_pulls = 2
    fake.faults.refuse_pulls = [503, 429, 504]
    fake.append(context, "m", "a", "b")
    fake.close(context, "m")
    book = Book()
    async with aclosing(client.follow(context.id)) as events:
        await read(events, book, is_current)
    assert fake.pulls == [("m", 0)] * 6
    assert book.texts == {"m": "ab"}


async def test_an_error_that_will_not_pass_is_raised(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """500 on a pull and 403 on the stream end the follow with the server's words."""
    fake.faults.refuse_pulls = [500]
    fake.append(context, "m", "a")
    with pytest.raises(ApiError) as caught:
        await read(client.follow(context.id), Book())
    assert caught.value.status == 500
    fake.faults.refuse_streams = [403]
    with pytest.raises(ApiError) as caught:
        await read(client.follow(context.id), Book())
    assert caught.value.status == 403


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


async def test_a_head_below_what_is_held_starts_over(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A server that came back with an older database: told text is taken back, then told anew."""
    fake.append(context, "m", "lost", "lost", "lost")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        context.messages["m"].chunks = ["kept "]
        fake.append(context, "m", "new")
        await read(events, book, lambda event: isinstance(event, Text))
        assert Restarted(message_id="m") in book.events
        fake.close(context, "m")
        await read(events, book, lambda event: isinstance(event, Closed))
    assert book.texts == {"m": "kept new"}


async def test_text_lost_between_signal_and_pull_starts_over(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Held 2, signalled 3, but only 1 is left when the pull comes: no signal will repeat that."""
    fake.append(context, "m", "a", "b")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.append(context, "m", "c")
        context.messages["m"].chunks = ["z"]
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
    assert book.texts == {"m": "z"}


async def test_a_closed_message_that_shrank_starts_over(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The same for a message that was closed: it is told and closed again."""
    fake.append(context, "m", "a", "b")
    fake.close(context, "m")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        context.messages["m"].chunks = ["c"]
        fake.close(context, "m", "interrupted")
        await read(events, book, lambda event: isinstance(event, Closed))
    assert book.texts == {"m": "c"}
    assert book.closed == {"m": "interrupted"}


async def test_a_message_that_is_gone_is_taken_back(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """404 on the message of a living context: what was told of it is void, and nothing hangs."""
    fake.append(context, "m", "a")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        message = fake.append(context, "m")
        del context.messages["m"]
        message.chunks = ["a", "b"]
        for queue in context.readers:
            queue.put_nowait(
                {"type": "content_delta", "context_id": "c", "message_id": "m"}
                | {"current_sequence": 2, "role": "assistant", "kind": "text", "timestamp": ""}
            )
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
    assert Restarted(message_id="m") in book.events
    assert book.texts == {}


async def test_a_goal_that_can_no_longer_be_reached_gives_way_to_a_newer_one(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Signalled 5, then the database shrank to 1 before anything was pulled: 1 is enough."""
    fake.append(context, "m", *"abcde")
    fake.faults.hold_pulls = asyncio.Event()
    book = Book()
    async with aclosing(client.follow("c")) as events:
        reading = asyncio.create_task(read(events, book, is_current))
        await fake.until(lambda: bool(fake.pulls))
        context.messages["m"].chunks = ["z"]
        fake.append(context, "m")
        fake.faults.hold_pulls.set()
        await reading
    assert book.texts == {"m": "z"}


async def test_an_end_is_told_when_the_server_confirms_it(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """After `message_completed` the reader pulls until `final`, and the state waits for it (§4.4)."""
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.faults.stale_pulls = 3
        fake.append(context, "m", "x")
        fake.close(context, "m")
        fake.set_state(context, "failed")
        await read(events, book, is_state("failed"))
    assert book.closed == {"m": "completed"}


async def test_what_a_pull_brought_already_is_not_pulled_again() -> None:
    """A signal that arrives during a pull which brings its text costs nothing more."""
    pulling, noted = asyncio.Event(), asyncio.Event()
    pulls: list[int] = []

    def delta(position: int) -> ContentDelta:
        return ContentDelta(
            context_id="c",
            message_id="m",
            current_sequence=position,
            role="assistant",
            kind="text",
            timestamp="",
        )

    async def signals() -> AsyncGenerator[Signal]:
        yield delta(1)
        await pulling.wait()
        yield delta(2)
        noted.set()

    async def pull_from(message_id: str, from_sequence: int) -> Pull:
        pulls.append(from_sequence)
        pulling.set()
        await noted.wait()
        return Pull(
            context_id="c",
            message_id=message_id,
            from_sequence=from_sequence,
            sequence=2,
            content="ab",
            head_sequence=2,
            status=MessageStatus.STREAMING,
            final=False,
        )

    levels = Levels({}, pull_from)
    watch = asyncio.create_task(levels.watch(signals()))
    told = [event async for event in levels.events(watch)]
    assert [event.content for event in told if isinstance(event, Text)] == ["ab"]
    assert pulls == [0]


async def test_one_pull_at_a_time_for_a_message_but_several_messages_at_once(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Concurrency is across messages, at most eight, and never within one."""
    gate = fake.faults.hold_pulls = asyncio.Event()
    ids = [f"m{number}" for number in range(11)]
    for id_ in ids:
        fake.append(context, id_, "x")
    book = Book()
    async with aclosing(client.follow("c", throttle_ms=0)) as events:
        reading = asyncio.create_task(read(events, book, is_current))
        await fake.until(lambda: len(fake.pulls) == 8)
        for id_ in ids:
            fake.append(context, id_, "y")
        gate.set()
        await reading
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
    assert set(fake.pulling_max.values()) == {1}
    assert book.texts == dict.fromkeys(ids, "xy")


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
    while context.readers:
        await asyncio.sleep(0)
    own = {task for task in asyncio.all_tasks() - before if "watch" in repr(task)}
    assert own == set()


@pytest.mark.parametrize("seed", range(6))
async def test_any_mixture_of_faults_leaves_exact_text(
    fake: FakeContextd, client: Client, context: FakeContext, seed: int
) -> None:
    """Cuts, repeats, losses, refusals and small answers in a random order: the text is the text."""
    dice = random.Random(seed)
    fake.faults = Faults(
        cut_streams=[dice.randint(0, 9) for _ in range(5)],
        end_streams=[dice.randint(3, 9) for _ in range(2)],
        refuse_streams=[dice.choice([429, 502, 503]) for _ in range(2)],
        refuse_pulls=[dice.choice([429, 503, 504]) for _ in range(4)],
        cut_pulls=dice.randint(0, 3),
        repeat=dice.randint(1, 3),
        lose=lambda told: told["type"] == "content_delta" and dice.random() < 0.4,
        chunks_per_pull=dice.randint(1, 4),
    )
    book = Book()

    async def write() -> None:
        left = {id_: dice.randint(1, 30) for id_ in "xyz"}
        for id_ in left:
            fake.append(context, id_)
        while left:
            id_ = dice.choice(list(left))
            left[id_] -= 1
            if left[id_]:
                fake.append(context, id_, dice.choice(["é ", "\n", "word ", "\u2028", "🙂"]))
            else:
                fake.close(context, id_)
                del left[id_]
            await asyncio.sleep(dice.choice([0, 0, 0.001, 0.003]))
        fake.set_state(context, "failed")

    async with aclosing(client.follow("c", cursor="f-0")) as events:
        writing = asyncio.create_task(write())
        await read(events, book, is_state("failed"))
        await writing
    expected = {id_: message.text for id_, message in context.messages.items() if message.text}
    assert book.texts == expected
    assert book.closed == dict.fromkeys("xyz", "completed")
