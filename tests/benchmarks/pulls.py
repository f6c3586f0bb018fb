"""Pulls of the live tail, against an empty Litestar handler."""

import asyncio
import socket
import sys
import time
from typing import Any, cast

import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from benchmarks.figures import Goal, Row, alternate, make_row
from benchmarks.pacing import Pace
from benchmarks.processes import answer, both_servers
from benchmarks.scale import Scale
from benchmarks.wire import (
    CONTENT_LENGTH,
    WAIT_S,
    address,
    content_path,
    create_context,
    finished_answer,
    get_request,
    send_text,
)

CONNECTIONS = 32
CHUNKS = 200
NEW_CHUNKS = 3  # as many as a reader finds between two looks
CONTEXT = "pulls"


class Options(msgspec.Struct, frozen=True):
    """What the load generator is told."""

    url: str
    path: str
    server_pid: int
    pulls: int


def measure(scale: Scale) -> Row:
    """The figure."""
    with both_servers("bare_empty") as (contextd, bare):
        path = written_message(contextd.url)
        pull = Options(contextd.url, path, contextd.child.pid, scale.pulls)
        nothing = Options(bare.url, "/", bare.child.pid, scale.pulls)
        cpu_us: dict[str, list[float]] = {"contextd": [], "bare": []}
        rounds = alternate(
            scale.pull_rounds,
            lambda: generate(pull, cpu_us["contextd"]),
            lambda: generate(nothing, cpu_us["bare"]),
        )
    return make_row(
        name="pulls",
        what=f"pulls of the {NEW_CHUNKS} newest chunks of a live message, {CONNECTIONS} connections",
        unit="requests/s",
        limit_is="an empty Litestar @asgi handler under the same uvicorn options",
        goal=Goal(on="ratio", at_least=0.6),
        rounds=rounds,
        detail={"server_cpu_us_per_answer": cpu_us},
    )


def written_message(url: str) -> str:
    """Writes a message and waits for its end; the path of a pull of its newest chunks."""
    create_context(url, CONTEXT)
    send_text(url, CONTEXT, msgspec.json.encode(Pace(CHUNKS, 0)).decode())
    message_id = finished_answer(url, CONTEXT)
    return content_path(CONTEXT, message_id, CHUNKS - NEW_CHUNKS)


def generate(options: Options, cpu_us: list[float]) -> float:
    """Answers a second of one run; notes what one cost the server, which no neighbour changes much."""
    found = answer("pulls", options)
    cpu_us.append(round(found["server_cpu_s"] / options.pulls * 1e6, 1))
    return float(options.pulls / found["seconds"])


class Connection(asyncio.Protocol):
    """Asks again as soon as it has its answer, which always has the same length."""

    def __init__(self, request: bytes, length: int, counter: "Counter") -> None:
        self._request = request
        self._length = length
        self._counter = counter
        self._missing = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks for the first time."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Counts bytes: the answers were read once, and are all alike."""
        self._missing -= len(data)
        if self._missing == 0 and self._counter.another():
            self._ask()
        elif self._missing < 0:
            self._counter.fail("an answer is longer than the first")

    def connection_lost(self, exc: Exception | None) -> None:
        """No server of ours closes a connection that is in use."""
        self._counter.fail("the server closed a connection")

    def _ask(self) -> None:
        assert self._transport is not None
        self._missing = self._length
        self._transport.write(self._request)


class Counter:
    """How many answers are still to come, over all connections."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def another(self) -> bool:
        """One more answer has come; whether to ask again."""
        self._left -= 1
        if self._left <= 0 and not self.finished.done():
            self.finished.set_result(None)
        return self._left > 0

    def fail(self, why: str) -> None:
        """Ends the run."""
        if not self.finished.done():
            self.finished.set_exception(RuntimeError(why))


def answer_length(options: Options, request: bytes) -> int:
    """Bytes of the answer, head and body, which must be a success."""
    with socket.create_connection(address(options.url), WAIT_S) as connection:
        connection.sendall(request)
        data = b""
        while True:
            data += connection.recv(65_536)
            head, end, body = data.partition(b"\r\n\r\n")
            found = CONTENT_LENGTH.search(head + b"\r\n")
            if end and found and len(body) == int(found[1]):
                break
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no success: {data[:200]!r}")
    return len(data)


async def run(options: Options) -> dict[str, Any]:
    """Seconds for all pulls, over connections that stay open, one request at a time on each."""
    request = get_request(options.url, options.path)
    length = answer_length(options, request)
    loop = asyncio.get_running_loop()
    for count in (options.pulls // 10, options.pulls):  # first a tenth, to warm up
        counter = Counter(count)
        used = cpu_s(options.server_pid)
        started = time.perf_counter()
        connections = [
            await loop.create_connection(
                lambda counter=counter: Connection(request, length, counter),  # type: ignore[misc]
                *address(options.url),
            )
            for _ in range(CONNECTIONS)
        ]
        await counter.finished
        seconds = time.perf_counter() - started
        used = cpu_s(options.server_pid) - used
        for transport, _ in connections:
            transport.close()
    return {"seconds": seconds, "server_cpu_s": used}


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """The load generator."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(run(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
