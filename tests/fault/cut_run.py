"""Readers and senders behind a proxy that cuts their connections, until enough has been cut."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crowd import Crowd, Manners
from cutting_proxy import STREAM_MARKS, CuttingProxy
from evidence import Evidence
from fleet import Fleet
from holdings import World
from unwatched import Unwatched
from verdict import check_whole
from witness import SQLITE_PREFIX, Witness

ROUND_CUTS = 500
ROUND_S_MAX = 300.0

# Each round has one of these: limits so small that pulls come in many pieces, and memory so short that
# the database must answer, break other things than the defaults do.
PROFILES: tuple[Mapping[str, object], ...] = (
    {"tail_bytes_max": 3000, "pull_bytes_max": 2000},
    {},
    {"tail_bytes_max": 1, "throttle_ms": 30},
    {"throttle_ms": 0, "readers": 1, "pull_bytes_max": 20_000},
)


async def run_cuts(
    *,
    cuts: int,
    seed: str,
    folder: Path,
    url: str | None = None,
    servers: int = 1,
    round_cuts: int = ROUND_CUTS,
    show: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Raises `AssertionError` with the seed when anything was wrong; else what was done, in numbers.

    `servers`: how many work on the database; each connection goes to the next one. `url`: an empty
    database to use; without it each round has a SQLite file of its own in `folder`.
    """
    total: Counter[str] = Counter()
    started = time.monotonic()
    done = number = 0
    while done < cuts:
        wanted = min(round_cuts, cuts - done)
        round_url = url or f"{SQLITE_PREFIX}{folder / f'cuts-{number}.db'}"
        counts = await _run_round(
            cuts=wanted,
            seed=f"{seed}:round {number}",
            url=round_url,
            servers=servers,
            settings=PROFILES[number % len(PROFILES)],
            show=partial(_show_from, show, done),
            prefix=f"r{number}",
        )
        total.update(counts)
        done += wanted
        number += 1
    total["rounds"] = number
    return {"seconds": round(time.monotonic() - started, 1), **dict(sorted(total.items()))}


def _show_from(show: Callable[[int], None], base: int, count: int) -> None:
    show(base + count)


async def _run_round(
    *,
    cuts: int,
    seed: str,
    url: str,
    servers: int,
    settings: Mapping[str, object],
    show: Callable[[int], None],
    prefix: str,
) -> Counter[str]:
    evidence = Evidence(seed)
    fleet = Fleet(url, size=servers, settings=settings, evidence=evidence)
    streams = CuttingProxy(fleet.port, seed=f"{seed}:streams", cut_share=0.97, marks=STREAM_MARKS)
    requests = CuttingProxy(fleet.port, seed=f"{seed}:requests", cut_share=0.25)
    proxies = (streams, requests)
    truth = Witness(url)
    enough = asyncio.Event()

    def count_cut() -> None:
        done = sum(proxy.cut_count for proxy in proxies)
        show(min(cuts, done))
        if done >= cuts:
            for proxy in proxies:
                proxy.calm()
            enough.set()

    try:
        await asyncio.gather(*map(fleet.start, range(servers)))
        await truth.open()
        for proxy in proxies:
            proxy.on_cut = count_cut
            await proxy.start()
        world = World(
            evidence,
            truth,
            requests.port,
            streams.port,
            fleet.port,
            fleet.up,
            several=servers > 1,
            ports=lambda: [*fleet.ports.values()],
        )
        crowds = [_make_crowd(world, f"{prefix}-{index}", seed) for index in range(4)]
        async with asyncio.timeout(ROUND_S_MAX), asyncio.TaskGroup() as group:
            for crowd in crowds:
                group.create_task(_keep_busy(world, crowd, enough, seed))
            if servers > 1:
                group.create_task(_keep_unwatched(Unwatched(world, seed), enough))
        await check_whole(truth, evidence)
        codes = await fleet.stop()
        if any(codes):
            evidence.fault("a server that did not stop cleanly", codes=codes)
    finally:
        for proxy in proxies:
            await proxy.close()
        await truth.close()
        await fleet.abandon()
    evidence.require_none()
    for proxy in proxies:
        evidence.counts["cuts"] += proxy.cut_count
        evidence.counts["connections"] += proxy.connections
        evidence.counts.update({f"cuts, {where}": count for where, count in proxy.cuts.items()})
    return evidence.counts


def _make_crowd(world: World, name: str, seed: str) -> Crowd:
    manners = Manners(sends=12, script_s_max=0.8, readers=9, delete_share=0.1)
    return Crowd(world, name, manners, seed=seed, via_proxy=True)


async def _keep_busy(world: World, crowd: Crowd, enough: asyncio.Event, seed: str) -> None:
    """One conversation after the other, until enough was cut; the last is still brought to its end."""
    generation = 0
    while True:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(crowd.run())
            hurrying = group.create_task(_hurry(crowd, enough))
            await running
            hurrying.cancel()
        if enough.is_set() or world.evidence.faults:
            return
        generation += 1
        name = f"{crowd.conversation.id.partition('.')[0]}.{generation}"
        crowd = _make_crowd(world, name, seed)


async def _keep_unwatched(unwatched: Unwatched, enough: asyncio.Event) -> None:
    running = asyncio.create_task(unwatched.run())
    await enough.wait()
    unwatched.stop()
    await running


async def _hurry(crowd: Crowd, enough: asyncio.Event) -> None:
    await enough.wait()
    crowd.hurry = True
