"""How soon the server answers others, and how soon it stops, while a client does its worst.

Run by hand, with `tests` on the path: `python -m benchmarks.attacks`. For each attack a server of its own
is asked for `/health/live` over a kept connection by this process, first in quiet and then while another
process attacks; then it gets SIGTERM in the middle of the attack. One table row is one attack.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from forks import write_deep
from rich.console import Console
from rich.table import Table
from serving import Server

from benchmarks.figures import percentile

PAUSE_S = 0.005
WARM_S = 0.5
P99_MS_MAX, STOP_S_MAX = 100.0, 3.0
EXCESS = Path(__file__).resolve().parent.parent / "tools" / "mcp_excess.py"
HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\n" + HOST
CHUNKED = b"POST /contexts HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
ODD = [
    b"GET /machine HTTP/1.1\r\n" + HOST + b"Accept: text/html;q=1e999\r\n\r\n",
    b"GET /contexts//x HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /contexts/%2f%2e%2e HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /contexts HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    b"GET /contexts HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"\x16\x03\x01\r\n\r\n",
]


class Found(msgspec.Struct, frozen=True):
    """What was measured of one attack: health in milliseconds, the stop in seconds."""

    attack: str
    quiet_p99_ms: float
    p99_ms: float
    worst_ms: float
    answers: int
    stop_s: float
    exit_code: int


async def exchange(port: int, *sent: bytes, read: bool = True, hold_s: float = 0) -> None:
    """Sends on a new connection, and reads until the server closes or says something."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in sent:
            writer.write(piece)
            await writer.drain()
        if hold_s:
            await asyncio.sleep(hold_s)
        if read:
            await reader.read(65536)
    finally:
        writer.transport.abort()


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\n".encode() + HOST + JSON
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def slow_heads(port: int) -> None:
    await exchange(port, LIVE + b"X: " + b"a" * 20_000, hold_s=0.5, read=False)


async def long_heads(port: int) -> None:
    await exchange(port, LIVE + b"a: b\r\n" * 40_000)


async def many_keys(port: int) -> None:
    values = b",".join(b'"%x":0' % number for number in range(400_000))
    await exchange(port, post("/contexts", b'{"metadata":{' + values + b"}}"))


async def many_objects(port: int) -> None:
    values = b"{}," * 1_500_000
    await exchange(port, post("/contexts", b'{"metadata":{"a":[' + values + b"0]}}"))


async def long_texts(port: int) -> None:
    body = json.dumps(
        {"payload": {"type": "text", "content": "x\n" * 4_000_000}, "respond": False}
    ).encode()
    await exchange(port, post("/contexts/c/messages", body))


async def escaped_texts(port: int) -> None:
    body = (
        b'{"respond": false, "payload": {"type": "text", "content": "'
        + rb"\u00e9" * 1_600_000
        + b'"}}'
    )
    await exchange(port, post("/contexts/c/messages", body))


async def small_chunks(port: int) -> None:
    await exchange(port, CHUNKED + b"2\r\n{ \r\n" * 20_000, hold_s=0.2)


async def requests_ahead(port: int) -> None:
    await exchange(port, b"".join(ODD[2] for _ in range(2000)), hold_s=0.2)


async def no_reading(port: int) -> None:
    asked = b"GET /contexts/large/messages/m/content HTTP/1.1\r\n" + HOST + b"\r\n"
    await exchange(port, asked * 50, hold_s=0.5, read=False)


async def abandoned(port: int) -> None:
    asked = b"GET /contexts/p/messages/m/content?wait=30 HTTP/1.1\r\n" + HOST + b"\r\n"
    await exchange(port, asked, read=False)


async def odd_requests(port: int) -> None:
    for request in ODD:
        await exchange(port, request)


async def deep_branch(port: int) -> None:
    asked = b"GET /contexts/deep/messages?limit=200 HTTP/1.1\r\n" + HOST + b"\r\n"
    await exchange(port, asked)


async def long_results(port: int) -> None:
    script = {"script": [{"tool_call": {"name": "e__t", "arguments": {}}}, {"text": "end"}]}
    body = json.dumps(
        {"payload": {"type": "text", "content": json.dumps(script)}, "on_busy": "enqueue"}
    ).encode()
    await exchange(port, post("/contexts/c/messages", body))
    await asyncio.sleep(0.2)


