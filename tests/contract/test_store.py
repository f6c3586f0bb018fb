"""Appends and changes, one suite over SQLite and PostgreSQL."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.app import Contextd
from contextd.core.context import ContextRequest
from contextd.core.errors import ContextdError, IdTaken, MessageClosed, StaleProducer
from contextd.core.message import SendRequest, TextPayload
from contextd.core.values import SEQUENCE_MAX
from contextd.store.edit import ContextEdit
from contextd.store.tables import chunks, heads
from contextd.store.tail import LiveMessage

from .conftest import HeldProvider, Start


async def send(contextd: Contextd, context_id: str, text: str = "Hi", **options: Any) -> Any:
    request = SendRequest(payload=TextPayload(content=text), **options)
    return await contextd.service.messages.send(context_id, request)


async def open_message(contextd: Contextd, provider: HeldProvider, context_id: str) -> LiveMessage:
    """A turn that is writing, as the agent loop sees its message."""
    await contextd.service.contexts.create(ContextRequest(id=context_id))
    await send(contextd, context_id)
    provider.say("first")
    while True:
        found = (await contextd.service.contexts.get(context_id)).open_messages
        if found:
            live = contextd.service.ledger.tail.get(context_id, found[0].message_id)
            assert live is not None
            return live
        await asyncio.sleep(0)


async def stored(contextd: Contextd, live: LiveMessage) -> list[tuple[int, str, int]]:
    async def read(connection: AsyncConnection) -> list[tuple[int, str, int]]:
        rows = await connection.execute(
            select(chunks.c.sequence, chunks.c.content, chunks.c.end_bytes)
            .where(chunks.c.message_key == live.message_key)
            .order_by(chunks.c.sequence)
        )
        return [tuple(row) for row in rows]

    return await contextd.service.ledger.writer.change(read)


async def test_appends_of_many_tasks_are_dense_and_whole(
    start: Start, provider: HeldProvider
) -> None:
    """Sequences are assigned in the transaction: none twice, none missing, each text at its own."""
    async with start() as contextd:
        live = await open_message(contextd, provider, "a")
        ledger = contextd.service.ledger
        texts = [[f"{task}.{n}.ü" for n in range(3)] for task in range(50)]
        tails = await asyncio.gather(*(ledger.append(live, fence=1, texts=t) for t in texts))
        rows = await stored(contextd, live)
        assert [row[0] for row in rows] == list(range(1, 152))
        for appended, mine in zip(tails, texts, strict=True):
            head = appended.head
            assert [row[1] for row in rows[head - 3 : head]] == mine
        size = 0
        for _, content, end_bytes in rows:
            size += len(content.encode())
            assert end_bytes == size
        assert live.head == 151
        assert live.read(0, SEQUENCE_MAX, 10**9) == (151, "".join(row[1] for row in rows))


async def test_a_refused_append_does_not_undo_its_neighbours(
    start: Start, provider: HeldProvider
) -> None:
    """In one group: a stale fence is refused with the current one, the others are stored."""
    async with start() as contextd:
        live = await open_message(contextd, provider, "a")
        ledger = contextd.service.ledger
        outcomes = await asyncio.gather(
            ledger.append(live, fence=1, texts=["good"]),
            ledger.append(live, fence=7, texts=["stale"]),
            ledger.append(live, fence=1, texts=["better"]),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], StaleProducer)
        assert outcomes[1].facts == {"epoch": 1}
        assert [row[1] for row in await stored(contextd, live)] == ["first", "good", "better"]


async def test_an_append_to_a_closed_message_says_how_it_ended(
    start: Start, provider: HeldProvider
) -> None:
    """After a cancel no chunk follows, and the writer learns it at its next write."""
    async with start() as contextd:
        live = await open_message(contextd, provider, "a")
        await contextd.service.steps.cancel("a", None)
        with pytest.raises(MessageClosed) as refused:
            await contextd.service.ledger.append(live, fence=1, texts=["late"])
        assert refused.value.facts == {"message_status": "cancelled", "final_sequence": 1}
        assert [row[1] for row in await stored(contextd, live)] == ["first"]


async def test_a_change_that_raises_undoes_only_itself(
    start: Start, provider: HeldProvider
) -> None:
    """Its statements are gone, those of the same group are durable."""
    async with start() as contextd:
        live = await open_message(contextd, provider, "a")
        writer = contextd.service.ledger.writer

        async def break_after_writing(connection: AsyncConnection) -> None:
            await connection.execute(
                chunks.insert().values(
                    message_key=live.message_key,
                    sequence=99,
                    content="x",
                    end_bytes=1,
                    created_at=0,
                )
            )
            raise IdTaken("x")

        async def defect(connection: AsyncConnection) -> None:
            await connection.execute(
                heads.update().where(heads.c.message_key == live.message_key).values(head=50)
            )
            raise RuntimeError("a defect")

        outcomes = await asyncio.gather(
            contextd.service.ledger.append(live, fence=1, texts=["good"]),
            writer.change(break_after_writing),
            writer.change(defect),
            contextd.service.ledger.append(live, fence=1, texts=["better"]),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], IdTaken)
        assert isinstance(outcomes[2], RuntimeError)
        assert [row[:2] for row in await stored(contextd, live)] == [
            (1, "first"), (2, "good"), (3, "better"),
        ]  # fmt: skip


async def test_a_caller_that_goes_away_does_not_undo_its_write(
    start: Start, provider: HeldProvider
) -> None:
    """A request that is cut has either happened or not; here it has, and its neighbour too."""
    async with start() as contextd:
        live = await open_message(contextd, provider, "a")
        ledger = contextd.service.ledger
        going = asyncio.ensure_future(ledger.append(live, fence=1, texts=["gone"]))
        staying = asyncio.ensure_future(ledger.append(live, fence=1, texts=["here"]))
        await asyncio.sleep(0)
        going.cancel()
        await staying
        assert [row[1] for row in await stored(contextd, live)] == ["first", "gone", "here"]


async def test_a_context_row_changed_by_another_process_is_looked_at_again(start: Start) -> None:
    """Two processes, many edits of one context: each takes effect once, revisions are dense."""
    async with start(HeldProvider()) as one, start(HeldProvider()) as two:
        await one.service.contexts.create(ContextRequest(id="a"))

        async def bump(edit: ContextEdit) -> int:
            edit.change(record=True)
            return edit.revision

        edits = [
            contextd.service.ledger.edit("a", bump) for _ in range(20) for contextd in (one, two)
        ]
        revisions = sorted(result for _, result in await asyncio.gather(*edits))
        assert revisions == list(range(2, 42))


async def test_purging_removes_every_row_of_a_deleted_context(
    start: Start, provider: HeldProvider
) -> None:
    """Only its id stays; other contexts keep everything."""
    async with start() as contextd:
        doomed = await open_message(contextd, provider, "doomed")
        await contextd.service.contexts.delete("doomed")
        kept = await open_message(contextd, provider, "kept")
        await contextd.service.contexts.purge()
        assert await stored(contextd, doomed) == []
        assert len(await stored(contextd, kept)) == 1

        async def count(connection: AsyncConnection) -> dict[str, int]:
            counts = {}
            for table in chunks.metadata.sorted_tables:
                counts[table.name] = await connection.scalar(
                    select(func.count()).select_from(table)
                )
            return counts

        counts = await contextd.service.ledger.writer.change(count)
        assert counts["tombstones"] == counts["contexts"] == counts["branches"] == 1
        assert counts["turns"] == counts["segments"] == 1
        assert counts["messages"] == counts["heads"] == counts["chunks"] == 2
        with pytest.raises(ContextdError) as refused:
            await contextd.service.contexts.create(ContextRequest(id="doomed"))
        assert refused.value.facts == {"id": "doomed", "deleted": True}
