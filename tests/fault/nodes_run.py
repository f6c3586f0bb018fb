"""Several servers on one PostgreSQL of their own, behind one port that leads to each in its turn.

One fault after the other, under conversations, producers and viewers: a server is killed, or stands
still (also with rows locked, in the middle of a transaction), or loses all its connections; the database
is stopped at once and recovers; or another database is there under the same address. Then what was
before is over, and the servers must serve what is there now, and nothing else.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from fleet import Fleet
from kill_run import FREEZE_S_MAX, LEASE_S, KillRun
from numbered import Numbered
from own_postgresql import OwnPostgresql
from succeeded import Successor
from unwatched import Unwatched
from verdict import LIVING, WHOLE, check_whole
from witness import Witness

DECK = (
    *["kill a server"] * 5,
    *["freeze"] * 2,
    *["freeze in a transaction"] * 3,
    *["end all connections"] * 3,
    *["stop the database"] * 2,
    "another database",
)
WAYS = ("emptied", "made anew", "promoted")
WORK_S_MAX = 1.2
FREEZE_LONG_S_MAX = 3.5
DOWN_S_MAX = 2.0
TRIES = 60  # to stop a server within a transaction
SILENCE_S = 30.0
REST_S_MAX = 90.0

# While the database is away or is another one, a server says so in its log. That is no defect of it,
# unless there is a traceback.
EXPECTED = (
    "may_pass=True",
    "another database is there",
    "code=42P01",  # no tables
    "code=57P04",  # dropped
    "code=3D000",
    "code=25006",  # a standby that is not promoted yet
    "the turn failed by a defect",
    "the turn could not be ended",
    "recovering a context failed",
)


class NodesRun(KillRun):
    """One run; used once. `deck`: the faults, which come in turns, shuffled.

    `beside`: how many producers, and how many contexts that nobody watches, go on beside the crowds.
    """

    def __init__(
        self,
        *,
        seed: str,
        folder: Path,
        postgresql: OwnPostgresql,
        nodes: int = 3,
        crowds: int = 3,
        beside: int = 2,
        deck: Sequence[str] = DECK,
        ways: Sequence[str] = WAYS,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._postgresql = postgresql
        super().__init__(
            seed=seed,
            folder=folder,
            url=postgresql.url(),
            servers=nodes,
            crowds=crowds,
            settings={"producer_silence_s": SILENCE_S, **(settings or {})},
        )
        self._decks = {"faults": _Deck(deck, self._random), "ways": _Deck(ways, self._random)}
        self._numbered: list[Numbered] = []
        self._beside: list[Unwatched | Numbered] = []
        self._beside_count = beside
        self._eras = 0
        self._longest_s = 0.0

    def _make_fleet(self, servers: int, settings: Mapping[str, object]) -> Fleet:
        return Fleet(
            self._url,
            size=servers,
            settings=settings,
            evidence=self.evidence,
            url_of=self._postgresql.url_of,
            expected=EXPECTED,
        )

    def _begin_beside(self) -> None:
        self._eras += 1
        seed = f"{self._seed}.{self._eras}"
        numbers = range(self._beside_count)
        self._numbered = [
            Numbered(self._world(), f"numbered.{seed}.{number}", seed) for number in numbers
        ]
        unwatched = [Unwatched(self._world(), f"{seed}.{number}") for number in numbers]
        self._beside = [*self._numbered, *unwatched]
        self._tasks += [asyncio.create_task(one.run()) for one in self._beside]

    # The faults.

    async def _cycle_of_several(self) -> None:
        fault = self._decks["faults"].draw()
        await asyncio.sleep(self._random.uniform(0.2, WORK_S_MAX))
        self.evidence.counts[f"faults, {fault}"] += 1
        victim = self._random.randrange(self._fleet.size)
        match fault:
            case "kill a server":
                await self._kill(victim)
            case "freeze":
                self._fleet.freeze(victim)
                await self._stand_still(victim, self._random.uniform(LEASE_S, FREEZE_S_MAX))
            case "freeze in a transaction":
                await self._freeze_in_transaction(victim)
                await self._stand_still(victim, self._random.uniform(2.5, FREEZE_LONG_S_MAX))
            case "end all connections":
                count = await self._postgresql.end_backends(victim)
                self.evidence.counts["connections ended"] += count
            case "stop the database":
                await self._stop_database()
            case "another database":
                await self._replace_database(self._decks["ways"].draw())
        await self._compare(self._truth)

    async def _compare(self, truth: Witness) -> None:
        await super()._compare(truth)
        for numbered in self._numbered:
            await numbered.check_kept(truth)

    async def _kill(self, victim: int) -> None:
        await self._fleet.kill(victim)
        await self._compare(self._truth)
        await asyncio.sleep(self._random.uniform(0, 1.5 * LEASE_S))
        await self._fleet.start(victim)

    async def _freeze_in_transaction(self, victim: int) -> None:
        """Stopped where PostgreSQL waits for it with locked rows, if that moment can be met."""
        for _ in range(TRIES):
            self._fleet.freeze(victim)
            await asyncio.sleep(0.01)  # what was under way there has been answered by now
            if await self._postgresql.in_transaction(victim):
                self.evidence.counts["servers that stood still within a transaction"] += 1
                return
            self._fleet.thaw(victim)
            await asyncio.sleep(self._random.uniform(0, 0.03))
        self._fleet.freeze(victim)

    async def _stand_still(self, victim: int, seconds: float) -> None:
        """Meanwhile the others take writes to whatever it does not hold."""
        port = self._fleet.ports.pop(victim)  # as behind a balancer that looks who answers
        try:
            successor = Successor(self._world(), f"pulse.{self._seed}.{self._made}.{victim}")
            self._longest_s = max(self._longest_s, await successor.longest_gap_s(seconds))
        finally:
            self._fleet.thaw(victim)
            self._fleet.ports[victim] = port
        self._made += 1

    async def _stop_database(self) -> None:
        """It recovers what was committed. Now and then a copy is kept, which others may promote later."""
        await asyncio.to_thread(self._postgresql.stop_at_once)
        if not self._postgresql.has_copy:
            await asyncio.to_thread(self._postgresql.keep_copy)
        else:
            await asyncio.sleep(self._random.uniform(0, DOWN_S_MAX))
        await asyncio.to_thread(self._postgresql.start_again)

    # Another database.

    async def _replace_database(self, way: str) -> None:
        """Whatever was told of the one before counts no more, and nobody may be told of it again."""
        if way == "promoted" and not self._postgresql.has_copy:
            await self._stop_database()
            await asyncio.sleep(WORK_S_MAX)
        self.evidence.counts[f"databases, {way}"] += 1
        successor = Successor(self._world(), f"era.{self._seed}.{self._eras}")
        await successor.look_before(self.evidence)
        await self._leave_behind()
        async with successor.watching():
            await successor.attached.wait()
            await self._put_another(way)
            await successor.require_noticed()
        await self._truth.open()
        await successor.require_new_text()
        self._begin_beside()
        self._fill_up()

    async def _leave_behind(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._truth.close()
        self.evidence.require_none()
        self._tasks, self._crowds, self._numbered = [], [], []
        self.evidence.messages.clear()
        self.evidence.states.clear()
        self.evidence.deleting.clear()

    async def _put_another(self, way: str) -> None:
        """An empty one gets its tables from a server that is started anew; the others run on."""
        match way:
            case "emptied":
                await self._postgresql.empty_tables()
            case "made anew":
                await self._postgresql.make_anew()
            case _:
                await asyncio.to_thread(self._postgresql.put_copy)
                return
        restarted = self._random.randrange(self._fleet.size)
        await self._fleet.kill(restarted)
        await self._fleet.start(restarted)

    # The end.

    async def _finish(self) -> None:
        for one in self._beside:
            one.stop()
        await super()._finish()

    async def _end(self) -> None:
        """What an older database had under way ends as well, by lease and by silence."""
        deadline = time.monotonic() + REST_S_MAX
        unfinished = ("an open message", "a context that is stuck", "a turn that is stuck")
        while time.monotonic() < deadline:
            found = [
                (await self._truth.rows(WHOLE[what].format(living=LIVING)))[0][0]
                for what in unfinished
            ]
            if not any(found):
                break
            await asyncio.sleep(0.2)
        await check_whole(self._truth, self.evidence)
        codes = await self._fleet.stop()
        if any(codes):
            self.evidence.fault("a server that did not stop cleanly", codes=codes)
        longest_ms = round(1000 * self._longest_s)
        self.evidence.counts["longest ms without a write while one stood still"] = longest_ms


class _Deck:
    """Draws each card once before any comes again."""

    def __init__(self, cards: Sequence[str], random: Random) -> None:
        self._cards = [*cards]
        self._random = random
        self._left: list[str] = []

    def draw(self) -> str:
        if not self._left:
            self._left = self._random.sample(self._cards, len(self._cards))
        return self._left.pop()


async def run_nodes(
    faults: int, *, show: Callable[[int], None] = lambda _: None, nodes: int = 3, **options: Any
) -> dict[str, Any]:
    """A run with a PostgreSQL of its own. Raises `AssertionError` with the seed."""
    postgresql = OwnPostgresql(nodes)
    try:
        await asyncio.to_thread(postgresql.open)
        return await NodesRun(postgresql=postgresql, nodes=nodes, **options).run(faults, show)
    finally:
        await asyncio.to_thread(postgresql.close)
