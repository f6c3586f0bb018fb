"""`follow` where others produce: open and empty, several at once, taken from a silent producer."""

from contextlib import aclosing

import pytest
from book import Book, is_current, is_state, read
from fake_contextd import FakeContextd
from fake_wire import FakeContext

from contextd.client import Client, Closed, Current, StateChange, Text, follow
from contextd.client import errors as client_errors


async def test_an_open_message_without_text_is_nothing_to_tell(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A delta at 0, in the snapshot and live: no pull, no event, and what comes next is told."""
    fake.append(context, "m")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        fake.append(context, "n")
        fake.set_state(context, "producing")
        await read(events, book, is_state("producing"))
        assert fake.pulls == []
        fake.append(context, "n", "x")
        await read(events, book, lambda event: isinstance(event, Text))
        fake.close(context, "m")
        await read(events, book, lambda event: isinstance(event, Closed))
    assert book.texts == {"n": "x"}
    assert book.closed == {"m": "completed"}
    assert [type(event) for event in book.events] == [
        StateChange,
        Current,
        StateChange,
        Text,
        Closed,
    ]


async def test_several_open_messages_are_told_side_by_side(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """More than are pulled at once, written in turns: each exact, each closed as it was."""
    ids = [f"m{number}" for number in range(follow.PULLS_MAX + 3)]
    statuses = ["completed", "interrupted", "failed", "cancelled"]
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
        for step in range(5):
            for id_ in ids:
                fake.append(context, id_, f"{id_}-{step} ")
        for number, id_ in enumerate(ids):
            fake.close(context, id_, statuses[number % 4])
        fake.set_state(context, "failed")
        await read(events, book, is_state("failed"))
    assert book.texts == {id_: "".join(f"{id_}-{step} " for step in range(5)) for id_ in ids}
    assert book.closed == {id_: statuses[number % 4] for number, id_ in enumerate(ids)}


async def test_a_pull_that_is_behind_its_signal_is_asked_again_after_a_pause(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have less for a moment: a growing pause for each empty answer."""
    failures: list[int] = []
    pause_s = client_errors.pause_s

    def noted(count: int, asked_s: float = 0.0) -> float:
        failures.append(count)
        if count == 5:
            fake.faults.chunks_per_pull = 1
        return pause_s(count, asked_s)

    monkeypatch.setattr(client_errors, "pause_s", noted)
    fake.faults.chunks_per_pull = 0
    fake.append(context, "m", "a", "b")
    book = Book()
    async with aclosing(client.follow("c")) as events:
        await read(events, book, is_current)
    assert failures == [1, 2, 3, 4, 5]
    assert fake.pulls == [("m", 0)] * 6 + [("m", 1)]
    assert book.texts == {"m": "ab"}
