"""Readers of streams, as cheap as Python can have them: a protocol each, and no task."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import cast

from benchmarks.wire import WAIT_S, address, get_request

BATCH = 100  # streams that attach at the same time

_DELTA = re.compile(rb'"message_id":"([^"]+)","current_sequence":(\d+),"role":"assistant"')
_SUCCESS = b"HTTP/1.1 200"
_CURRENT = b'"type":"heartbeat"'
_LAST_CHUNK = b"0\r\n\r\n"

# What a reader does with what it has read, and when it read it in nanoseconds.
Take = Callable[[bytes, int], None]


def newest_delta(data: bytes) -> tuple[str, int] | None:
    """The message id and position of the last delta of an assistant's message in `data`."""
    found = _DELTA.findall(data)
    return (found[-1][0].decode(), int(found[-1][1])) if found else None


def unfinished(data: bytes) -> bytes:
    """The end of `data` that belongs to an event whose rest is still to come."""
    return data[data.rfind(b"\n\n") + 1 :]


class Watcher(asyncio.Protocol):
    """One stream. Once it is attached, `take` is given each read as it is: to look costs time."""

    def __init__(self, request: bytes, take: Take) -> None:
        self._request = request
        self._take = take
        self._read = b""
        self._is_attached = False
        self.attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks for the stream."""
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Hands it on, or looks for the heartbeat that says that the reader is current."""
        at_ns = time.monotonic_ns()
        if self._is_attached:
            self._read = data
            self._take(data, at_ns)
        else:
            self._read += data
            self._attach()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whether the stream had a proper end."""
        if not self.attached.done():
            self.attached.set_exception(exc or ConnectionError(f"no stream: {self._read[:200]!r}"))
        self.gone.set_result(self._read.endswith(_LAST_CHUNK))

    def _attach(self) -> None:
        if not self._read.startswith(_SUCCESS[: len(self._read)]):
            self.attached.set_exception(RuntimeError(f"no stream: {self._read[:200]!r}"))
            self._is_attached = True
        elif _CURRENT in self._read:
            self._is_attached = True
            self.attached.set_result(None)


async def attach(url: str, paths: Sequence[str], taker: Callable[[int], Take]) -> list[Watcher]:
    """A stream for each path, all of them current. The n-th reader calls `taker(n)`."""
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []

    async def open_one(number: int) -> Watcher:
        request = get_request(url, paths[number], "text/event-stream")
        _, watcher = await loop.create_connection(
            lambda: Watcher(request, taker(number)), *address(url)
        )
        await asyncio.wait_for(watcher.attached, WAIT_S)
        return watcher

    for start in range(0, len(paths), BATCH):
        batch = range(start, min(start + BATCH, len(paths)))
        watchers += await asyncio.gather(*(open_one(number) for number in batch))
    return watchers
