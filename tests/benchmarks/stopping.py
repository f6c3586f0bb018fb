"""Seconds from SIGTERM to the end of the process, with streams open and turns running."""

import time
from typing import Any

import msgspec

from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.holding import Options
from benchmarks.pacing import Pace
from benchmarks.processes import Child, Command, both_servers
from benchmarks.scale import Scale

TURN = Pace(chunks=1_000_000, rate=50)
# A bare stream gives all readers everything: as much as each gets of its one context's turn here.
BARE_TURN = Pace(chunks=1_000_000, rate=10)


def measure(scale: Scale) -> Row:
    """The figure."""
    rounds: list[Round] = []
    sides: dict[str, list[dict[str, Any]]] = {"contextd": [], "bare": []}
    for _ in range(scale.exit_rounds):
        with both_servers("bare_stream") as (contextd, bare):
            options = _options(contextd.url, scale.exit_streams, scale.exit_turns, TURN)
            sides["contextd"].append(stop(contextd.child, options))
            bare_options = _options(bare.url, scale.exit_streams, 1, BARE_TURN)
            sides["bare"].append(stop(bare.child, bare_options))
        rounds.append(Round(sides["contextd"][-1]["seconds"], sides["bare"][-1]["seconds"]))
    return make_row(
        name="stopping",
        what=f"SIGTERM to exit with {scale.exit_streams} open streams and {scale.exit_turns} turns",
        unit="s",
        limit_is="a bare ASGI server that ends as many streams",
        goal=Goal(on="value", at_most=3),
        rounds=rounds,
        detail=sides,
    )


def stop(server: Command, options: Options) -> dict[str, Any]:
    """Stops a server that has its hands full."""
    with Child("holding", options) as client:
        opened = client.read()["open"]
        started = time.perf_counter()
        code = server.stop()
        seconds = time.perf_counter() - started
        ended = client.read()["ended"]
        client.wait()
    return {"seconds": round(seconds, 3), "exit_code": code, "ended_share": ended / opened}


def _options(url: str, streams: int, contexts: int, turn: Pace) -> Options:
    text = msgspec.json.encode(turn).decode()
    return Options(url=url, streams=streams, contexts=contexts, text=text)
