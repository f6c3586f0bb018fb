"""The other way to write a produced message: with `contextd.client`, as its users do.

The same plan, texts and ledger as over bare sockets, so that the verdict is the same too. What the
client does by itself (numbers, repeats, fences) is left to it.
"""

import asyncio

from producer_ledger import now_ms
from producer_link import GoneError, MessageLink
from raw_http import HOST

from contextd.client import (
    ApiError,
    Client,
    MessageClosedError,
    ProducedMessage,
    TakenOverError,
)

PATIENCE_S = 600.0  # a machine may be busy: that a run hangs is for its own limit to say
SIGN_OF_LIFE_S = 1.0  # below the silence of the run
TIMEOUT_S = 20.0
BUSY_S_MAX = 0.2
FLUSH_SHARE = 0.15


async def write_by_client(link: MessageLink) -> None:
    """Until the message is closed, or lost once too often."""
    take_backs = link.plan.take_backs
    url = f"http://{HOST}:{link.plan.port}"
    async with Client(url, timeout_s=TIMEOUT_S) as client:
        while True:
            try:
                await _write(client, link)
                return
            except TakenOverError:
                link.count("clients that were stale")
                if take_backs == 0:
                    link.note("stale")
                    return
                take_backs -= 1
            except MessageClosedError as error:
                link.take_end(error.message_status, error.final_sequence)
                link.count("producers told of an end")
                return
            except ApiError as error:
                await _take_refusal(link, error)


async def _take_refusal(link: MessageLink, error: ApiError) -> None:
    """Returns when it may be tried again."""
    if error.code == "context_not_found":
        raise GoneError
    if error.code == "context_busy":
        await asyncio.sleep(link.random.uniform(0, BUSY_S_MAX))
    else:
        link.accuse("a refusal of the client", status=error.status, problem=error.problem)


async def _write(client: Client, link: MessageLink) -> None:
    message = link.message
    asked_at_ms = now_ms()
    async with client.produce(
        link.plan.context_id,
        message_id=message.id,
        producer_id=link.random.choice((None, link.plan.name)),
        patience_s=PATIENCE_S,
        sign_of_life_s=SIGN_OF_LIFE_S,
    ) as produced:
        epoch, head = produced.epoch, produced.sequence
        if head < link.record.acked:
            link.accuse("acknowledged chunks that are lost", now=head)
        link.note("opened", epoch=epoch, head=head, asked_at_ms=asked_at_ms)
        link.standing.epoch = epoch
        await asyncio.sleep(link.random.uniform(0, link.plan.pause_s))
        await _write_from(produced, link, head)
        status = "failed" if message.ending == "fail" else "completed"
        link.note("ending", status=status)
        if status == "failed":
            await produced.fail("gave_up", "as planned")
    link.note_closed(status, message.chunks)


async def _write_from(produced: ProducedMessage, link: MessageLink, head: int) -> None:
    message, flushed = link.message, head
    asked_at_ms = now_ms()
    for place in range(head + 1, message.chunks + 1):
        link.note_sending(place)
        await produced.write(link.chunk(place)["content"])
        if message.pace_s:
            await asyncio.sleep(link.random.uniform(0, message.pace_s))
        if place == message.chunks or link.random.random() < FLUSH_SHARE:
            await produced.flush()
            if produced.sequence != place:
                link.accuse("a client that stands elsewhere", now=produced.sequence, want=place)
            link.note_acked(flushed + 1, place, accepted=place - flushed, asked_at_ms=asked_at_ms)
            link.count("appends, client")
            flushed, asked_at_ms = place, now_ms()
