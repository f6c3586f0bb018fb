"""The short runs over two servers on one database; `--servers 2` makes the long ones (docs/faults.md)."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from evidence import Evidence
from fleet import Fleet
from holdings import World
from unwatched import Unwatched
from witness import Witness


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    """Two servers on a database of either kind."""
    evidence = Evidence("short")
    fleet = Fleet(database_url, size=2, settings={}, evidence=evidence)
    truth = Witness(database_url)
    try:
        await fleet.start(0)
        await fleet.start(1)
        await truth.open()
        ports = [*fleet.ports.values()]
        yield World(evidence, truth, 0, 0, fleet.port, fleet.up, several=True, ports=lambda: ports)
    finally:
        await truth.close()
        await fleet.abandon()


async def test_what_nobody_watches_is_whole_and_forgotten_at_both_servers(world: World) -> None:
    """No pull says `final` or `immutable` that lacks text, and no deleted text is served a second later."""
    await asyncio.gather(*(Unwatched(world, f"short-{number}").one() for number in range(12)))
    world.evidence.require_none()
    assert world.evidence.counts["unwatched contexts"] == 12
    assert world.evidence.counts["unwatched pulls compared with the database"] > 0
