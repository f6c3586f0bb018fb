"""A thousand readers of one message, against a bare stream that gives them ready bytes."""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import uvloop

from benchmarks.figures import Goal, Round, Row, make_row, percentile
from benchmarks.pacing import Pace, read_stamps
from benchmarks.processes import answer, both_servers
from benchmarks.scale import Scale
from benchmarks.watching import Take, attach, newest_delta, unfinished
from benchmarks.wire import WAIT_S, connect, content_path, create_context, get, send_text

RATE = 20
CONTEXT = "readers"


class Options(msgspec.Struct, frozen=True):
    """What the client is told."""

    url: str
    readers: int
    signals: int


def measure(scale: Scale) -> Row:
    """The figure. Each round has servers of its own, so that no stream is left over from another."""
    rounds: list[Round] = []
    sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
    for number in range(scale.reader_rounds):
        with both_servers("bare_stream") as (contextd, bare):
            order = [("contextd", contextd.url), ("bare", bare.url)]
            for side, where in order if number % 2 else reversed(order):
                options = Options(where, scale.readers, scale.reader_signals)
                sides[side].append(answer("readers", options))
        rounds.append(Round(sides["contextd"][-1]["p99_ms"], sides["bare"][-1]["p99_ms"]))
    return make_row(
        name="readers",
        what=f"{scale.readers} readers, {RATE} signals/s: p99 from the append to the signal's receipt",
        unit="ms",
        limit_is="a bare ASGI stream of ready bytes, one wake-up a reader, nothing stored",
        goal=Goal(on="ratio", at_most=1.5),
        rounds=rounds,
        detail=sides,
    )


class Arrivals:
    """What each reader read, and when. It is looked at afterwards: a slow client measures itself."""

    def __init__(self, options: Options) -> None:
        self._last = b'"current_sequence":%d,"role":"assistant"' % options.signals
        self._left = options.readers
        self._reads: list[list[tuple[bytes, int]]] = [[] for _ in range(options.readers)]
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def taker(self, reader: int) -> Take:
        """What this reader calls."""
        reads = self._reads[reader]

        def take(data: bytes, at_ns: int) -> None:
            reads.append((data, at_ns))
            if self._last in data:
                self._left -= 1
                if self._left == 0:
                    self.complete.set_result(None)

        return take

    def deltas(self, reader: int) -> Iterator[tuple[str, int, int]]:
        """Message id, position and nanoseconds of each read in which the reader heard of something."""
        rest = b""
        for data, at_ns in self._reads[reader]:
            found = newest_delta(rest + data)
            rest = unfinished(rest + data)
            if found is not None:
                yield *found, at_ns


def latencies_ms(arrivals: Arrivals, readers: int, stamps: list[int]) -> tuple[list[float], int]:
    """For each reader and position, how long it took; and in how many signals they came.

    A signal that was merged with others tells of several positions.
    """
    found: list[float] = []
    signals = 0
    for reader in range(readers):
        told = 0
        for _, position, at_ns in arrivals.deltas(reader):
            found += ((at_ns - stamp) / 1e6 for stamp in stamps[told:position])
            signals += position > told
            told = max(told, position)
    return found, signals


async def watch(options: Options) -> dict[str, Any]:
    """All readers, from the first signal to the last."""
    create_context(options.url, CONTEXT)
    arrivals = Arrivals(options)
    path = f"/contexts/{CONTEXT}/stream?throttle_ms=0"
    await attach(options.url, [path] * options.readers, arrivals.taker)
    pace = Pace(options.signals, RATE)
    send_text(options.url, CONTEXT, msgspec.json.encode(pace).decode())
    await asyncio.wait_for(arrivals.complete, options.signals / RATE + WAIT_S)
    message_id = next(arrivals.deltas(0))[0]
    latencies, signals = latencies_ms(arrivals, options.readers, _stamps(options.url, message_id))
    return {
        "p1_ms": round(percentile(latencies, 0.01), 3),
        "p50_ms": round(percentile(latencies, 0.5), 3),
        "p99_ms": round(percentile(latencies, 0.99), 3),
        "max_ms": round(max(latencies), 3),
        "merged_share": round(1 - signals / len(latencies), 4),
    }


def _stamps(url: str, message_id: str) -> list[int]:
    """When each chunk was appended: the message's own text says so."""
    body = get(connect(url), content_path(CONTEXT, message_id, 0))
    return read_stamps(msgspec.json.decode(body)["content"])


def main() -> None:
    """The readers' process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(watch(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
