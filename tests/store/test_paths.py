"""Paths through the tree of segments: right for every shape, and as cheap at 10,000 forks as at 100."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path as File
from typing import Any

import pytest
from forks import write_deep
from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.store.engines import make_engines
from contextd.store.reader import select_placed
from contextd.store.tables import branches, messages, segments
from contextd.store.tree import Path, Tree, find_path
from contextd.store.upgrade import upgrade

CONTEXT = 1
MESSAGE = {
    "context_key": CONTEXT, "superseded": False, "revision": 1, "opened_revision": 1,
    "role": "user", "kind": "text", "status": "completed", "media_type": "text/plain",
    "metadata": {}, "client_metadata": {}, "created_at": 0, "changed_at": 0,
}  # fmt: skip
PLACES = select(messages.c.key, messages.c.id, messages.c.segment_key, messages.c.depth)


@asynccontextmanager
async def database(url: str) -> AsyncIterator[AsyncConnection]:
    await upgrade(url)
    engines = make_engines(url, readers=1)
    async with engines.writer.connect() as connection, connection.begin():
        yield connection
    await engines.dispose()


class Forest:
    """Grows branches by way of `Tree`, and knows by itself what each of them holds."""

    def __init__(self, connection: AsyncConnection, seed: int) -> None:
        self.connection = connection
        self.tree = Tree(connection, CONTEXT, 0)
        self.random = random.Random(seed)
        self.lines: dict[str, list[str]] = {}
        self.made = 0

    async def fork(self) -> None:
        """From any place of any branch, mostly from its end, so that paths become long."""
        line = self.random.choice(list(self.lines.values())) if self.lines else []
        cut = len(line) if self.random.random() < 0.8 else self.random.randint(0, len(line))
        name = f"b{len(self.lines)}"
        await self.tree.fork(from_message_id=line[cut - 1] if cut else None, name=name)
        self.lines[name] = line[:cut]

    async def grow(self) -> None:
        name = self.random.choice(list(self.lines)[-5:])
        tip = await self.tree.tip(name)
        self.made += 1
        depth = tip.leaf_depth + 1
        place = {"id": f"m{self.made}", "segment_key": tip.segment_key, "depth": depth}
        key = (
            await self.connection.execute(
                insert(messages).values(**MESSAGE, **place).returning(messages.c.key)
            )
        ).scalar_one()
        await self.tree.move_leaf(name, key, depth)
        self.lines[name].append(f"m{self.made}")

    async def break_off(self) -> None:
        """The last message of a branch leaves the conversation, also where it was forked from."""
        name = self.random.choice(list(self.lines))
        tip = await self.tree.tip(name)
        row = (
            await self.connection.execute(select(messages).where(messages.c.id == tip.leaf_id))
        ).one_or_none()
        if row is None or row.segment_key != tip.segment_key:
            return
        gone = update(messages).where(messages.c.key == row.key).values(superseded=True)
        await self.connection.execute(gone)
        await self.tree.close_up([row])
        for line in self.lines.values():
            if row.id in line:
                line.remove(row.id)


@pytest.mark.parametrize("seed", range(3))
async def test_paths_hold_what_was_said_on_them(database_url: str, seed: int) -> None:
    """Whatever was forked from where, and closed up since: pages, ends, places, and where two part."""
    async with database(database_url) as connection:
        forest = Forest(connection, seed)
        await forest.fork()
        for _ in range(250):
            kind = forest.random.random()
            step = forest.fork if kind < 0.35 else forest.grow if kind < 0.93 else forest.break_off
            await step()
        everything = (await connection.execute(PLACES.where(~messages.c.superseded))).all()
        for name in forest.random.sample(list(forest.lines), 20):
            line = forest.lines[name]
            path = await find_path(connection, CONTEXT, name)
            assert ids(await path.after(connection, PLACES, 0, limit=1000)) == line
            assert ids(await path.newest(connection, PLACES, limit=7)) == line[::-1][:7]
            if line:
                middle = next(row for row in everything if row.id == line[len(line) // 2])
                page = await path.after(connection, PLACES, middle.depth - 1, limit=3)
                assert ids(page) == line[len(line) // 2 :][:3]
            held = await path.holding(connection, everything)
            assert {row.id for row in held.values()} == set(line)
            other = forest.random.choice(list(forest.lines))
            parting = await path.parting(connection, await find_path(connection, CONTEXT, other))
            shared = [one for one in line if one in forest.lines[other]]
            above = await path.newest(
                connection, PLACES.where(messages.c.depth <= parting), limit=1000
            )
            assert ids(above)[::-1] == shared


def ids(rows: Any) -> list[str]:
    return [row.id for row in rows]


READS: dict[str, Callable[[AsyncConnection, Path, Path], Awaitable[Any]]] = {
    "first page": lambda c, deep, half: deep.after(c, select_placed(), 0, limit=100),
    "a page half-way": lambda c, deep, half: deep.after(c, select_placed(), 50, limit=50),
    "the newest": lambda c, deep, half: deep.newest(c, select_placed(), limit=100),
    "one place": lambda c, deep, half: _hold(c, deep),
    "where two part": lambda c, deep, half: deep.parting(c, half),
}


async def _hold(connection: AsyncConnection, path: Path) -> None:
    rows = await connection.execute(PLACES.where(messages.c.key == 42))
    assert await path.holding(connection, rows.all())


async def test_a_read_does_not_cost_more_the_more_forks_there_are(
    tmp_path: File, environment: dict[str, str]
) -> None:
    """Counted in the steps of SQLite's machine: a hundred times the forks, at most twice the steps."""
    few = await steps_of_reads(tmp_path / "few.db", environment, 100)
    many = await steps_of_reads(tmp_path / "many.db", environment, 10_000)
    assert {name: many[name] for name in few if many[name] > 2 * few[name] + 10} == {}


