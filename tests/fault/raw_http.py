"""A small HTTP/1.1 client over bare asyncio sockets, for readers whose connections are cut on purpose.

It shares no code with contextd and forgives nothing: an answer that ends before its length, a chunk
that is cut in half, or a head that does not end is `BrokenError`, never a short text.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
REQUEST_S_MAX = 45.0  # longer than any wait that is asked for: beyond it the server hangs
READ_BYTES = 65_536


class BrokenError(Exception):
    """The connection ended, or never came about, before the answer was whole."""


class HungError(Exception):
    """The server kept a connection open and said nothing for much longer than it may."""


class GarbledError(Exception):
    """What came is no HTTP: no cut explains that."""


@dataclass(frozen=True)
class Answer:
    """One whole answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of a problem, else nothing."""
        return str(self.json().get("code", "")) if self.status >= 400 and self.body else ""


class Connection:
    """One keep-alive connection, opened when needed, for one request at a time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Raises `BrokenError`; the connection is closed then, and the next request opens another."""
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                return await self._exchange(method, target, headers or {}, body)
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise HungError(f"{method} {target}") from error
            raise BrokenError(f"{method} {target}: {type(error).__name__}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Repeatable."""
        if self._pair is not None:
            self._pair[1].transport.abort()
            self._pair = None

    async def _exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        if self._pair is None:
            self._pair = await asyncio.open_connection(HOST, self.port, limit=READ_BYTES)
        reader, writer = self._pair
        writer.write(request_bytes(self.port, method, target, headers, body))
        await writer.drain()
        status, answered = await read_head(reader)
        length = int(answered.get("content-length", "0"))
        if answered.get("transfer-encoding") == "chunked":
            content = b"".join([piece async for piece in read_chunked(reader)])
        elif method == "HEAD" or status in (204, 304):
            content = b""
        else:
            content = await reader.readexactly(length)
        if answered.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, answered, content)


async def request_once(
    port: int, method: str, target: str, body: dict[str, Any] | None = None
) -> Answer:
    """One request on a connection of its own. Raises `BrokenError`."""
    connection = Connection(port)
    try:
        encoded = None if body is None else json.dumps(body).encode()
        return await connection.request(method, target, body=encoded)
    finally:
        connection.close()


def request_bytes(
    port: int, method: str, target: str, headers: Mapping[str, str], body: bytes | None
) -> bytes:
    """A request as it goes over the wire."""
    fields = {"Host": f"{HOST}:{port}", **headers}
    if body is not None:
        fields |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *rest = head[:-4].split("\r\n")
    version, _, status = first.partition(" ")
    if version != "HTTP/1.1" or not status[:3].isdigit():
        raise GarbledError(first)
    pairs = (line.partition(":") for line in rest)
    return int(status[:3]), {name.lower(): value.strip() for name, _, value in pairs}


async def read_chunked(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    """The pieces of a chunked body as they come; returns only at its proper end."""
    while True:
        line = await reader.readuntil(b"\r\n")
        try:
            left = int(line.strip(), 16)
        except ValueError:
            raise GarbledError(repr(line)) from None
        if left == 0:
            await reader.readuntil(b"\r\n")
            return
        while left:
            piece = await reader.read(min(left, READ_BYTES))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece
        if await reader.readexactly(2) != b"\r\n":
            raise GarbledError("a chunk does not end where it says")


@dataclass
class Event:
    """One server-sent event."""

    data: str
    event: str | None = None
    id: str | None = None


@dataclass
class EventStream:
    """A stream of server-sent events, parsed as the standard says: what no blank line ends is dropped."""

    status: int
    headers: Mapping[str, str]
    problem: bytes
    retry_ms: int | None = None
    ended_cleanly: bool = False
    _reader: asyncio.StreamReader | None = field(default=None, repr=False)
    _writer: asyncio.StreamWriter | None = field(default=None, repr=False)

    @classmethod
    async def open(
        cls, port: int, target: str, headers: Mapping[str, str] | None = None
    ) -> "EventStream":
        """Returns with the head of the answer. Raises `BrokenError`."""
        writer = None
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                reader, writer = await asyncio.open_connection(HOST, port, limit=READ_BYTES)
                writer.write(request_bytes(port, "GET", target, headers or {}, None))
                status, answered = await read_head(reader)
                stream = cls(status, answered, b"", _reader=reader, _writer=writer)
                if status != 200:
                    length = int(answered.get("content-length", "0"))
                    stream.problem = await reader.readexactly(length)
                return stream
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            if isinstance(error, TimeoutError):
                raise HungError(target) from error
            if isinstance(error, OSError | EOFError | asyncio.LimitOverrunError):
                raise BrokenError(f"{target}: {type(error).__name__}") from error
            raise

    async def events(self, silence_s_max: float) -> AsyncIterator[Event]:
        """Events until the stream's clean end. Raises `BrokenError` or, after silence, `HungError`."""
        assert self._reader is not None
        left = b""
        async with aclosing(read_chunked(self._reader)) as pieces:
            while (piece := await self._next_piece(pieces, silence_s_max)) is not None:
                *blocks, left = (left + piece).split(b"\n\n")
                for block in blocks:
                    event = self._parse(block.decode())
                    if event is not None:
                        yield event
        if left:
            raise GarbledError("a stream that ends cleanly, in the middle of a block")
        self.ended_cleanly = True

    def close(self) -> None:
        """Repeatable."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _next_piece(
        self, pieces: AsyncGenerator[bytes, None], silence_s_max: float
    ) -> bytes | None:
        try:
            async with asyncio.timeout(silence_s_max):
                return await anext(pieces, None)
        except TimeoutError:
            raise HungError("a stream without a heartbeat") from None
        except (OSError, EOFError) as error:
            raise BrokenError(type(error).__name__) from error

    def _parse(self, block: str) -> Event | None:
        """The event of a block; None for one without data."""
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name in fields or name not in ("id", "event", "data", "retry"):
                raise GarbledError(f"a line {name!r} in a block of a stream")
            fields[name] = value
        if "retry" in fields:
            self.retry_ms = int(fields["retry"])
        if "data" not in fields:
            return None
        return Event(fields["data"], fields.get("event"), fields.get("id"))
