"""A bare ASGI application that gives every reader the same ready bytes at a fixed rate.

It stores nothing, knows nothing and checks nothing. It takes the requests that contextd takes, so that
the same client measures both.
"""

import asyncio
import re
from typing import Any

import msgspec

from benchmarks.bare_hosting import host
from benchmarks.pacing import Pace, beats, stamp

_HEARTBEAT = b'data: {"type":"heartbeat","timestamp":"2026-01-01T00:00:00.000Z"}\n\n'
_DELTA = (
    b'data: {"type":"content_delta","context_id":"bench","message_id":"m","current_sequence":%d,'
    b'"role":"assistant","kind":"text","timestamp":"2026-01-01T00:00:00.000Z"}\n\n'
)
_FROM = re.compile(rb"from_sequence=(\d+)")
_STREAM_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]


class Stream:
    """The same bytes to every reader: one future and one wake-up each, no merging, no end."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[bytes | None]] = []
        self._stamps: list[str] = []
        self._beating: asyncio.Task[None] | None = None
        self._closing = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path: str = scope["path"]
        if path.endswith("/stream"):
            await self._stream(send)
        elif path.endswith("/content"):
            await self._pull(scope, send)
        elif path.endswith("/messages"):
            pace = msgspec.json.decode(await _content(receive), type=Pace)
            self._beating = asyncio.create_task(self._beat(pace))
            await respond(send, 202, b"{}")
        else:
            await respond(send, 201, b"{}")

    def tell(self, stamps: list[str]) -> None:
        """There is more text."""
        self._stamps += stamps
        self._give(_DELTA % len(self._stamps))

    def close(self) -> None:
        """Ends every stream."""
        self._closing = True
        self._give(None)

    async def _stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})
        while not self._closing:
            waiter: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            block = await waiter
            if block is not None:
                await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pull(self, scope: Any, send: Any) -> None:
        found = _FROM.search(scope["query_string"])
        start = int(found[1]) if found else 0
        head = len(self._stamps)
        text = "".join(self._stamps[start:])
        body = b'{"from_sequence":%d,"sequence":%d,"content":"%b","head_sequence":%d}'
        await respond(send, 200, body % (start, head, text.encode(), head))

    async def _beat(self, pace: Pace) -> None:
        async for _ in beats(pace):
            self.tell([stamp()])

    def _give(self, block: bytes | None) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(block)


async def _content(receive: Any) -> str:
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content: str = msgspec.json.decode(body)["payload"]["content"]
    return content


async def respond(send: Any, status: int, body: bytes) -> None:
    """A whole answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


if __name__ == "__main__":
    stream = Stream()
    host(stream, before_exit=stream.close)
