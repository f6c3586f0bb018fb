"""How one MCP server is reached: a child process with pipes, or an address.

What the SDK's transports do not do by themselves: say that a connection has ended, bound what the other
side says, read a child's standard error, and end quickly when the other side does not answer any more.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, TypeAlias

import anyio
import httpx2
import structlog
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage

from contextd.tools.mcp_child import child
from contextd.tools.mcp_file import McpServer
from contextd.tools.mcp_limits import (
    SKIPPED_MAX,
    McpLimits,
    TooManyError,
    is_heard,
    readable,
)

LINE_CHARS_MAX = 1000  # of a child's standard error; the rest of a line is left out
LINES_PER_S_MAX = 50  # more are counted and left out
_LINE_BYTES_MAX = 8 * LINE_CHARS_MAX
_LAST_LINES_S = 0.2  # for what a dying child still had to say

CONNECT_S = 10.0  # to reach an address
SILENCE_S = 300.0  # of an answer or a stream, after which it counts as broken
FAREWELL_S = 1.0  # for each step of telling a server over HTTP that its session is over

log = structlog.get_logger(__name__)

Incoming: TypeAlias = SessionMessage | Exception
Streams: TypeAlias = tuple[Any, Any]


class Listener(Protocol):
    """Who wants to know what becomes of the connection."""

    def ended(self) -> None:
        """Nothing can come from the server any more."""

    def refused(self, status: int) -> None:
        """An HTTP status that refuses a message."""

    def broken(self, why: str) -> None:
        """We do not listen any longer."""

    def list_changed(self) -> None:
        """The server's tools are others now."""


@asynccontextmanager
async def reach(
    server: McpServer, limits: McpLimits, listener: Listener
) -> AsyncGenerator[Streams]:
    """A transport for the SDK's client."""
    if server.command is not None:
        connection = _child(server, server.command, limits, listener)
    else:
        connection = _address(server, server.url or "", limits, listener)
    async with connection as (incoming, outgoing):
        yield _Watched(incoming, listener.ended), outgoing


class _Watched:
    """A stream of incoming messages that says when whoever reads it leaves it."""

    def __init__(self, stream: Any, left: Callable[[], None]) -> None:
        self._stream = stream
        self._left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def receive(self) -> Incoming:
        message: Incoming = await self._stream.receive()
        return message

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Incoming:
        message: Incoming = await anext(self._stream)
        return message

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left()
        await self._stream.__aexit__(kind, error, trace)


@asynccontextmanager
async def _child(
    server: McpServer, command: str, limits: McpLimits, listener: Listener
) -> AsyncGenerator[Streams]:
    async with (
        _drained(server, log_it=limits.log_stderr) as errors,
        child(
            server,
            command,
            errors,
            limits=limits,
            list_changed=listener.list_changed,
            broken=listener.broken,
        ) as streams,
    ):
        errors.close()  # the child has its own; with ours open, the pipe's end would not be seen
        yield streams


@asynccontextmanager
async def _drained(server: McpServer, *, log_it: bool) -> AsyncGenerator[TextIO]:
    """A file that is read, so that whoever writes to it need not wait; its lines may go to the log.

    On leaving, what was written to it is read to its end.
    """
    read_end, write_end = os.pipe()
    pipe = os.fdopen(read_end, "rb", buffering=0)  # the transport closes it
    lines = _Lines(server) if log_it else _Nothing()
    with os.fdopen(write_end, "w") as errors:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: lines, pipe)
        try:
            yield errors
        finally:
            errors.close()
            with anyio.move_on_after(_LAST_LINES_S, shield=True):
                await lines.over.wait()
            transport.close()


