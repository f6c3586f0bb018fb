"""Reads a long message whole: through contextd, or from its database as bare as can be."""

import sqlite3
import sys
import time
from contextlib import closing
from typing import Any

import msgspec

from benchmarks.wire import connect, content_path, get

CONTEXT = "replay"
CHUNK_CHARACTERS = 20
ROWS = "SELECT content FROM chunks WHERE message_key = ? ORDER BY sequence"
JOINED = f"SELECT group_concat(content, '') FROM ({ROWS})"
WARM_PULLS = 8  # more than the server has reading connections: each is open before it counts


class Options(msgspec.Struct, frozen=True):
    """What a reading process is told: a server's address, or a database's path."""

    url: str
    path: str
    message_id: str
    message_key: int
    chunks: int


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
    if len(text) != options.chunks * CHUNK_CHARACTERS:
        raise RuntimeError(f"{len(text)} characters are not {options.chunks} chunks")
    return {"ms": round(elapsed_ms, 3)}


def main() -> None:
    """A reading process."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    found = pull_whole(options) if options.url else read_bare(options)
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
