"""How a producer of the fault run speaks HTTP: over bare sockets, in ways that a tidy client would not.

A body of NDJSON goes out in pieces that fall anywhere, also inside a character, while the answer is
listened for; a request can be ended in its middle, with the connection still open for the answer.
"""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from raw_http import (
    HOST,
    READ_BYTES,
    REQUEST_S_MAX,
    Answer,
    BrokenError,
    Connection,
    HungError,
    read_chunked,
    read_head,
    request_bytes,
)

LAST_WORD_S = 2.0  # for an answer that came before its request could be written to the end
HALF_S_MAX = 10.0


class Wire:
    """One producer's connections, one request at a time."""

    def __init__(self, port: int, port_file: str, random: Random) -> None:
        self._port = port
        self._port_file = Path(port_file)
        self._random = random
        self._kept: Connection | None = None

    async def ask(self, method: str, target: str, body: dict[str, Any] | None = None) -> Answer:
        """Raises `BrokenError` or `HungError`."""
        if self._kept is None or self._several or self._random.random() < 0.3:
            self.hang_up()
            self._kept = Connection(self._port)
        return await self._kept.request(method, target, body=self._encode(body))

    async def stream(self, target: str, lines: Sequence[dict[str, Any]], pace_s: float) -> Answer:
        """A body of lines, with or without a length. Raises `BrokenError` or `HungError`."""
        body = self._join(lines)
        chunked = pace_s > 0 or self._random.random() < 0.5
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        head = ndjson_head(self._port, target, framing)
        pieces = self._split(body)
        if chunked:
            pieces = [*map(frame, pieces), b"0\r\n\r\n"]
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                return await self._exchange([head, *pieces], pace_s)
        except TimeoutError:
            raise HungError(target) from None
        except (OSError, EOFError) as error:
            raise BrokenError(f"{target}: {type(error).__name__}") from error

    async def stop_halfway(self, target: str, lines: Sequence[dict[str, Any]]) -> Answer | None:
        """A request whose end never comes, straight to the server; its answer, if it gives one."""
        port = self.direct_port()
        if port is None:
            return None
        if self._random.random() < 0.5:
            head = ndjson_head(port, target, "Transfer-Encoding: chunked")
            whole = head + b"".join(map(frame, self._split(self._join(lines))))
        else:
            body = self._encode({"chunks": [line for line in lines if "content" in line]})
            whole = request_bytes(port, "POST", target, {}, body)[:-1]
        try:
            async with asyncio.timeout(HALF_S_MAX):
                return await _half_exchange(port, whole[: self._random.randrange(len(whole))])
        except (OSError, EOFError):  # a timeout is one of them
            return None

    def hang_up(self) -> None:
        """Repeatable."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def direct_port(self) -> int | None:
        """A server's own, None while there is none."""
        with suppress(IndexError):
            return self._random.choice(self._ports())
        return None

    @property
    def _several(self) -> bool:
        """Whether the next request is to come to another server."""
        return len(self._ports()) > 1

    def _ports(self) -> list[int]:
        with suppress(OSError, ValueError):
            return [*map(int, self._port_file.read_text().split())]
        return []

    def _encode(self, body: dict[str, Any] | None) -> bytes | None:
        """With the characters themselves, or all of them escaped."""
        if body is None:
            return None
        return json.dumps(body, ensure_ascii=self._random.random() < 0.3).encode()

    def _join(self, lines: Sequence[dict[str, Any]]) -> bytes:
        """Blank lines count for nothing, and the last line needs no end."""
        written = b""
        for line in lines:
            written += (self._encode(line) or b"") + self._random.choice((b"\n",) * 12 + (b"\n\n",))
        return written[:-1] if self._random.random() < 0.2 else written

    def _split(self, body: bytes) -> list[bytes]:
        size_max = self._random.choice((7, 60, 500, 4000, 70_000))
        size_max = max(size_max, len(body) // 300)
        pieces, at = [], 0
        while at < len(body):
            size = self._random.randint(1, size_max)
            pieces.append(body[at : at + size])
            at += size
        return pieces

    async def _exchange(self, pieces: Sequence[bytes], pace_s: float) -> Answer:
        reader, writer = await asyncio.open_connection(HOST, self._port, limit=READ_BYTES)
        answering = asyncio.create_task(_read_answer(reader))
        try:
            with suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await self._pause(answering, pace_s)
                    if answering.done():
                        break
                return await answering
            async with asyncio.timeout(LAST_WORD_S):
                return await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            writer.transport.abort()

    async def _pause(self, answering: "asyncio.Task[Answer]", pace_s: float) -> None:
        if pace_s and self._random.random() < 0.2:
            await asyncio.wait([answering], timeout=self._random.uniform(0, pace_s))


def ndjson_head(port: int, target: str, framing: str) -> bytes:
    """The head of a request with a body of lines."""
    fields = (f"Host: {HOST}:{port}", "Content-Type: application/x-ndjson", framing)
    return "\r\n".join([f"POST {target} HTTP/1.1", *fields, "", ""]).encode()


def frame(piece: bytes) -> bytes:
    """A piece of a body without a length."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


async def _half_exchange(port: int, begun: bytes) -> Answer:
    reader, writer = await asyncio.open_connection(HOST, port, limit=READ_BYTES)
    try:
        writer.write(begun)
        await writer.drain()
        writer.write_eof()
        return await _read_answer(reader)
    finally:
        writer.transport.abort()


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    status, headers = await read_head(reader)
    if headers.get("transfer-encoding") == "chunked":
        content = b"".join([piece async for piece in read_chunked(reader)])
    else:
        content = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(status, headers, content)