async def steps_of_reads(path: File, environment: dict[str, str], forks: int) -> dict[str, int]:
    """For each read how often a hundred steps of the machine were taken."""
    url = f"sqlite+aiosqlite:///{path}"
    await write_deep(url, environment, forks)
    counts = {}
    async with database(url) as connection:
        deep = await find_path(connection, 1, f"b{forks}")
        half = await find_path(connection, 1, f"b{forks - 50}")
        raw: Any = (await connection.get_raw_connection()).driver_connection
        for name, read in READS.items():
            ticks: list[None] = []
            await raw.set_progress_handler(lambda ticks=ticks: ticks.append(None), 100)
            assert await read(connection, deep, half) is not False
            counts[name] = len(ticks)
        await raw.set_progress_handler(None, 0)
    return counts


async def test_a_fork_costs_the_same_after_ten_thousand(
    tmp_path: File, environment: dict[str, str]
) -> None:
    """It copies nothing, and looks at nothing that grows."""
    steps = []
    for forks in (100, 10_000):
        url = f"sqlite+aiosqlite:///{tmp_path}/{forks}.db"
        await write_deep(url, environment, forks)
        async with database(url) as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            ticks: list[None] = []
            await raw.set_progress_handler(lambda ticks=ticks: ticks.append(None), 10)
            await Tree(connection, 1, 0).fork(from_message_id=f"d{forks}")
            await raw.set_progress_handler(None, 0)
            steps.append(len(ticks))
    assert steps[1] <= 2 * steps[0]


async def test_an_upgrade_gives_old_segments_their_jumps(
    database_url: str, environment: dict[str, str]
) -> None:
    """What was forked before is reached as fast as what is forked now, and means the same."""
    await write_deep(database_url, environment, 2000)
    async with database(database_url) as connection:
        rows = (await connection.execute(select(segments).order_by(segments.c.key))).all()
        assert [row.number for row in rows] == list(range(1, 2001))
        assert [row.rank for row in rows] == list(range(2000))
        jumps = {row.key: row.jump_key for row in rows}
        parents = {row.key: row.parent_key for row in rows}
        for target in (1, 2, 777, 1999):
            assert hops(jumps, parents, 2000, target) <= 40
        await Tree(connection, 1, 0).fork(from_message_id="d2000", name="new")
        made = select(segments).join(branches, branches.c.segment_key == segments.c.key)
        row = (await connection.execute(made.where(branches.c.name == "new"))).one()
        assert (row.number, row.rank, row.parent_key) == (2001, 2000, 2000)
        assert row.jump_key in range(1, 2001)
        path = await find_path(connection, 1, "b1234")
        assert len(await path.after(connection, PLACES, 0, limit=5000)) == 1234
        assert await connection.scalar(text("SELECT count(*) FROM messages")) == 2000


def hops(jumps: dict[int, int], parents: dict[int, int], start: int, target: int) -> int:
    """Steps from a segment up to another of its path."""
    taken = 0
    while start != target:
        jump = jumps[start]
        start = jump if jump is not None and jump >= target else parents[start]
        taken += 1
    return taken
