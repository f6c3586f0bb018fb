"""A thousand readers of one message, against a bare stream that gives them ready bytes."""

import asyncio
import sys
from typing import Any

import msgspec
import uvloop

from benchmarks.figures import Goal, Round, Row, make_row, percentile
from benchmarks.pacing import Pace, read_stamps
from benchmarks.processes import answer, both_servers
from benchmarks.scale import Scale
from benchmarks.watching import Heard, attach
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
    """What each reader heard of, and when."""

    def __init__(self, options: Options) -> None:
        self._final = options.signals
        self._left = options.readers
        self._heard: list[list[tuple[int, int]]] = [[] for _ in range(options.readers)]
        self.message_id = ""
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def hear(self, reader: int) -> Heard:
        """What this reader calls."""
        arrivals = self._heard[reader]

        def heard(message_id: str, position: int, at_ns: int) -> None:
            arrivals.append((position, at_ns))
            self.message_id = message_id
            if position == self._final:
                self._left -= 1
                if self._left == 0:
                    self.complete.set_result(None)

        return heard

    @property
    def count(self) -> int:
        """Signals received, over all readers."""
        return sum(len(arrivals) for arrivals in self._heard)

    def latencies_ms(self, stamps: list[int]) -> list[float]:
        """For each reader and position, how long it took; a merged signal tells several positions."""
        found: list[float] = []
        for arrivals in self._heard:
            told = 0
            for position, at_ns in arrivals:
                found += ((at_ns - stamp) / 1e6 for stamp in stamps[told:position])
                told = max(told, position)
        return found


async def watch(options: Options) -> dict[str, Any]:
    """All readers, from the first signal to the last."""
    create_context(options.url, CONTEXT)
    arrivals = Arrivals(options)
    path = f"/contexts/{CONTEXT}/stream?throttle_ms=0"
    await attach(options.url, [path] * options.readers, arrivals.hear)
    pace = Pace(options.signals, RATE)
    send_text(options.url, CONTEXT, msgspec.json.encode(pace).decode())
    await asyncio.wait_for(arrivals.complete, options.signals / RATE + WAIT_S)
    latencies = arrivals.latencies_ms(_stamps(options.url, arrivals.message_id))
    return {
        "p50_ms": round(percentile(latencies, 0.5), 3),
        "p99_ms": round(percentile(latencies, 0.99), 3),
        "max_ms": round(max(latencies), 3),
        "merged_share": round(1 - arrivals.count / len(latencies), 4),
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
