"""`Client.produce` when answers are lost, the server is away, and others decide about the message."""
# ruff: noqa: PT012 - what is tested is how a block ends, so the block is in `raises`

import asyncio
import random
import re

import anyio
import pytest
from fake_contextd import FakeContextd, serving
from fake_wire import FakeContext

from contextd.client import (
    ApiError,
    CancelledByViewerError,
    Client,
    ClientError,
    MessageClosedError,
    ProducedMessage,
    TakenOverError,
    UnreachableError,
    producing,
)

STATUSES = {"complete": "completed", "fail": "failed"}


class Broken(Exception):
    """What the block under test raises."""


@pytest.mark.parametrize("fault", ["lost", "cut", 503, 429])
@pytest.mark.parametrize("verb", ["open", "chunks", "complete", "fail"])
@pytest.mark.parametrize("epoch", [None, 3])
async def test_no_lost_answer_loses_or_doubles_text(
    fake: FakeContextd,
    client: Client,
    context: FakeContext,
    verb: str,
    fault: str | int,
    epoch: int | None,
) -> None:
    """Every request is repeated until it is answered, whether or not it was carried out."""
    fake.producing.faults[verb] = [fault, None, fault, fault]
    ending = "fail" if verb == "fail" else "complete"
    async with client.produce("c", epoch=epoch) as message:
        for text in ("one ", "two ", "three"):
            await message.write(text)
            await message.flush()
        if ending == "fail":
            await message.fail("model_error")
    stored = context.messages[message.id]
    assert stored.chunks == ["one ", "two ", "three"]
    assert stored.status == STATUSES[ending]
    assert stored.epoch == message.epoch
    if epoch:
        assert message.epoch == epoch


