"""How one MCP server is reached: a child process with pipes, or an address.

What the SDK's transports do not do by themselves: say that a connection has ended, bring a child's
standard error into the log, and end quickly when the other side does not answer any more.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TextIO, TypeAlias

import anyio
import httpx2
import structlog
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage

from contextd.tools.mcp_file import McpServer

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


@asynccontextmanager
async def reach(
    server: McpServer, ended: Callable[[], None], refused: Callable[[int], None]
) -> AsyncGenerator[Streams]:
    """A transport for the SDK's client.

    `ended` is called when nothing can come from the server any more, `refused` with each HTTP status
    that refuses a message. A child is ended on leaving: its input is closed, after 2 s it gets SIGTERM,
    after 2 more SIGKILL, and so do its own children.
    """
    if server.command is not None:
        connection = _child(server, server.command)
    else:
        connection = _address(server, server.url or "", refused)
    async with connection as (incoming, outgoing):
        yield _Watched(incoming, ended), outgoing


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
async def _child(server: McpServer, command: str) -> AsyncGenerator[Streams]:
    parameters = StdioServerParameters(
        command=command, args=list(server.args), env=server.env, cwd=server.cwd
    )
    async with _logged(server) as errors, stdio_client(parameters, errors) as streams:
        errors.close()  # the child has its own; with ours open, the pipe's end would not be seen
        yield streams


@asynccontextmanager
async def _logged(server: McpServer) -> AsyncGenerator[TextIO]:
    """A file whose lines go to the log. On leaving, what was written to it is read to its end."""
    read_end, write_end = os.pipe()
    pipe = os.fdopen(read_end, "rb", buffering=0)  # the transport closes it
    lines = _Lines(server)
    with os.fdopen(write_end, "w") as errors:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: lines, pipe)
        try:
            yield errors
        finally:
            errors.close()
            with anyio.move_on_after(_LAST_LINES_S, shield=True):
                await lines.over.wait()
            transport.close()


class _Lines(asyncio.Protocol):
    """A child's standard error, line by line at debug, within bounds and without secrets."""

    def __init__(self, server: McpServer) -> None:
        self.over = asyncio.Event()
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
        self.over.set()
        return False

    def connection_lost(self, _error: Exception | None) -> None:
        self.over.set()

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
        log.debug("an MCP server says", server=self._server.name, line=text[:LINE_CHARS_MAX])

    def _tell_left_out(self) -> None:
        if self._left_out:
            log.debug(
                "an MCP server says too much", server=self._server.name, left_out=self._left_out
            )
            self._left_out = 0


@asynccontextmanager
async def _address(
    server: McpServer, url: str, refused: Callable[[int], None]
) -> AsyncGenerator[Streams]:
    async def note(response: httpx2.Response) -> None:
        if response.status_code >= 400 and response.request.method == "POST":
            refused(response.status_code)

    async with (
        httpx2.AsyncClient(
            headers=server.headers,
            timeout=httpx2.Timeout(CONNECT_S, read=SILENCE_S),
            limits=httpx2.Limits(max_connections=None),
            event_hooks={"response": [note]},
        ) as client,
        streamable_http_client(url, http_client=client) as streams,
    ):
        try:
            yield streams
        finally:
            client.timeout = httpx2.Timeout(FAREWELL_S)
