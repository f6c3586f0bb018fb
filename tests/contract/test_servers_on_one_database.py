"""Several servers on one PostgreSQL: what one of them holds keeps nobody else from working (§18)."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from contextd.app import Contextd, running
from contextd.core.context import ContextPatch, ContextRequest
from contextd.core.producing import OpenRequest, Producer
from contextd.settings import Settings

BOUND_S = 5
ROUNDS = 12


@asynccontextmanager
async def outside(url: str) -> AsyncIterator[AsyncEngine]:
    """Somebody else on the database, for what a server cannot be asked to do."""
    engine = create_async_engine(url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def contextd(postgresql_url: str) -> AsyncIterator[Contextd]:
    async with running(Settings(database=postgresql_url)) as started:
        yield started


async def patch(contextd: Contextd, context_id: str, title: str) -> None:
    await contextd.service.contexts.patch(context_id, ContextPatch(title=title))


async def lock_like_a_server(connection: AsyncConnection, context_id: str) -> None:
    """As a server that stands still in its transaction: PostgreSQL ends it after 2 s."""
    await connection.execute(text("SET idle_in_transaction_session_timeout = '2s'"))
    await connection.commit()
    await connection.execute(
        text("SELECT key FROM contexts WHERE id = :id FOR UPDATE"), {"id": context_id}
    )


async def test_two_servers_never_deadlock(contextd: Contextd, postgresql_url: str) -> None:
    """Both change the same contexts in groups, in different orders: every change is made once."""
    ids = [f"c{number}" for number in range(6)]
    for context_id in ids:
        await contextd.service.contexts.create(ContextRequest(id=context_id))
    async with running(Settings(database=postgresql_url)) as other:
        for number in range(ROUNDS):
            await asyncio.gather(
                *(patch(contextd, context_id, f"a{number}") for context_id in ids),
                *(patch(other, context_id, f"b{number}") for context_id in reversed(ids)),
            )
    async with outside(postgresql_url) as engine, engine.connect() as connection:
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert await connection.scalar(text(query)) == 0
    revisions = [(await contextd.service.contexts.get(id_)).revision for id_ in ids]
    assert revisions == [1 + 2 * ROUNDS] * len(ids)


async def test_what_is_held_waits_alone(contextd: Contextd, postgresql_url: str) -> None:
    """A context that another holds is written once PostgreSQL has let it go; all others at once."""
    for context_id in ("held", "free"):
        await contextd.service.contexts.create(ContextRequest(id=context_id))
    async with outside(postgresql_url) as engine, engine.connect() as holder:
        await lock_like_a_server(holder, "held")
        began_at = time.monotonic()
        waiting = asyncio.ensure_future(patch(contextd, "held", "late"))
        after = asyncio.ensure_future(patch(contextd, "held", "later"))
        for number in range(ROUNDS):
            await patch(contextd, "free", f"t{number}")
        assert not waiting.done()
        await waiting
        await after
        assert time.monotonic() - began_at < BOUND_S
        await holder.invalidate()
    assert (await contextd.service.contexts.get("held")).title == "later"


async def test_chunks_for_a_held_head_wait_alone(contextd: Contextd, postgresql_url: str) -> None:
    """Appends to other messages of the same group are durable meanwhile, and order is kept."""
    producers = contextd.service.producers
    lives = {}
    for id_ in ("held", "free"):
        await contextd.service.contexts.create(ContextRequest(id=id_))
        await producers.open(id_, "m", OpenRequest(producer=Producer(id="p", epoch=1)))
        lives[id_] = await producers.find(id_, "m")

    def append(id_: str, content: str) -> "asyncio.Future[object]":
        return asyncio.ensure_future(
            producers.append(
                lives[id_], epoch=1, texts=[content], sizes=[len(content)], sequences=[None]
            )
        )

    async with outside(postgresql_url) as engine, engine.connect() as holder:
        await holder.execute(
            text("SELECT 1 FROM heads WHERE message_key = :key FOR UPDATE"),
            {"key": lives["held"].message_key},
        )
        held = [append("held", content) for content in "abc"]
        await asyncio.gather(*(append("free", content) for content in "xyz"))
        assert not any(future.done() for future in held)
        await holder.rollback()
        await asyncio.gather(*held)
    pulled = await contextd.service.content.pull("held", "m", start=0, end=None)
    assert pulled.content == "abc"


async def test_an_id_that_another_is_about_to_take_waits_alone(
    contextd: Contextd, postgresql_url: str
) -> None:
    """Two servers create the same id at once: the second looks again, and nobody waits for it."""
    async with outside(postgresql_url) as engine, engine.connect() as holder:
        query = "SELECT pg_advisory_xact_lock(CAST(:kind AS integer), hashtext('same'))"
        await holder.execute(text(query), {"kind": 0x63747865})
        same = asyncio.ensure_future(contextd.service.contexts.create(ContextRequest(id="same")))
        await contextd.service.contexts.create(ContextRequest(id="other"))
        assert not same.done()
        await holder.rollback()
        assert (await same)[1]


async def test_the_first_write_after_a_cut_is_made(contextd: Contextd, postgresql_url: str) -> None:
    """A connection found dead before its COMMIT has stored nothing: the write goes again."""
    await contextd.service.contexts.create(ContextRequest(id="a"))
    async with outside(postgresql_url) as engine, engine.connect() as connection:
        for number in range(3):
            await connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
            await patch(contextd, "a", f"t{number}")
    assert (await contextd.service.contexts.get("a")).title == "t2"


async def test_a_commit_is_durable_whatever_a_database_sets(postgresql_url: str) -> None:
    """A role's or a database's `synchronous_commit` does not weaken it; `remote_apply` stays."""
    show = "SELECT current_setting('synchronous_commit')"
    async with outside(postgresql_url) as engine, engine.connect() as connection:
        name = await connection.scalar(text("SELECT current_database()"))
        found = {}
        for value in ("off", "local", "remote_apply"):
            statement = f"ALTER DATABASE {name} SET synchronous_commit = '{value}'"
            await connection.execute(text(statement))
            await connection.commit()
            async with running(Settings(database=postgresql_url)) as contextd:
                found[value] = await contextd.service.ledger.writer.change(
                    lambda connection: connection.scalar(text(show))
                )
    assert found == {"off": "on", "local": "on", "remote_apply": "remote_apply"}