async def test_an_opening_that_overtakes_itself_goes_on(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Two answers are lost: each repeat takes over from the one before, and the last epoch counts."""
    fake.producing.faults["open"] = ["lost", "lost"]
    async with client.produce("c") as message:
        assert message.epoch == 3
        await message.write("x")
    assert context.messages[message.id].text == "x"


async def test_an_opening_that_is_carried_out_late_is_known_as_its_own(
    fake: FakeContextd, context: FakeContext
) -> None:
    """It raises the epoch after its repeat was answered. That is no other producer."""
    fake.producing.faults["open"] = ["late"]
    async with Client(fake.url, timeout_s=0.2) as client, client.produce("c") as message:
        assert message.epoch == 1
        fake.producing.released.set()
        await fake.until(lambda: context.messages[message.id].epoch == 2)
        await message.write("x")
        await message.flush()
        assert message.epoch == 2
    assert context.messages[message.id].status == "completed"


async def test_a_silent_producer_knows_its_own_late_opening(
    fake: FakeContextd, context: FakeContext
) -> None:
    """The same, when the next thing that it has to say is that it lives."""
    fake.producing.faults["open"] = ["late"]
    client = Client(fake.url, timeout_s=0.2)
    async with client, client.produce("c", sign_of_life_s=0.005) as message:
        fake.producing.released.set()
        await fake.until(lambda: message.epoch == 2)
        await message.write("x")
    assert context.messages[message.id].status == "completed"


async def test_patience_ends() -> None:
    """Then it is raised by whoever writes, flushes or leaves, and the message is left as it is."""
    async with serving(FakeContextd()) as fake:
        context = fake.add("c")
        client = Client(fake.url)
        produced = client.produce("c", patience_s=0.05)
        message = await produced.__aenter__()
    await message.write("x")
    with pytest.raises(UnreachableError) as flushed:
        await message.flush()
    with pytest.raises(UnreachableError) as written:
        await message.write("y")
    assert written.value is flushed.value
    with pytest.raises(UnreachableError) as left:
        await produced.__aexit__(None, None, None)
    assert left.value is flushed.value
    assert any("not marked failed" in note for note in left.value.__notes__)
    assert context.messages[message.id].status == "streaming"
    await client.aclose()


async def test_a_server_that_asks_for_patience_gets_it(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """More failures than other requests bear, as long as the time is not over."""
    fake.producing.faults["chunks"] = [503] * 20
    async with client.produce("c") as message:
        await message.write("x")
    assert len(fake.producing.bodies("chunks")) == 21
    assert context.messages[message.id].status == "completed"


@pytest.mark.parametrize(
    ("status", "kind"),
    [("cancelled", CancelledByViewerError), ("interrupted", MessageClosedError)],
)
async def test_a_message_that_somebody_closed_takes_no_more(
    fake: FakeContextd,
    client: Client,
    context: FakeContext,
    status: str,
    kind: type[MessageClosedError],
) -> None:
    """The next flush, write and the exit raise it with its status; nothing else is asked."""
    with pytest.raises(kind) as left:
        async with client.produce("c") as message:
            await message.write("kept")
            await message.flush()
            fake.close(context, message.id, status)
            await message.write("lost")
            for again in (message.flush, lambda: message.write("y"), message.complete):
                with pytest.raises(kind) as caught:
                    await again()
                assert (caught.value.message_status, caught.value.final_sequence) == (status, 1)
    assert left.value is caught.value
    assert fake.producing.bodies("fail") == fake.producing.bodies("complete") == []
    assert context.messages[message.id].text == "kept"


async def test_a_viewers_cancel_is_found_by_a_sign_of_life(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Also by a producer that has nothing to write."""
    with pytest.raises(CancelledByViewerError):
        async with client.produce("c", sign_of_life_s=0.005) as message:
            fake.close(context, message.id, "cancelled")
            while True:
                await message.flush()
                await asyncio.sleep(0)
    assert fake.producing.bodies("fail") == []


async def test_a_viewers_cancel_is_found_by_the_completion(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """All text was stored before, so leaving is what is refused; it is not failed instead."""
    with pytest.raises(CancelledByViewerError):
        async with client.produce("c") as message:
            await message.write("kept")
            await message.flush()
            fake.close(context, message.id, "cancelled")
    assert fake.producing.bodies("fail") == []


async def test_an_error_after_the_end_by_another_hides_nothing(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The block's own exception goes on, and the message stays as it was decided."""
    with pytest.raises(Broken):
        async with client.produce("c") as message:
            fake.close(context, message.id, "cancelled")
            await message.write("x")
            with pytest.raises(CancelledByViewerError):
                await message.flush()
            raise Broken
    assert fake.producing.bodies("fail") == []


async def test_of_two_producers_the_later_one_writes(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """The first hears that it was taken over, and by which epoch, and does no more harm."""
    with pytest.raises(TakenOverError) as left:
        async with client.produce("c", message_id="m") as first:
            await first.write("first ")
            await first.flush()
            async with client.produce("c", message_id="m") as second:
                await first.write("never")
                with pytest.raises(TakenOverError) as caught:
                    await first.flush()
                assert caught.value.epoch == second.epoch == 2
                await second.write("second")
    assert left.value is caught.value
    assert context.messages["m"].chunks == ["first ", "second"]
    assert context.messages["m"].status == "completed"


async def test_a_producer_that_was_taken_over_hears_that_after_the_end_too(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Also when the other has completed the message by then."""
    with pytest.raises(TakenOverError):
        async with client.produce("c", message_id="m") as first:
            async with client.produce("c", message_id="m") as second:
                await second.write("second")
            await first.write("never")
    assert context.messages["m"].text == "second"


async def test_racing_producers_leave_one_text(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """However they overlap: each chunk is of one of them, and one of them completes it."""

    async def race(name: str) -> str:
        async with client.produce("c", message_id="m", patience_s=5) as message:
            for number in range(50):
                await message.write(f"{name}{number} ")
        return name

    outcomes = await asyncio.gather(*map(race, "abcd"), return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert len(winners) == 1
    assert all(isinstance(error, TakenOverError | MessageClosedError) for error in refused)
    stored = context.messages["m"]
    assert stored.status == "completed"
    assert stored.text.endswith("".join(f"{winners[0]}{number} " for number in range(50)))
    for name in "abcd":
        numbers = [int(number) for number in re.findall(rf"{name}(\d+)", stored.text)]
        assert numbers == list(range(len(numbers)))


async def test_a_refusal_for_good_fails_the_message(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """Somebody else wrote without an epoch: the conflict is raised, and readers see the failure."""
    with pytest.raises(ApiError) as caught:
        async with client.produce("c") as message:
            fake.append(context, message.id, "somebody")
            await message.write("me")
    assert caught.value.code == "sequence_conflict"
    stored = context.messages[message.id]
    assert (stored.status, stored.text) == ("failed", "somebody")
    assert any("not all text is stored" in note for note in caught.value.__notes__)


async def test_a_deleted_context_ends_the_producer(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """404, and nothing more is asked."""
    with pytest.raises(ApiError) as caught:
        async with client.produce("c") as message:
            fake.delete(context)
            await message.write("x")
    assert caught.value.code == "context_not_found"
    assert fake.requests[-1][1].endswith("/chunks")


async def test_a_cancelled_task_leaves_a_failed_message(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """What was written is stored, the error is `cancelled`, and the cancellation goes on."""
    task, message = await blocked(client)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await task
    stored = context.messages[message.id]
    assert (stored.text, stored.status) == ("half", "failed")
    assert stored.error == {"type": "cancelled", "message": "cancelled"}


async def test_a_cancel_scope_leaves_a_failed_message(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """As web frameworks cancel: every further wait in the scope is cancelled, too."""
    with anyio.CancelScope() as scope:
        async with client.produce("c") as message:
            await message.write("half")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    stored = context.messages[message.id]
    assert (stored.text, stored.status) == ("half", "failed")


async def test_a_timeout_stays_a_timeout(
    fake: FakeContextd, client: Client, context: FakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last words, heard or not, do not take the cancellation from the one who asked for it."""
    monkeypatch.setattr(producing, "FAREWELL_S", 0.05)
    for fault in (None, "late"):
        fake.producing.faults["fail"] = [fault]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), client.produce("c") as message:
                await message.write("half")
                await asyncio.Event().wait()
        assert context.messages[message.id].text == "half"
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
    fake.producing.released.set()


async def test_completing_may_be_tried_again(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """One who gives up waiting for the answer and goes on leaves a completed message."""
    fake.producing.faults["complete"] = ["late"]
    async with client.produce("c") as message:
        await message.write("x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(message.complete(finish_reason="stop"), 0.1)
        with pytest.raises(RuntimeError):
            await message.write("y")
    fake.producing.released.set()
    stored = context.messages[message.id]
    assert (stored.chunks, stored.status, stored.finish_reason) == (["x"], "completed", "stop")


@pytest.mark.parametrize("verb", ["chunks", "complete"])
async def test_a_cancellation_is_not_held_up_by_a_silent_server(
    fake: FakeContextd,
    client: Client,
    context: FakeContext,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    """The last words are bounded in time; that they were not heard is a note of the error."""
    monkeypatch.setattr(producing, "FAREWELL_S", 0.05)
    fake.producing.faults = {verb: ["late"] * 9, "fail": ["late"] * 9}
    task, message = await blocked(client, leaves=verb == "complete")
    await fake.until(lambda: bool(fake.producing.bodies(verb)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert "did not answer" in caught.value.__notes__[0]
    coroutines = [other.get_coro() for other in asyncio.all_tasks()]
    assert all("_send" not in getattr(each, "__qualname__", "") for each in coroutines)
    assert context.messages[message.id].status == "streaming"


async def blocked(
    client: Client, *, leaves: bool = False
) -> tuple["asyncio.Task[None]", ProducedMessage]:
    """A task that has written and waits for ever, or leaves."""
    written: asyncio.Future[ProducedMessage] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with client.produce("c") as message:
            await message.write("half")
            written.set_result(message)
            if not leaves:
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    return task, await written


async def test_stored_text_waits_for_what_is_known_to_be_there(
    fake: FakeContextd, client: Client, context: FakeContext
) -> None:
    """A pull that has less than the head is asked again, with a pause; in the end it is an error."""
    fake.append(context, "m", "one ", "two")
    context.messages["m"].producer_id, context.messages["m"].epoch = "w", 1
    with pytest.raises(Broken):
        async with client.produce("c", message_id="m", patience_s=0.05) as message:
            fake.faults.chunks_per_pull = 0
            with pytest.raises(ClientError, match="fewer"):
                await message.stored_text()
            fake.faults.chunks_per_pull = 1
            fake.faults.refuse_pulls = [503, 503]
            assert await message.stored_text() == "one two"
            raise Broken


@pytest.mark.parametrize("seed", range(8))
async def test_any_mixture_of_faults_stores_the_text_once(
    fake: FakeContextd, client: Client, context: FakeContext, seed: int
) -> None:
    """Random losses, refusals and delays at every request."""
    chance = random.Random(seed)
    faults = ["lost", "cut", 503, 502, 429, None, None]
    fake.producing.faults = {
        verb: chance.choices(faults, k=12) for verb in ("open", "chunks", "complete")
    }
    texts = [
        chance.choice(["a", "é ", "😀", "\n", "word "]) * chance.randint(1, 9) for _ in range(60)
    ]
    async with client.produce("c", sign_of_life_s=chance.choice([0.002, 9])) as message:
        for text in texts:
            await message.write(text)
            if chance.random() < 0.2:
                await message.flush()
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
    stored = context.messages[message.id]
    assert (stored.chunks, stored.status) == (texts, "completed")
