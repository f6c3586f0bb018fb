"""From a line of an open body to the text in a reader's hands, which are on connections of their own."""

import asyncio
import sys
from typing import Any

import msgspec
import uvloop

from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.latency import CONTEXT, RATE, Options, latencies, ready
from benchmarks.pacing import Pace, beats, stamp
from benchmarks.processes import answer, both_servers
from benchmarks.scale import Scale
from benchmarks.wire import address, message_path, open_produced

MESSAGE = "m"


def measure(scale: Scale) -> Row:
    """The figure."""
    rounds: list[Round] = []
    sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
    for number in range(scale.line_latency_rounds):
        with both_servers("bare_relay") as (contextd, bare):
            order = [("contextd", contextd.url), ("bare", bare.url)]
            for side, where in order if number % 2 else reversed(order):
                options = Options(where, scale.line_latency_chunks)
                sides[side].append(answer("line_latency", options))
        rounds.append(Round(sides["contextd"][-1]["p50_ms"], sides["bare"][-1]["p50_ms"]))
    return make_row(
        name="line_latency",
        what=f"a line of an open NDJSON body at {RATE} Hz: p50 until its text is in a reader's hands",
        unit="ms",
        limit_is="the same producer and reader of a bare ASGI application, nothing stored",
        goal=Goal(on="value", at_most=5),
        rounds=rounds,
        detail=sides,
    )


async def relay(options: Options) -> dict[str, Any]:
    """A producer and a reader."""
    open_produced(options.url, CONTEXT, MESSAGE)
    puller = await ready(options)
    host, port = address(options.url)
    _, body = await asyncio.open_connection(host, port)
    path = message_path(CONTEXT, MESSAGE) + "/chunks"
    body.write(
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-ndjson\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    async for sequence in beats(Pace(options.signals, RATE)):
        line = b'{"sequence":%d,"content":"%b"}\n' % (sequence, stamp().encode())
        body.write(b"%x\r\n%b\r\n" % (len(line), line))
    found = await latencies(puller, options)
    body.close()
    return found


def main() -> None:
    """The process of both."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(relay(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
