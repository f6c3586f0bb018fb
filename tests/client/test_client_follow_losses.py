"""`follow` when answers fail, text is lost on the server, and everything at once (§4.4)."""

import asyncio
import random
from contextlib import aclosing

import pytest
from book import Book, is_current, is_state, read
from fake_contextd import FakeContextd, Faults
from fake_wire import FakeContext

from contextd.client import (
    ApiError,
    Client,
    Closed,
    Disconnected,
    Restarted,
    StateChange,
    Text,
)
from contextd.client import errors as client_errors


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

    monkeypatch.setattr(client_errors, "pause_s", noted)
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


@pytest.mark.parametrize("status", [500, 502, 503, 504, 507, 520, 429, 408])
async def test_an_answer_that_may_pass_is_asked_for_again(
    fake: FakeContextd, client: Client, context: FakeContext, status: int
) -> None:
    """On the stream and on pulls alike; the caller hears of the stream's."""
    fake.faults.refuse_streams = [status] * 2
    fake.faults.refuse_pulls = [status] * 3
    fake.append(context, "m", "a")
    book = Book()
    async with aclosing(client.follow(context.id)) as events:
        await read(events, book, is_current)
    assert book.texts == {"m": "a"}
    assert sum(isinstance(event, Disconnected) for event in book.events) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 405, 410, 413, 501])
async def test_an_answer_that_can_never_pass_is_raised_at_once(
    fake: FakeContextd, client: Client, context: FakeContext, status: int
) -> None:
    """With the server's words, from the stream and from a pull."""
    fake.faults.refuse_streams = [status]
    with pytest.raises(ApiError, match="Busy") as caught:
        await read(client.follow(context.id), Book())
    assert (caught.value.status, len(fake.streams)) == (status, 1)
    fake.faults.refuse_pulls = [status]
    fake.append(context, "m", "a")
    with pytest.raises(ApiError, match="Busy") as caught:
        await read(client.follow(context.id), Book())
    assert (caught.value.status, fake.pulls) == (status, [("m", 0)])


async def test_a_defect_that_stays_is_raised_in_the_end(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """500 may pass, but nobody is to wait for ever: after six in a row it is raised."""
    fake.faults.refuse_streams = [500] * 99
    with pytest.raises(ApiError) as caught:
        await read(client.follow(context.id), Book())
    assert (caught.value.status, len(fake.streams)) == (500, client_errors.DOUBTS_MAX)
    fake.faults.refuse_streams = []
    fake.faults.refuse_pulls = [500] * 99
    fake.append(context, "m", "a")
    with pytest.raises(ApiError) as caught:
        await read(client.follow(context.id), Book())
    assert (caught.value.status, len(fake.pulls)) == (500, client_errors.DOUBTS_MAX)


async def test_a_server_that_is_away_is_waited_for_without_end(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """503 is no defect: far more of them than a defect is allowed change nothing."""
    fake.faults.refuse_streams = [503] * 4 * client_errors.DOUBTS_MAX
    fake.append(context, "m", "a")
    book = Book()
    async with aclosing(client.follow(context.id)) as events:
        await read(events, book, is_current)
    assert book.texts == {"m": "a"}


async def test_a_deletion_while_it_was_cut_off_is_told(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """404 of a context that was there: `deleted` is the last event, and the follow ends."""
    fake.faults.cut_streams = [2]
    fake.append(context, "m", "a")
    book = Book()
    async for event in client.follow(context.id):
        book.note(event)
        if isinstance(event, Disconnected):
            fake.contexts.pop("c", None)
    assert book.events[-1] == StateChange(state="deleted", revision=context.revision + 1)
    with pytest.raises(ApiError) as caught:
        await read(client.follow(context.id), Book())
    assert caught.value.code == "context_not_found"


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
