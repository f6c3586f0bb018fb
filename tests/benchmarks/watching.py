"""Readers of streams, as cheap as Python can have them: a protocol each, and no task."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import cast

from benchmarks.wire import WAIT_S, address, get_request

BATCH = 100  # streams that attach at the same time

_DELTA = re.compile(rb'"message_id":"([^"]+)","current_sequence":(\d+),"role":"assistant"')
_CURRENT = b'"type":"heartbeat"'
_LAST_CHUNK = b"0\r\n\r\n"

Heard = Callable[[str, int, int], None]


class Watcher(asyncio.Protocol):
    """One stream. `heard(message_id, position, at_ns)` is called for the newest delta of a read."""

    def __init__(self, request: bytes, heard: Heard) -> None:
        self._request = request
        self._heard = heard
        self._rest = b""
        self.attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks for the stream."""
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Looks for deltas, and for the heartbeat that says that the reader is current."""
        at_ns = time.monotonic_ns()
        data = self._rest + data
        if not self.attached.done():
            self._attach(data)
        for delta in _DELTA.findall(data)[-1:]:
            self._heard(delta[0].decode(), int(delta[1]), at_ns)
        self._rest = data[data.rfind(b"\n\n") + 1 :]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whether the stream had a proper end."""
        if not self.attached.done():
            self.attached.set_exception(exc or ConnectionError("the stream ended early"))
        self.gone.set_result(self._rest.endswith(_LAST_CHUNK))

    def _attach(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200"[: len(data)]) and not self._rest:
            self.attached.set_exception(RuntimeError(f"no stream: {data[:100]!r}"))
        elif _CURRENT in data:
            self.attached.set_result(None)


async def attach(url: str, paths: Sequence[str], hear: Callable[[int], Heard]) -> list[Watcher]:
    """A stream for each path, all of them current. `hear(n)` is what the n-th reader calls."""
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []

    async def open_one(number: int) -> Watcher:
        request = get_request(url, paths[number], "text/event-stream")
        _, watcher = await loop.create_connection(
            lambda: Watcher(request, hear(number)), *address(url)
        )
        await asyncio.wait_for(watcher.attached, WAIT_S)
        return watcher

    for start in range(0, len(paths), BATCH):
        batch = range(start, min(start + BATCH, len(paths)))
        watchers += await asyncio.gather(*(open_one(number) for number in batch))
    return watchers