ATTACKS: dict[str, tuple[Callable[[int], Awaitable[None]], int]] = {
    "slow heads": (slow_heads, 200),
    "heads without end": (long_heads, 4),
    "JSON of many keys": (many_keys, 4),
    "JSON of many objects": (many_objects, 4),
    "long texts": (long_texts, 4),
    "long texts, escaped": (escaped_texts, 4),
    "bodies of small chunks": (small_chunks, 8),
    "requests ahead": (requests_ahead, 8),
    "answers not read": (no_reading, 50),
    "abandoned long polls": (abandoned, 50),
    "odd requests": (odd_requests, 8),
    "a branch 20,000 forks deep": (deep_branch, 8),
    "long results of an MCP server": (long_results, 1),
}


def attack(name: str, port: int) -> None:
    """The attacking process; it is killed when it is no longer needed."""
    one, at_once = ATTACKS[name]

    async def again_and_again() -> None:
        while True:
            with suppress(OSError):
                await one(port)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(again_and_again() for _ in range(at_once)))

    asyncio.run(all_of_them())


def healths(url: str, seconds: float) -> list[float]:
    """How long each answer took, in milliseconds."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    took: list[float] = []
    until = time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        connection.request("GET", "/health/live")
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        took.append((time.monotonic() - began) * 1000)
        time.sleep(PAUSE_S)
    connection.close()
    return took


def prepare(url: str) -> None:
    """What the attacks ask for."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)

    def ask(method: str, path: str, body: Any) -> None:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        assert response.status in (200, 201, 202), said

    for context_id in ("c", "large", "p"):
        ask("POST", "/contexts", {"id": context_id})
    large = {
        "payload": {"type": "text", "content": "x" * 1_000_000},
        "respond": False,
        "message_id": "m",
    }
    ask("POST", "/contexts/large/messages", large)
    ask("PUT", "/contexts/p/messages/m", {"producer": {"id": "p"}})
    connection.close()


def measure(name: str, folder: Path, seconds: float) -> Found:
    """One attack on a server of its own."""
    database = folder / f"{list(ATTACKS).index(name)}.db"
    settings: dict[str, object] = {"scripted_rate": 0}
    if name == "long results of an MCP server":
        entry = {"command": sys.executable, "args": [str(EXCESS), "long"]}
        file = folder / "mcp.json"
        file.write_text(json.dumps({"mcpServers": {"e": {**entry, "requires_approval": False}}}))
        settings["mcp_servers"] = file
    if name.startswith("a branch"):
        asyncio.run(write_deep(f"sqlite+aiosqlite:///{database}", dict(os.environ), 20_000))
    with Server(database, settings=settings) as server:
        prepare(server.url)
        quiet = healths(server.url, seconds)
        attacker = multiprocessing.get_context("spawn").Process(
            target=attack, args=(name, server.port)
        )
        attacker.start()
        try:
            healths(server.url, WARM_S)
            under = healths(server.url, seconds)
            began = time.monotonic()
            code = server.stop(signal.SIGTERM)
            stop_s = time.monotonic() - began
        finally:
            attacker.kill()
            attacker.join()
    return Found(
        name, percentile(quiet, 0.99), percentile(under, 0.99), max(under), len(under), stop_s, code
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.attacks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of quiet, and of each attack")
    parser.add_argument("--only", action="append", choices=ATTACKS, metavar="NAME")
    options = parser.parse_args()
    table = Table(
        "attack", "quiet p99 ms", "p99 ms", "worst ms", "answers", "SIGTERM s", "exit", ""
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or ATTACKS:
            found = measure(name, Path(folder), options.seconds)
            good = found.p99_ms <= P99_MS_MAX and found.stop_s <= STOP_S_MAX
            figures = (found.quiet_p99_ms, found.p99_ms, found.worst_ms)
            table.add_row(
                name,
                *(f"{figure:.1f}" for figure in figures),
                str(found.answers),
                f"{found.stop_s:.2f}",
                str(found.exit_code),
                "[green]met[/]" if good else "[red]missed[/]",
            )
            sys.stderr.write(f"{found}\n")
    Console().print(table)


if __name__ == "__main__":
    main()
