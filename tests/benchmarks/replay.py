"""A long message pulled whole from disk, against sqlite3 reading the same rows."""

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.figures import Goal, Row, alternate, make_row
from benchmarks.opening import LEASE_S, open_message
from benchmarks.processes import answer, start_contextd
from benchmarks.replaying import CONTEXT, Options
from benchmarks.scale import Scale
from contextd.app import running
from contextd.settings import Settings

BATCH = 1000
TEXT = "0123456789abcdefghij"


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
    measured.append(answer("replaying", options))
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
        await service.call_steps.end_stream(turn, finish_reason="stop", usage=None, calls=[])
        await service.call_steps.dispatch(turn)
        return live.message_id, live.message_key