class _Nothing(asyncio.Protocol):
    """A child's standard error, which may quote what people say to the model."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def eof_received(self) -> bool:
        self.over.set()
        return False

    def connection_lost(self, _error: Exception | None) -> None:
        self.over.set()


class _Lines(_Nothing):
    """The same for an operator who asked for it: line by line, within bounds and without secrets."""

    def __init__(self, server: McpServer) -> None:
        super().__init__()
        self._server = server
        self._rest = b""
        self._cut = False  # the line that `_rest` begins is too long; its end is left out
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._rest) > _LINE_BYTES_MAX:
            self._take(self._rest)
            self._rest, self._cut = b"", True

    def _take(self, line: bytes) -> None:
        cut, self._cut = self._cut, False
        if not cut and line.strip():
            self._log(line[:_LINE_BYTES_MAX])

    def eof_received(self) -> bool:
        self._take(self._rest)
        self._rest = b""
        return super().eof_received()

    def _log(self, line: bytes) -> None:
        second = int(asyncio.get_running_loop().time())
        if second != self._second:
            self._tell_left_out()
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > LINES_PER_S_MAX:
            self._left_out += 1
            return
        text = self._server.conceal(line.decode("utf-8", "replace")).rstrip()
        log.info("an MCP server says", server=self._server.name, line=text[:LINE_CHARS_MAX])

    def _tell_left_out(self) -> None:
        if self._left_out:
            log.info(
                "an MCP server says too much", server=self._server.name, left_out=self._left_out
            )
            self._left_out = 0


@asynccontextmanager
async def _address(
    server: McpServer, url: str, limits: McpLimits, listener: Listener
) -> AsyncGenerator[Streams]:
    async def look_at(response: httpx2.Response) -> None:
        if response.status_code >= 400 and response.request.method == "POST":
            listener.refused(response.status_code)
        _bound(response, limits)

    async with (
        httpx2.AsyncClient(
            # Compressed, a few bytes could be any number of them.
            headers={**server.headers, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(CONNECT_S, read=SILENCE_S),
            limits=httpx2.Limits(max_connections=None),
            event_hooks={"response": [look_at]},
        ) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=None) as streams,
    ):
        try:
            yield streams
        finally:
            client.timeout = httpx2.Timeout(FAREWELL_S)


def _bound(response: httpx2.Response, limits: McpLimits) -> None:
    """Lets the body break off where a message of it is too long."""
    events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
    encoded = response.headers.get("content-encoding", "identity").lower() != "identity"
    response.stream = _Bounded(
        response.stream,
        limits,
        events=events,
        bytes_max=0 if encoded else limits.message_bytes_max,
        endless=response.request.method == "GET",
    )


class _Bounded(httpx2.AsyncByteStream):
    """A body of one message, or of events of one message each, given on message by message.

    What can be too long or too much of it breaks off. Events that nobody looks at are left out.
    """

    def __init__(
        self,
        stream: Any,
        limits: McpLimits,
        *,
        events: bool,
        bytes_max: int,
        endless: bool,
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._events = events
        self._bytes_max = bytes_max
        self._endless = endless
        self._bytes = 0
        self._parts: list[bytes] = []  # of the message that has not ended
        self._parts_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._bytes += len(piece)
            for message in self._ended(piece):
                if self._is_heard(message):
                    yield self._readable(message)
            endless = self._bytes > SKIPPED_MAX * self._bytes_max and not self._endless
            if self._parts_bytes > self._bytes_max or endless:
                raise self._error(self._limits.too_long)
        yield self._readable(b"".join(self._parts))

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _ended(self, piece: bytes) -> list[bytes]:
        """The events that end in this piece; its rest is kept."""
        ended: list[bytes] = []
        if self._events and (b"\n" in piece or b"\r" in piece):
            *ended, piece = _EVENT_END.split(b"".join([*self._parts, piece]))
            self._parts, self._parts_bytes = [], 0
        self._parts.append(piece)
        self._parts_bytes += len(piece)
        return [event + b"\n\n" for event in ended]

    def _is_heard(self, event: bytes) -> bool:
        method = _NOTIFICATION.search(event, 0, 1000)
        return method is None or is_heard(method[1].decode("ascii", "replace"))

    def _readable(self, message: bytes) -> bytes:
        if len(message) > self._bytes_max:
            raise self._error(self._limits.too_long)
        try:
            if not self._events:
                return readable(message)
            data = b"\n".join(
                line[5:] for line in message.splitlines() if line.startswith(b"data:")
            )
            taken = readable(data) if data else data
            if taken is not data:
                others = [line for line in message.splitlines() if not line.startswith(b"data:")]
                return b"\n".join([*filter(None, others), b"data: " + taken, b"", b""])
        except TooManyError as error:
            raise self._error(str(error)) from None
        except (ValueError, RecursionError):
            pass  # the SDK says what is wrong with it
        return message

    def _error(self, words: str) -> Exception:
        """An error that the SDK takes for the end of one call, not of the session."""
        return httpx2.SSEError(words) if self._events else _TooLongError(words)


class _TooLongError(httpx2.StreamError):
    """Of a body that is one message."""


_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_NOTIFICATION = re.compile(rb'"method"\s*:\s*"(notifications/[^"\\]{1,100})"')
