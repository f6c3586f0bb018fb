"""A commit whose answer is lost with the connection, on PostgreSQL: nothing is stored twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import make_url

from contextd.app import running
from contextd.core.context import ContextRequest
from contextd.core.message import SendRequest, TextPayload
from contextd.settings import Settings

from .conftest import HeldProvider

DEADLINE_S = 30
CHUNKS = 60


class CommitCutter:
    """A proxy before PostgreSQL. When armed, it passes the next COMMIT on and cuts before its answer."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self.armed = False
        self.cuts = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._socket_path)
        answers = asyncio.ensure_future(self._pass_back(up_reader, writer))
        try:
            while data := await reader.read(65536):
                cut = self.armed and b"COMMIT" in data
                if cut:
                    self.armed = False
                    self.cuts += 1
                    answers.cancel()  # the answer goes nowhere
                    await asyncio.wait([answers])
                up_writer.write(data)
                await up_writer.drain()
                if cut:
                    await up_reader.read(65536)  # it is committed
                    break
        except ConnectionError:
            pass
        finally:
            answers.cancel()
            writer.transport.abort()
            up_writer.close()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def cutter_before(url: str) -> AsyncIterator[tuple[CommitCutter, str]]:
    """The proxy on loopback, and the URL of the database through it."""
    direct = make_url(url)
    cutter = CommitCutter(f"{direct.query['host']}/.s.PGSQL.5432")
    server = await asyncio.start_server(cutter.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    through = direct.set(host="127.0.0.1", port=port, query={"ssl": "disable"})
    async with server:
        yield cutter, through.render_as_string(hide_password=False)


async def test_chunks_and_steps_are_not_stored_twice(postgresql_url: str) -> None:
    """Cut after the commits of appends, of the opening and of the end: the text is exact, one end."""
    provider = HeldProvider()
    async with cutter_before(postgresql_url) as (cutter, url):
        settings = Settings(database=url, backoff_initial_s=0.0)
        async with running(settings, providers={"scripted": provider}) as contextd:
            await contextd.service.contexts.create(ContextRequest(id="a"))
            payload = TextPayload(content="Hello")
            await contextd.service.messages.send("a", SendRequest(payload=payload))
            await provider.asked.wait()
            live = None
            async with asyncio.timeout(DEADLINE_S):
                for index in range(CHUNKS):
                    cutter.armed = index in (10, 30, 50)
                    provider.say(f"w{index} ")
                    while live is None or live.head < index + 1:
                        held = contextd.service.ledger.tail.streaming()
                        live = held[0] if held else None
                        await asyncio.sleep(0.002)
                cutter.armed = True
                provider.say(None)
                # The end's answer is lost as well: the turn goes on from what is stored.
                while (await contextd.service.contexts.get("a")).state != "idle":
                    await asyncio.sleep(0.01)
            page = await contextd.service.messages.list(
                "a", branch=None, cursor=None, limit=10, include_content=True
            )
            assert page.items[-1].content == "".join(f"w{index} " for index in range(CHUNKS))
            assert page.items[-1].final_sequence == CHUNKS
            assert cutter.cuts == 4
            turns = await contextd.service.records.turns("a", cursor=None, limit=10)
            assert [(turn.status, turn.attempt) for turn in turns.items] == [("completed", 1)]
            assert len(provider.requests) == 1
