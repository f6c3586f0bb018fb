"""A producer that is faster than the disk: what the server's memory grows by while it pushes."""

import socket
import sys
import threading
import time
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.processes import Child, Running, both_servers
from benchmarks.scale import Scale
from benchmarks.wire import WAIT_S, address, message_path, open_produced

CHUNK = "x" * 60_000
MIB = 1024 * 1024
PAGE = 4096
LOOK_S = 0.005
MESSAGE = "m"


class Options(msgspec.Struct, frozen=True):
    """What the producer is told."""

    url: str
    context_id: str
    chunks: int


def measure(scale: Scale) -> Row:
    """The figure."""
    chunks = scale.flood_mib * MIB // len(CHUNK)
    rounds: list[Round] = []
    sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
    for _ in range(scale.flood_rounds):
        with both_servers("bare_relay") as (contextd, bare):
            sides["contextd"].append(flood(contextd, chunks))
            sides["bare"].append(flood(bare, chunks))
        rounds.append(Round(sides["contextd"][-1]["growth_mib"], sides["bare"][-1]["growth_mib"]))
    return make_row(
        name="line_flood",
        what=(
            f"growth of resident memory, at its peak, while {scale.flood_mib} MiB in lines of "
            f"{len(CHUNK):,} bytes come as fast as they are taken"
        ),
        unit="MiB",
        limit_is="a bare ASGI application that throws the same body away",
        goal=Goal(on="value", at_most=128),
        rounds=rounds,
        detail=sides,
    )


def flood(server: Running, chunks: int) -> dict[str, Any]:
    """The peak, what it was before, and how fast the body was taken."""
    process = psutil.Process(server.child.pid)
    with Child("line_flood", Options(server.url, "few", 10)) as few:
        few.read()
        few.wait()
    before = process.memory_info().rss
    peak = before
    done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(LOOK_S):
            peak = max(peak, process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with Child("line_flood", Options(server.url, "many", chunks)) as many:
            seconds = many.read()
            many.wait()
    finally:
        done.set()
        looking.join()
    return {
        "growth_mib": round(max(peak - before, PAGE) / MIB, 3),  # so that it can be compared
        "peak_mib": round(peak / MIB, 1),
        "mib_per_s": round(chunks * len(CHUNK) / MIB / seconds, 1),
    }


def push(options: Options) -> float:
    """Seconds until the whole body is answered."""
    open_produced(options.url, options.context_id, MESSAGE)
    host, port = address(options.url)
    path = message_path(options.context_id, MESSAGE) + "/chunks"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-ndjson\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, port), WAIT_S) as connection:
        started = time.perf_counter()
        connection.sendall(head.encode())
        for sequence in range(1, options.chunks + 1):
            line = f'{{"sequence":{sequence},"content":"{CHUNK}"}}\n'
            connection.sendall(f"{len(line):x}\r\n{line}\r\n".encode())
        connection.sendall(b"0\r\n\r\n")
        answered = b""
        while not answered.endswith(b"}"):
            read = connection.recv(65_536)
            if not read:
                break
            answered += read
        seconds = time.perf_counter() - started
    if not answered.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no success: {answered[:500]!r}")
    return seconds


def main() -> None:
    """The producer's process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(push(options)).decode(), flush=True)


if __name__ == "__main__":
    main()
