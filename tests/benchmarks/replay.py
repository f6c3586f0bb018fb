"""A long message pulled whole from disk, against sqlite3 reading the same rows."""

import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.figures import Goal, Row, alternate, make_row
from benchmarks.opening import LEASE_S, open_message
from benchmarks.processes import answer, start_contextd
from benchmarks.scale import Scale
from benchmarks.wire import connect, content_path, get
from contextd.app import running
from contextd.settings import Settings

CONTEXT = "replay"
ROWS = "SELECT content FROM chunks WHERE message_key = ? ORDER BY sequence"
JOINED = f"SELECT group_concat(content, '') FROM ({ROWS})"
BATCH = 1000
TEXT = "0123456789abcdefghij"
WARM_PULLS = 8  # more than the server has reading connections: each is open before it counts


class Options(msgspec.Struct, frozen=True):
    """What a reading process is told: a server's address, or a database's path."""

    url: str
    path: str
    message_id: str
    message_key: int
    chunks: int


def measure(scale: Scale) -> Row:
    """The figure. The server that is asked has not written the message: nothing is in its memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contextd.db"
        message_id, message_key = uvloop.run(write(path, scale.replay_chunks))
        with start_contextd(path) as server:
            options = Options(
                server.read_url(), str(path), message_id, message_key, scale.replay_chunks
            )
            served = msgspec.structs.replace(options, path="")
            bare = msgspec.structs.replace(options, url="")
            sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
            rounds = alternate(
                scale.replay_rounds,
                lambda: _milliseconds(served, sides["contextd"]),
                lambda: _milliseconds(bare, sides["bare"]),
            )
    return make_row(
        name="replay",
        what=f"a message of {scale.replay_chunks:,} chunks of {len(TEXT)} bytes pulled whole, from disk",
        unit="ms",
        limit_is="sqlite3 by itself, fetching the rows or joining them, whichever is faster",
        goal=Goal(on="ratio", at_most=3),
        rounds=rounds,
        detail=sides,
    )


def _milliseconds(options: Options, measured: list[dict[str, Any]]) -> float:
    measured.append(answer("replay", options))
    return float(measured[-1]["ms"])


async def write(path: Path, count: int) -> tuple[str, int]:
    """A database with one closed message; its id and key."""
    settings = Settings(database=f"sqlite+aiosqlite:///{path}", lease_s=LEASE_S)
    async with running(settings) as contextd:
        service = contextd.service
        turn, live = await open_message(contextd, CONTEXT)
        left = count - 1  # it was opened with its first
        while left:
            texts = [TEXT] * min(BATCH, left)
            await service.ledger.append(live, fence=turn.fence, texts=texts)
            left -= len(texts)
        await service.steps.end_stream(turn, finish_reason="stop", usage=None)
        await service.steps.finish(turn)
        return live.message_id, live.message_key


def pull_whole(options: Options) -> dict[str, Any]:
    """Milliseconds for all pulls, the decoding of their answers and the joining of their text."""
    connection = connect(options.url)
    for _ in range(WARM_PULLS):
        get(connection, content_path(CONTEXT, options.message_id, options.chunks - 1))
    started = time.perf_counter()
    held, pulls, final = 0, 0, False
    pieces: list[str] = []
    while not final:
        pulled = msgspec.json.decode(
            get(connection, content_path(CONTEXT, options.message_id, held))
        )
        pieces.append(pulled["content"])
        held, final = pulled["sequence"], pulled["final"]
        pulls += 1
    text = "".join(pieces)
    return _timed(started, text, options) | {"pulls": pulls}


def read_bare(options: Options) -> dict[str, Any]:
    """Milliseconds for the same text from the same file, with the connection already open.

    Joined in Python or by SQLite: whichever is faster is the limit.
    """
    with closing(sqlite3.connect(options.path)) as connection:
        connection.execute(ROWS + " LIMIT 1", (options.message_key,)).fetchall()
        started = time.perf_counter()
        rows = connection.execute(ROWS, (options.message_key,)).fetchall()
        fetched = _timed(started, "".join(row[0] for row in rows), options)["ms"]
        started = time.perf_counter()
        (text,) = connection.execute(JOINED, (options.message_key,)).fetchone()
        joined = _timed(started, text, options)["ms"]
    return {"ms": min(fetched, joined), "fetched_ms": fetched, "joined_ms": joined}


def _timed(started: float, text: str, options: Options) -> dict[str, Any]:
    elapsed_ms = (time.perf_counter() - started) * 1000
    if len(text) != options.chunks * len(TEXT):
        raise RuntimeError(f"{len(text)} characters are not {options.chunks} chunks")
    return {"ms": round(elapsed_ms, 3)}


def main() -> None:
    """A reading process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    found = pull_whole(options) if options.url else read_bare(options)
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
