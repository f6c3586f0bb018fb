"""`Client.wrap`: a stream is passed on untouched, and what was passed on is kept."""
# ruff: noqa: PT012 - what is tested is how a loop ends, so the loop is in `raises`

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import anyio
import pytest
from fake_contextd import FakeContextd
from fake_wire import FakeContext

from contextd.client import CancelledByViewerError, Client, ProduceOptions


class SourceBrokeError(Exception):
    """What a source under test raises."""


class Source:
    """Says its items, then raises `error` if there is one, and knows whether it was closed."""

    def __init__(self, *items: str | int | None, error: Exception | None = None) -> None:
        self._items = items
        self._error = error
        self.closed = False

    async def stream(self) -> AsyncGenerator[str]:
        try:
            for item in self._items:
                yield item  # type: ignore[misc]
            if self._error:
                raise self._error
        finally:
            self.closed = True


async def test_pieces_are_passed_on_and_kept(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """When the loop ends, all is durable and the message complete."""
    pieces = [piece async for piece in client.wrap("c", Source("He", "", "llo").stream())]
    assert pieces == ["He", "", "llo"]
    (stored,) = context.messages.values()
    assert (stored.chunks, stored.status) == (["He", "llo"], "completed")


async def test_a_piece_does_not_wait_for_its_storage(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Durability follows: with the server silent, pieces come through all the same."""
    fake.producing.held.clear()
    async with aclosing(client.wrap("c", Source(*"abc").stream(), message_id="m")) as wrapped:
        assert [await anext(wrapped) for _ in range(3)] == ["a", "b", "c"]
        assert context.messages["m"].chunks == []
        fake.producing.held.set()
        assert [piece async for piece in wrapped] == []
    assert context.messages["m"].text == "abc"


async def test_items_of_any_kind_are_passed_on_untouched(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """`text` picks what is kept; None and the empty text are nothing."""

    async def events() -> AsyncIterator[dict[str, str | None]]:
        for text in ("He", None, "", "llo"):
            yield {"delta": text}

    wrapped = client.wrap("c", events(), text=lambda event: event["delta"], kind="thinking")
    assert [event["delta"] async for event in wrapped] == ["He", None, "", "llo"]
    (stored,) = context.messages.values()
    assert (stored.chunks, stored.kind) == (["He", "llo"], "thinking")


async def test_an_error_of_the_source_goes_on_and_is_kept(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The consumer gets the very error after all pieces; the message is failed with its class."""
    error, pieces = SourceBrokeError("secret"), []
    with pytest.raises(SourceBrokeError) as caught:
        async for piece in client.wrap("c", Source("a", "b", error=error).stream()):
            pieces.append(piece)  # noqa: PERF401 - what came before the error has to be kept
    assert caught.value is error
    (stored,) = context.messages.values()
    assert (pieces, stored.chunks, stored.status) == (["a", "b"], ["a", "b"], "failed")
    assert stored.error == {"type": "SourceBrokeError", "message": "SourceBrokeError"}


async def test_an_error_of_the_pick_is_one_of_the_source(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The item that `text` cannot read is not passed on."""
    source = Source("a", "b")
    with pytest.raises(ZeroDivisionError):
        async for _ in client.wrap("c", source.stream(), text=lambda _: str(1 // 0)):
            raise AssertionError("not reached")
    (stored,) = context.messages.values()
    assert (stored.status, source.closed) == ("failed", True)


async def test_stopping_early_leaves_what_was_passed_on_as_cancelled(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A message that says `completed` is one whose source came to its end. The source is closed."""
    source = Source("a", "b", "c")
    async with aclosing(client.wrap("c", source.stream())) as wrapped:
        async for piece in wrapped:
            if piece == "b":
                break
    (stored,) = context.messages.values()
    assert (stored.chunks, stored.status) == (["a", "b"], "failed")
    assert stored.error == {"type": "cancelled", "message": "cancelled"}
    assert source.closed


async def test_a_cancelled_consumer_is_one_that_stops_early(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """As a web framework does it when its client goes away."""

    async def endless() -> AsyncIterator[str]:
        yield "a"
        await asyncio.Event().wait()

    with anyio.CancelScope() as scope:
        async for _ in client.wrap("c", endless()):
            scope.cancel()
    assert scope.cancelled_caught
    (stored,) = context.messages.values()
    assert (stored.chunks, stored.status) == (["a"], "failed")


async def test_a_viewers_cancel_stops_the_consumer(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """So the source is not paid for any longer than it takes to hear of it."""

    async def endless() -> AsyncIterator[str]:
        while True:
            yield "a"
            await asyncio.sleep(0)

    pieces = 0
    with pytest.raises(CancelledByViewerError):
        async for _ in client.wrap("c", endless(), message_id="m"):
            pieces += 1
            if pieces == 3:
                fake.close(context, "m", "cancelled")
    assert pieces >= 3
    assert fake.producing.bodies("fail") == []


async def test_a_source_need_not_be_a_generator(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Anything that can be iterated, such as the stream object of an SDK."""

    class Stream:
        def __init__(self) -> None:
            self.left = ["a", "b"]

        def __aiter__(self) -> "Stream":
            return self

        async def __anext__(self) -> str:
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    assert [piece async for piece in client.wrap("c", Stream())] == ["a", "b"]


def test_options_are_those_of_produce() -> None:
    """Their names and types are written in two places."""
    parameters = inspect.signature(Client.produce).parameters
    options = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert inspect.get_annotations(ProduceOptions) == options
