"""Whatever the client does may be cancelled at any moment: no connection, stream or task stays."""

import asyncio
import gc
from collections.abc import Awaitable, Callable

import httpx
import pytest
from serving import Server

from contextd.client import Client, Current

TURNS = 60  # of the loop: a request on a fresh connection takes about forty
FRESH = 4  # cancels of one client: the first of them makes a connection


class Wrapping(httpx.AsyncBaseTransport):
    """A transport of a test's own: it only passes on, and shows the pool."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    def in_use(self) -> list[str]:
        """The connections that no next request could use, and that are not closed."""
        connections = self.inner._pool.connections
        return [str(one.info()) for one in connections if not one.is_idle()]


async def _follow(client: Client) -> None:
    async for _ in client.follow("cancelled", cursor="x"):
        pass


async def _signals(client: Client) -> None:
    async for _ in client.signals("cancelled", cursor="x"):
        pass


async def _list(client: Client) -> None:
    async for _ in client.messages("cancelled", content=True):
        pass


async def _wait(client: Client) -> None:
    await client.pull("cancelled", "sent", 1, wait_s=5)


async def _produce(client: Client) -> None:
    async with client.produce("produced") as message:
        await message.write("x")
        await message.flush()


@pytest.fixture
async def url(server: Server, real: Client) -> str:
    """Of a server that has a context with a message, and one to produce in."""
    await real.create_context(id="cancelled")
    await real.create_context(id="produced")
    if (await real.get_context("cancelled")).message_count == 0:
        await real.send("cancelled", "hello", message_id="sent", respond=False)
    return server.url


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("work", [_follow, _signals, _list, _wait, _produce])
async def test_nothing_is_left_by_a_cancel_at_any_turn_of_the_loop(
    url: str, work: Callable[[Client], Awaitable[None]], cancels: int
) -> None:
    """However far an exchange has come, and also if it is cancelled again while it leaves."""
    tasks = len(asyncio.all_tasks())
    for start in range(0, TURNS, FRESH):
        transport = Wrapping()
        async with Client(url, transport=transport) as client:
            for turns in range(start, start + FRESH):
                running = asyncio.ensure_future(work(client))
                for _ in range(turns):
                    await asyncio.sleep(0)
                for _ in range(cancels):
                    running.cancel()
                    await asyncio.sleep(0)
                await asyncio.gather(running, return_exceptions=True)
            await _until(lambda: len(asyncio.all_tasks()) == tasks)
            assert transport.in_use == []


@pytest.mark.parametrize("leave", ["break", "timeout", "dropped"])
async def test_a_follow_that_is_left_closes_its_stream(url: str, leave: str) -> None:
    """By a `break`, by `wait_for`, and by nobody holding it any more."""
    tasks = len(asyncio.all_tasks())
    transport = Wrapping()
    async with Client(url, transport=transport) as client:
        events = client.follow("cancelled")
        async for event in events:
            if isinstance(event, Current):
                break
        if leave == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.01)
        if leave != "break":
            del events
            gc.collect()
        else:
            await events.aclose()
        await _until(lambda: len(asyncio.all_tasks()) == tasks)
        assert transport.in_use == []


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):  # a hang, not a measure
        while not condition():
            await asyncio.sleep(0.001)
