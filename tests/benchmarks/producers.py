"""Producers, as cheap as Python can have them: bytes made beforehand, and answers hardly looked at.

They share the machine with the server. So the clock runs over nothing but writes and reads: it starts
before the first byte goes out, and stops when the last answer has come, which says that all is durable.
"""

import asyncio
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from benchmarks.pacing import TEXT
from benchmarks.wire import address, connect, get, message_path, open_produced

RUN_S = 100
LINES_A_PIECE = 100  # of a body that is sent piece by piece, as by somebody who has a buffer
MESSAGE = "m"
STREAMS = "/v1/stream/"  # of those who speak the Durable Streams protocol

Shape = Literal["lines", "batches", "posts"]
Protocol = Literal["contextd", "durable_streams"]
Request = tuple[bytes, bytes]  # head and body; many requests share a body


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the producers are told: `chunks` in each of `requests` from each of `connections`.

    The requests of a connection go to a message of their own, one after the other.
    """

    url: str
    server_pid: int
    run: str
    shape: Shape
    connections: int
    requests: int
    chunks: int
    protocol: Protocol = "contextd"


def lines(count: int) -> bytes:
    """A body of numbered lines."""
    return b"".join(
        b'{"sequence":%d,"content":"%b"}\n' % (n, TEXT.encode()) for n in _numbers(count)
    )


def in_pieces(body: bytes, lines_each: int) -> bytes:
    """The body as it is on the wire when its length is not known beforehand."""
    rows = body.splitlines(keepends=True)
    pieces = [b"".join(rows[at : at + lines_each]) for at in range(0, len(rows), lines_each)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def bodies(options: Options) -> Iterator[bytes]:
    """Of one connection's requests. Those of all connections are alike."""
    if options.shape == "lines":
        yield in_pieces(lines(options.chunks), LINES_A_PIECE)
        return
    for number in range(options.requests):
        sequences = [number * options.chunks + n for n in _numbers(options.chunks)]
        if options.protocol == "durable_streams":
            yield TEXT.encode() if options.shape == "posts" else _json([TEXT] * options.chunks)
        elif options.shape == "posts":
            yield _json({"sequence": sequences[0], "content": TEXT})
        else:
            yield _json({"chunks": [{"sequence": n, "content": TEXT} for n in sequences]})


def head(options: Options, path: str, length: int) -> bytes:
    """Of one request, on a connection that stays open."""
    host, port = address(options.url)
    framing = f"Content-Length: {length}"
    media_type = "application/json"
    if options.shape == "lines":
        framing, media_type = "Transfer-Encoding: chunked", "application/x-ndjson"
    elif options.protocol == "durable_streams":
        media_type = stream_type(options)
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {media_type}\r\n{framing}\r\n\r\n"
    ).encode()


def stream_type(options: Options) -> str:
    """What a stream holds: bare text is the cheapest, and only JSON takes several at a time."""
    return "text/plain" if options.shape == "posts" else "application/json"


def requests(options: Options, path: str, shared: Sequence[bytes]) -> Iterator[Request]:
    """All requests of one connection."""
    heads: dict[int, bytes] = {}
    for body in shared:
        if len(body) not in heads:
            heads[len(body)] = head(options, path, len(body))
        yield heads[len(body)], body


class Run:
    """How many connections are still at work."""

    def __init__(self, connections: int) -> None:
        self._left = connections
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def leave(self) -> None:
        """One has all its answers."""
        self._left -= 1
        if self._left == 0 and not self.finished.done():
            self.finished.set_result(None)

    def fail(self, why: str) -> None:
        """Ends the run."""
        if not self.finished.done():
            self.finished.set_exception(RuntimeError(why))


class Connection(asyncio.Protocol):
    """Sends a request when the one before is answered."""

    def __init__(self, waiting: Iterable[Request], answer_end: bytes, run: Run) -> None:
        self._waiting = iter(list(waiting))
        self._answer_end = answer_end
        self._run = run
        self._answering = False
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Waits for `ask`."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Looks at how an answer begins and how it ends: no other byte can end it."""
        if not self._answering and not data.startswith(b"HTTP/1.1 2"):
            self._run.fail(f"refused: {data[:500]!r}")
        self._answering = not data.endswith(self._answer_end)
        if not self._answering:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """No server closes a connection that is in use."""
        self._run.fail("the server closed a connection")

    def ask(self) -> None:
        """The next request, or none."""
        assert self._transport is not None
        request = next(self._waiting, None)
        if request is None:
            self._run.leave()
        else:
            self._transport.writelines(request)

    def close(self) -> None:
        """Done."""
        assert self._transport is not None
        self._transport.close()


async def produce(options: Options) -> dict[str, Any]:
    """Seconds for all chunks, and what they cost in processor time."""
    paths = [open_target(options, number) for number in range(options.connections)]
    shared = list(bodies(options))
    loop = asyncio.get_running_loop()
    run = Run(options.connections)
    end = b"}" if options.protocol == "contextd" else b"\r\n\r\n"
    connections = []
    for path in paths:
        _, connection = await loop.create_connection(
            lambda path=path: Connection(requests(options, path, shared), end, run),  # type: ignore[misc]
            *address(options.url),
        )
        connections.append(connection)
    server, own = psutil.Process(options.server_pid), psutil.Process()
    used = [_cpu_s(server), _cpu_s(own)]
    started = time.perf_counter()
    for connection in connections:
        connection.ask()
    await asyncio.wait_for(run.finished, RUN_S)
    seconds = time.perf_counter() - started
    used = [_cpu_s(server) - used[0], _cpu_s(own) - used[1]]
    for connection in connections:
        connection.close()
    check(options)
    return {"seconds": seconds, "server_cpu_s": used[0], "client_cpu_s": used[1]}


def open_target(options: Options, number: int) -> str:
    """Opens what one connection writes to; the path of its appends."""
    if options.protocol == "durable_streams":
        path = f"{STREAMS}{options.run}-{number}"
        connection = connect(options.url)
        connection.request("PUT", path, headers={"Content-Type": stream_type(options)})
        assert connection.getresponse().status in (200, 201)
        connection.close()
        return path
    context_id = f"{options.run}-{number}"
    open_produced(options.url, context_id, MESSAGE)
    return message_path(context_id, MESSAGE) + "/chunks"


def check(options: Options) -> None:
    """All that was sent is there."""
    if options.protocol == "durable_streams":
        return
    connection = connect(options.url)
    for number in range(options.connections):
        path = message_path(f"{options.run}-{number}", MESSAGE)
        found = msgspec.json.decode(get(connection, path))["current_sequence"]
        assert found == options.requests * options.chunks, f"{path} has {found} chunks"
    connection.close()


def _numbers(count: int) -> range:
    return range(1, count + 1)


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """The producers' process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(produce(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
