"""One reader at 50 Hz: from the append to the text in the reader's hands, over loopback HTTP."""

import asyncio
import sys
from time import monotonic_ns
from typing import Any, cast

import msgspec
import uvloop

from benchmarks.figures import Goal, Round, Row, make_row, percentile
from benchmarks.pacing import Pace, read_stamps
from benchmarks.processes import answer, both_servers
from benchmarks.scale import Scale
from benchmarks.watching import attach, newest_delta
from benchmarks.wire import (
    CONTENT_LENGTH,
    WAIT_S,
    address,
    content_path,
    create_context,
    get_request,
    send_text,
)

RATE = 50
CONTEXT = "latency"


class Options(msgspec.Struct, frozen=True):
    """What the reader is told."""

    url: str
    signals: int


def measure(scale: Scale) -> Row:
    """The figure."""
    rounds: list[Round] = []
    sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
    for number in range(scale.latency_rounds):
        with both_servers("bare_stream") as (contextd, bare):
            order = [("contextd", contextd.url), ("bare", bare.url)]
            for side, where in order if number % 2 else reversed(order):
                sides[side].append(answer("latency", Options(where, scale.latency_signals)))
        rounds.append(Round(sides["contextd"][-1]["p50_ms"], sides["bare"][-1]["p50_ms"]))
    return make_row(
        name="latency",
        what=f"one reader at {RATE} Hz: p50 from the append to the text in the reader's hands",
        unit="ms",
        limit_is="the same reader of a bare ASGI stream and a bare pull of ready text, nothing stored",
        goal=Goal(on="value", at_most=3),
        rounds=rounds,
        detail=sides,
    )


class Puller(asyncio.Protocol):
    """A connection that stays open, with one pull in flight (§4.4)."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._message_id = ""
        self._known = 0
        self._held = 0
        self._pulling = False
        self._data = b""
        self._transport: asyncio.WriteTransport | None = None
        self.latencies_ms: list[float] = []
        self.pulls = 0
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to pull."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def take(self, data: bytes, _: int) -> None:
        """Signals: there may be text up to a newer position."""
        found = newest_delta(data)
        if found is not None:
            self._message_id = found[0]
            self._known = max(self._known, found[1])
            self._pull()

    def data_received(self, data: bytes) -> None:
        """Takes an answer once it is whole."""
        self._data += data
        head, _, body = self._data.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head + b"\r\n")
        if length is not None and len(body) == int(length[1]):
            self._data = b""
            self._take(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing follows."""
        if not self.complete.done():
            self.complete.set_exception(exc or ConnectionError("the connection was closed"))

    def _pull(self) -> None:
        if self._pulling or self._held >= self._known:
            return
        assert self._transport is not None
        path = content_path(CONTEXT, self._message_id, self._held)
        self._transport.write(get_request(self._options.url, path))
        self._pulling = True
        self.pulls += 1

    def _take(self, body: bytes) -> None:
        pulled = msgspec.json.decode(body)
        at_ns = monotonic_ns()
        self.latencies_ms += ((at_ns - made) / 1e6 for made in read_stamps(pulled["content"]))
        self._held = pulled["sequence"]
        self._pulling = False
        if self._held >= self._options.signals:
            if not self.complete.done():
                self.complete.set_result(None)
        else:
            self._pull()


async def ready(options: Options) -> Puller:
    """A reader that is attached, and current."""
    loop = asyncio.get_running_loop()
    _, puller = await loop.create_connection(lambda: Puller(options), *address(options.url))
    path = f"/contexts/{CONTEXT}/stream?throttle_ms=0"
    await attach(options.url, [path], lambda _: puller.take)
    return puller


async def latencies(puller: Puller, options: Options) -> dict[str, Any]:
    """What a reader has found, once it has everything."""
    await asyncio.wait_for(puller.complete, options.signals / RATE + WAIT_S)
    return {
        "p50_ms": round(percentile(puller.latencies_ms, 0.5), 3),
        "p99_ms": round(percentile(puller.latencies_ms, 0.99), 3),
        "chunks": len(puller.latencies_ms),
        "pulls": puller.pulls,
    }


async def follow(options: Options) -> dict[str, Any]:
    """The reader, from the first chunk to the last."""
    create_context(options.url, CONTEXT)
    puller = await ready(options)
    send_text(options.url, CONTEXT, msgspec.json.encode(Pace(options.signals, RATE)).decode())
    return await latencies(puller, options)


def main() -> None:
    """The reader's process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(follow(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
