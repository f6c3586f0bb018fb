"""Two processes on one database: what each remembers never says more than is stored."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from contextd.app import Contextd
from contextd.core.context import ContextRequest
from contextd.core.errors import ContextNotFound
from contextd.core.message import SendRequest, TextPayload
from contextd.core.producing import CompleteRequest, OpenRequest, Producer

from .conftest import Start

DEADLINE_S = 20
NO_LOOK_S = 3600  # the processes do not look at each other's work meanwhile


@pytest.fixture
async def two(start: Start) -> AsyncIterator[tuple[Contextd, Contextd]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(start(poll_s=NO_LOOK_S))
        other = await stack.enter_async_context(start(poll_s=NO_LOOK_S))
        await one.service.contexts.create(ContextRequest(id="c"))
        await one.service.producers.open("c", "m", OpenRequest(producer=Producer(id="p", epoch=1)))
        yield one, other


async def write(contextd: Contextd, sequence: int, text: str) -> None:
    producers = contextd.service.producers
    live = await producers.find("c", "m")
    size = len(text.encode())
    await producers.append(live, epoch=1, texts=[text], sizes=[size], sequences=[sequence])


async def pull(contextd: Contextd) -> tuple[str, int, str]:
    found = await contextd.service.content.pull("c", "m", start=0, end=None)
    return found.content, found.head, found.status


async def pull_for_ever(contextd: Contextd) -> None:
    while True:
        await pull(contextd)
        await asyncio.sleep(0.02)


async def complete(contextd: Contextd, final: int) -> None:
    request = CompleteRequest(epoch=1, final_sequence=final)
    await contextd.service.producers.complete("c", "m", request)


async def test_a_close_after_anothers_chunks_is_told_with_all_of_them(
    two: tuple[Contextd, Contextd],
) -> None:
    """Chunks here and there, closed here: the pull says all of it, at once."""
    one, other = two
    await write(one, 1, "one ")
    await write(other, 2, "two ")
    await complete(one, 2)
    assert await pull(one) == await pull(other) == ("one two ", 2, "completed")


async def test_a_close_elsewhere_is_told_after_an_answer_that_says_so(
    two: tuple[Contextd, Contextd],
) -> None:
    """The same request again finds it closed, and so does the pull that follows."""
    one, other = two
    await write(one, 1, "one ")
    await write(other, 2, "two ")
    await complete(other, 2)
    await complete(one, 2)
    assert await pull(one) == ("one two ", 2, "completed")


@pytest.mark.parametrize(
    "asked", ["message", "messages", "context", "chunks", "content", "refused"]
)
async def test_no_pull_is_behind_what_was_answered_before(
    two: tuple[Contextd, Contextd], asked: str
) -> None:
    """Whatever a process read of a message, its next pull knows."""
    one, other = two
    service = one.service
    await write(one, 1, "one ")
    await write(other, 2, "two ")
    await complete(other, 2)
    if asked == "message":
        await service.messages.get("c", "m")
    elif asked == "messages":
        await service.messages.list("c", branch=None, cursor=None, limit=9, include_content=False)
    elif asked == "context":
        await service.contexts.get("c")
    elif asked == "chunks":
        await service.content.chunks("c", "m", start=0, limit=9)
    elif asked == "content":
        await service.content.pull("c", "m", start=2, end=None)
    else:
        with pytest.raises(Exception, match="closed"):
            await write(one, 3, "three")
    assert await pull(one) == ("one two ", 2, "completed")


async def test_a_signal_is_not_ahead_of_the_pull_that_follows_it(
    two: tuple[Contextd, Contextd],
) -> None:
    """A reader that attaches is told of a chunk that the other process wrote, and finds it."""
    one, other = two
    await write(one, 1, "one ")
    await write(other, 2, "two ")
    reader = one.service.streams.subscribe("c", throttle_s=0, heartbeat_s=15, named=False)
    try:
        blocks = [block async for block in one.service.streams.attach(reader, "c", None)]
        assert b'"current_sequence":2' in b"".join(blocks)
        assert (await pull(one))[0] == "one two "
    finally:
        reader.close()


@pytest.mark.parametrize("closed", [True, False])
async def test_a_deleted_context_is_soon_gone_everywhere(
    two: tuple[Contextd, Contextd], closed: bool
) -> None:
    """Nobody watches it at the other process, which never looks: its memory is not believed for long."""
    one, other = two
    await write(other, 1, "secret ")
    if closed:
        await complete(other, 1)
    assert (await pull(other))[0] == "secret "
    await one.service.contexts.delete("c")
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ContextNotFound):
            await pull_for_ever(other)
    assert len(other.service.ledger.tail) == 0


async def test_a_deleted_context_that_was_asked_for_is_gone_at_once(
    two: tuple[Contextd, Contextd],
) -> None:
    """Who heard that it is gone finds no text of it."""
    one, other = two
    await write(other, 1, "secret ")
    await one.service.contexts.delete("c")
    with pytest.raises(ContextNotFound):
        await other.service.contexts.get("c")
    with pytest.raises(ContextNotFound):
        await pull(other)


async def test_a_note_is_told_by_both(two: tuple[Contextd, Contextd]) -> None:
    """A message that is closed from the start is served from memory, with its end."""
    one, other = two
    payload = TextPayload(content="hello")
    sent = await one.service.messages.send("c", SendRequest(payload=payload, respond=False))
    for contextd in (one, other):
        found = await contextd.service.content.pull("c", sent.message_id, start=0, end=None)
        assert (found.content, found.head, found.status) == ("hello", 1, "completed")
