"""`Client.produce`: what it asks for, and when writing, flushing and leaving go on (§7)."""
# ruff: noqa: PT012 - what is tested is how a block ends, so the block is in `raises`

import asyncio

import pytest
from fake_contextd import FakeContextd
from fake_wire import FakeContext

from contextd.client import ApiError, Client, Usage, outbox


async def test_a_block_writes_one_message(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Opened on entering, each text a chunk, completed with the number of chunks on leaving."""
    async with client.produce("c", metadata={"job": 7}, media_type="text/markdown") as message:
        await message.write("He")
        await message.write("")
        await message.write("llo")
        message.finish_reason = "stop"
        message.usage = Usage(prompt_tokens=1, completion_tokens=2)
    stored = context.messages[message.id]
    assert (stored.chunks, stored.status, stored.finish_reason) == (
        ["He", "llo"],
        "completed",
        "stop",
    )
    assert (message.context_id, message.epoch, message.sequence) == ("c", 1, 2)
    (opening,) = fake.producing.bodies("open")
    assert opening == {
        "producer": {"id": stored.producer_id},
        "role": "assistant",
        "kind": "text",
        "metadata": {"job": 7},
        "media_type": "text/markdown",
    }
    assert fake.producing.bodies("complete") == [
        {
            "epoch": 1,
            "final_sequence": 2,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        }
    ]
    assert context.state == "idle"


async def test_what_the_caller_names_is_asked_for(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Its own ids, epoch, role, kind and place in the tree."""
    named = client.produce(
        "c",
        message_id="m",
        role="tool",
        kind="thinking",
        producer_id="worker-1",
        epoch=4,
        branch="b",
        parent_id="p",
    )
    async with named as message:
        assert (message.id, message.epoch) == ("m", 4)
    assert fake.producing.bodies("open") == [
        {
            "producer": {"id": "worker-1", "epoch": 4},
            "role": "tool",
            "kind": "thinking",
            "branch": "b",
            "parent_id": "p",
        }
    ]


async def test_what_gathers_during_a_request_goes_out_as_one(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """No timer: the first text goes at once, the next batch is all that came meanwhile."""
    fake.producing.held.clear()
    async with client.produce("c") as message:
        await message.write("a")
        await fake.until(lambda: len(fake.producing.bodies("chunks")) == 1)
        await asyncio.gather(*(message.write(text) for text in "bcd"))
        fake.producing.held.set()
        await message.flush()
        assert message.sequence == 4
    assert fake.producing.batches() == [["a"], ["b", "c", "d"]]


async def test_flush_returns_when_all_is_durable(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Not before the answer, and at once where there is nothing to wait for."""
    async with client.produce("c") as message:
        await message.flush()
        fake.producing.held.clear()
        await message.write("a")
        flushing = asyncio.create_task(message.flush())
        await fake.until(lambda: bool(fake.producing.bodies("chunks")))
        assert not flushing.done()
        assert message.sequence == 0
        fake.producing.held.set()
        await flushing
        assert (message.sequence, context.messages[message.id].chunks) == (1, ["a"])


async def test_writing_waits_while_too_much_is_not_durable(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: a slow server slows the writer, and nothing is lost."""
    monkeypatch.setattr(outbox, "HELD_CHUNKS_MAX", 3)
    fake.producing.held.clear()
    written: list[str] = []
    async with client.produce("c") as message:

        async def write() -> None:
            for text in "abcdefgh":
                await message.write(text)
                written.append(text)

        writing = asyncio.create_task(write())
        await fake.until(lambda: bool(fake.producing.bodies("chunks")))
        _, waiting = await asyncio.wait([writing], timeout=0.05)
        assert waiting
        assert len(written) == 3
        fake.producing.held.set()
        await writing
    assert context.messages[message.id].text == "abcdefgh"
    assert max(map(len, fake.producing.batches())) <= 3


async def test_a_huge_text_is_cut_and_stays_in_one_piece(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is far more than is held, and another writes as soon as there is room."""
    monkeypatch.setattr(outbox, "HELD_CHUNKS_MAX", 1)
    huge = "😀é€a" * 100_000
    async with client.produce("c") as message:
        writing = asyncio.create_task(message.write(huge))
        while not message.sequence:
            await asyncio.sleep(0)
        await message.write("after")
        await writing
    stored = context.messages[message.id]
    assert stored.text == huge + "after"
    assert max(len(chunk.encode()) for chunk in stored.chunks) <= outbox.CHUNK_BYTES_MAX


async def test_a_source_that_never_waits_is_sent_as_it_goes(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A loop of writes and nothing else leaves the sender its turns."""
    async with client.produce("c") as message:
        for _ in range(5_000):
            await message.write("x")
        assert message.sequence > 0
    assert context.messages[message.id].text == "x" * 5_000


async def test_half_a_pair_waits_for_the_other(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Until a flush, which makes do with what there is."""
    async with client.produce("c") as message:
        await message.write("\ud83d")
        await message.write("\ude00")
        await message.write("\ud83d")
        await message.flush()
        await message.write("\ude00\x00")
    assert context.messages[message.id].chunks == ["😀", "\ufffd", "\ufffd\ufffd"]


async def test_a_flush_waits_for_a_text_that_is_being_written(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the half pair at its end comes after the rest of it."""
    monkeypatch.setattr(outbox, "HELD_CHUNKS_MAX", 1)
    async with client.produce("c") as message:
        writing = asyncio.create_task(message.write("a" * 300_000 + "\ud83d"))
        while not message.sequence:
            await asyncio.sleep(0)
        await message.flush()
        await writing
        assert context.messages[message.id].text == "a" * 300_000 + "\ufffd"


async def test_a_silent_producer_gives_signs_of_life(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The same opening in its epoch, again and again; then it goes on (§7)."""
    async with client.produce("c", sign_of_life_s=0.005) as message:
        await fake.until(lambda: len(fake.producing.bodies("open")) >= 3)
        await message.write("awake")
    first, *signs = fake.producing.bodies("open")
    assert first["producer"].keys() == {"id"}
    own = {**first, "producer": {**first["producer"], "epoch": 1}}
    assert all(sign == own for sign in signs)
    assert context.messages[message.id].text == "awake"


async def test_completing_in_the_block_gives_the_message(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Leaving then does nothing more, and nothing can be written."""
    async with client.produce("c") as message:
        await message.write("x")
        closed = await message.complete(finish_reason="length", usage=Usage(prompt_tokens=3))
        assert (closed.status, closed.final_sequence, closed.finish_reason) == (
            "completed",
            1,
            "length",
        )
        for again in (message.write("y"), message.complete(), message.fail("late")):
            with pytest.raises(RuntimeError):
                await again
    assert [verb for verb, _ in fake.producing.asked] == ["open", "chunks", "complete"]


async def test_failing_in_the_block_says_why(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """What was written stays; the block goes on and nothing is completed."""
    async with client.produce("c") as message:
        await message.write("x")
        await message.fail("content_filter", "No\x00more")
    stored = context.messages[message.id]
    assert (stored.status, stored.chunks) == ("failed", ["x"])
    assert stored.error == {"type": "content_filter", "message": "No\ufffdmore"}


@pytest.mark.parametrize(
    ("reveal", "told"),
    [(False, "ValueError"), (True, "secret \ufffd")],
    ids=["by default", "asked"],
)
async def test_an_exception_marks_the_message_failed_and_goes_on(
    fake: FakeContextd, client: Client, context: FakeContext, reveal: bool, told: str
) -> None:
    """Its class is told. Its text may hold chat text, so only who asks for it has it stored."""
    error = ValueError("secret \udead")
    with pytest.raises(ValueError, match="secret") as caught:
        async with client.produce("c", reveal_errors=reveal) as message:
            await message.write("half")
            raise error
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    stored = context.messages[message.id]
    assert (stored.status, stored.text) == ("failed", "half")
    assert stored.error == {"type": "ValueError", "message": told}
    with pytest.raises(RuntimeError):
        await message.write("late")


async def test_a_producer_goes_on_where_the_stored_text_ends(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """With the message id of one that crashed: in the next epoch, from what is stored."""
    fake.faults.chunks_per_pull = 2
    fake.append(context, "m", "one ", "two ", "three ")
    context.messages["m"].producer_id, context.messages["m"].epoch = "w", 1
    async with client.produce("c", message_id="m", producer_id="w") as message:
        assert (message.epoch, message.sequence) == (2, 3)
        assert await message.stored_text() == "one two three "
        await message.write("four")
    assert context.messages["m"].text == "one two three four"
    assert fake.producing.bodies("chunks")[0]["chunks"][0]["sequence"] == 4
    assert fake.producing.bodies("complete")[0]["final_sequence"] == 4


async def test_nothing_of_an_empty_block_is_sent_but_its_ends(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """An empty message is one, with final sequence 0."""
    async with client.produce("c") as message:
        assert await message.stored_text() == ""
    assert [verb for verb, _ in fake.producing.asked] == ["open", "complete"]
    assert fake.producing.bodies("complete")[0]["final_sequence"] == 0


async def test_a_refused_opening_is_raised_as_it_is(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """No such context; nothing is written, completed or failed."""
    with pytest.raises(ApiError) as caught:
        async with client.produce("nowhere"):
            raise AssertionError("not reached")
    assert caught.value.code == "context_not_found"
    assert fake.producing.asked == []
