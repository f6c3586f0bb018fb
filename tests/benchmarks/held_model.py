"""A model's server on loopback that says little and never ends, and knows when it was left."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

WAIT_S = 30.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
WORD = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)


class HeldModel:
    """Answers `speaks ID` with one word and `silent ID` with none, and then holds the connection."""

    def __init__(self) -> None:
        self.url = ""
        self._asked: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._closed: defaultdict[str, asyncio.Future[float]] = defaultdict(asyncio.Future)

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator[Self]:
        """Listens on a free port of loopback."""
        model = cls()
        server = await asyncio.start_server(model._answer, "127.0.0.1", 0)
        model.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server:
            yield model

    async def asked(self, id_: str) -> None:
        """Until the request of this context has come."""
        async with asyncio.timeout(WAIT_S):
            await self._asked[id_].wait()

    async def closed(self, id_: str) -> float:
        """When its connection was closed, on the wall clock."""
        async with asyncio.timeout(WAIT_S):
            return await self._closed[id_]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        body = json.loads(await reader.readexactly(length))
        how, id_ = body["messages"][-1]["content"].split()
        self._asked[id_].set()
        writer.write(HEAD + (WORD if how == "speaks" else b""))
        await reader.read()  # nothing more comes but the end
        self._closed[id_].set_result(time.time())
        writer.close()
