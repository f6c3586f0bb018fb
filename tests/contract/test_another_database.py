"""Another database in the place of ours (§18): it is noticed, and served as a new one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from contextd.app import Contextd, running
from contextd.core.context import ContextRequest
from contextd.core.errors import ContextNotFound, Overloaded
from contextd.core.message import SendRequest, TextPayload
from contextd.core.producing import OpenRequest, Producer
from contextd.settings import Settings
from contextd.signals.frames import parse_cursor
from contextd.store.upgrade import upgrade

DEADLINE_S = 20
POLL_S = 0.05
FAILED = {
    "comparing the watched contexts failed; the next round tries again",
    "looking after the turns failed",
    "looking for silent producers failed; the next round tries again",
}


async def run(url: str, *statements: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


async def empty_the_tables(url: str) -> None:
    """Under connections that live on."""
    await run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


async def make_the_database_anew(url: str) -> None:
    """All connections to it are ended."""
    name = make_url(url).database
    beside = make_url(url).set(database="postgres").render_as_string(hide_password=False)
    await run(beside, f"DROP DATABASE {name} WITH (FORCE)", f"CREATE DATABASE {name}")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.01)


async def say_hello(contextd: Contextd) -> tuple[str, str]:
    """A context `a` with one message; its id and the cursor after it."""
    await contextd.service.contexts.create(ContextRequest(id="a"))
    request = SendRequest(payload=TextPayload(content="Hello"), respond=False)
    sent = await contextd.service.messages.send("a", request)
    return sent.message_id, sent.stream_cursor


@pytest.mark.parametrize("replace", [empty_the_tables, make_the_database_anew])
async def test_an_emptied_database_is_left_and_a_whole_one_is_served(
    postgresql_url: str, replace: Callable[[str], Awaitable[None]]
) -> None:
    """Not ready, no text from memory, streams and waits over; then ready, with cursors of its own."""
    async with running(Settings(database=postgresql_url, poll_s=POLL_S)) as contextd:
        readiness = contextd.service.ledger.writer.readiness
        message_id, cursor = await say_hello(contextd)
        stream = contextd.service.streams.subscribe("a", throttle_s=0, heartbeat_s=15, named=False)
        taken = asyncio.ensure_future(stream.take())
        await asyncio.sleep(2 * POLL_S)  # the first look
        await replace(postgresql_url)
        await until(lambda: readiness.lacks("database"))
        assert b"retry:" in (await taken or b"")
        stream.close()
        with pytest.raises((Overloaded, ContextNotFound)):
            await contextd.service.content.pull("a", message_id, start=0, end=None)
        with pytest.raises(Overloaded):
            await contextd.service.contexts.create(ContextRequest(id="b"))

        await upgrade(postgresql_url)
        await until(lambda: not readiness.lacks("database"))
        with pytest.raises(ContextNotFound):
            await contextd.service.content.pull("a", message_id, start=0, end=None)
        _, newer = await say_hello(contextd)
        assert newer.partition("-")[0] != cursor.partition("-")[0]
        assert parse_cursor(contextd.service.ledger.database_id, cursor) is None


async def test_waiting_pulls_share_one_look(postgresql_url: str) -> None:
    """Pulls that wait at a server for what another one writes cost a few statements in all."""
    settings = Settings(database=postgresql_url, poll_s=0.2)
    async with running(settings) as writing, running(settings) as waiting:
        await writing.service.contexts.create(ContextRequest(id="a"))
        producers = writing.service.producers
        await producers.open("a", "m", OpenRequest(producer=Producer(id="p", epoch=1)))
        pulls = [
            asyncio.create_task(
                waiting.service.content.wait("a", "m", start=0, end=None, wait_s=DEADLINE_S),
                name="pull",
            )
            for _ in range(50)
        ]
        await until(lambda: len(waiting.service.ledger.hub.awaited().get(1, [])) == len(pulls))
        asked: list[tuple[str, str]] = []  # the task that asked, and the statement
        engine = waiting.service.content._reader._engine.sync_engine

        @event.listens_for(engine, "before_cursor_execute")
        def note(*arguments: object) -> None:
            task = asyncio.current_task()
            asked.append((task.get_name() if task else "", str(arguments[2])))

        def of(name: str) -> list[str]:
            return [statement for task, statement in asked if task == name]

        # Other background tasks ask on these connections as well, and are not what is counted here.
        looks = 4
        began = asyncio.get_running_loop().time()
        await until(lambda: len(of("content-keep-in-step")) >= looks)
        took_s = asyncio.get_running_loop().time() - began
        assert all("FROM heads" in statement for statement in of("content-keep-in-step"))
        assert took_s > (looks - 2) * settings.poll_s  # one statement a look, whoever waits
        assert not of("pull")
        live = await producers.find("a", "m")
        await producers.append(live, epoch=1, texts=["x"], sizes=[1], sequences=[None])
        found = await asyncio.gather(*pulls)
        assert {pulled.content for pulled in found} == {"x"}


@contextmanager
def logging() -> Iterator[Callable[[], dict[str, bool]]]:
    """What was logged since, and whether with a traceback."""
    with capture_logs() as entries:
        yield lambda: {entry["event"]: bool(entry.get("exc_info")) for entry in entries}


async def test_background_tasks_log_no_traceback_of_a_broken_database(postgresql_url: str) -> None:
    """Its code is logged where it comes up; who meets it again and again says so in a line."""
    settings = Settings(database=postgresql_url, poll_s=POLL_S, producer_silence_s=0.1)
    tables = ("contexts", "heads", "turns")
    with logging() as logged:
        async with running(settings) as contextd:
            await say_hello(contextd)
            stream = contextd.service.streams.subscribe(
                "a", throttle_s=0, heartbeat_s=15, named=False
            )
            _ = [block async for block in contextd.service.streams.attach(stream, "a", None)]
            await run(postgresql_url, *(f"ALTER TABLE {name} RENAME TO x{name}" for name in tables))
            await until(lambda: logged().keys() >= FAILED)
            await run(postgresql_url, *(f"ALTER TABLE x{name} RENAME TO {name}" for name in tables))
            stream.close()
    assert not any(logged().values())
