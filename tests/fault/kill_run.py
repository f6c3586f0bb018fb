"""Servers that are killed at the worst moments, again and again, under conversations that go on.

With one server each kill is followed by a look at a copy of the database as the crash left it, before
any server has touched it: everything that was answered, signalled or pulled by then must be in it.
With two servers on one database the other one takes over by lease; some are frozen instead of killed,
and go on later as if nothing had been.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from crowd import Crowd, Manners
from cutting_proxy import STREAM_MARKS, CuttingProxy
from evidence import Evidence
from fleet import LEASE_S, Fleet
from holdings import World
from strict_readers import REST_STATES
from unwatched import Unwatched
from verdict import check_kept, check_whole
from witness import SQLITE_PREFIX, Witness, copy_of

CROWDS = 8
WAIT_S_MAX = 1.2  # for the moment that was chosen; then the kill comes anyway
WORK_S_MAX = 1.0
START_S_MAX = 2.0
FINISH_S_MAX = 120.0
FREEZE_S_MAX = 2.5

MOMENTS = {
    "while starting": 8,
    "right after the start": 8,
    "at random": 30,
    "in a state": 36,
    "at a message's end": 10,
    "during an operation": 24,
}
STATES = (
    "processing_user_message",
    "processing_llm_response",
    "awaiting_llm_response",
    "streaming_llm_response",
    "streaming_llm_response",
    "processing_llm_response",
    "transient_failure",
    "queued",
)
OPERATIONS = ("create", "send", "interrupt", "cancel", "delete", "patch", "retry")


class KillRun:
    """One run; used once. `url`: an empty database. `servers`: how many work on it.

    `crowds`: how many conversations are under way at any time.
    """

    moments: Mapping[str, int] = MOMENTS
    wait_s_max = WAIT_S_MAX
    look_s = 0.0  # between two looks for a state that lasts a millisecond
    states: tuple[str, ...] = STATES  # in which it is killed
    operations: tuple[str, ...] = OPERATIONS  # during which it is killed

    def __init__(
        self,
        *,
        seed: str,
        folder: Path,
        url: str | None = None,
        servers: int = 1,
        crowds: int = CROWDS,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._seed = seed
        self._random = Random(seed)
        self._folder = folder
        self._url = url or f"{SQLITE_PREFIX}{folder / 'kills.db'}"
        self._several = servers > 1
        self._crowd_count = crowds
        self.evidence = Evidence(seed)
        lease = {"lease_s": LEASE_S} if self._several else {}
        self._fleet = self._make_fleet(servers, {**lease, **(settings or {})})
        self._truth = Witness(self._url)
        self._streams = CuttingProxy(
            self._fleet.port, seed=f"{seed}:streams", cut_share=0.3, marks=STREAM_MARKS
        )
        self._requests = CuttingProxy(self._fleet.port, seed=f"{seed}:requests", cut_share=0.05)
        self._crowds: list[Crowd] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unwatched: Unwatched | None = None
        self._made = 0
        self._operated: Counter[str] = Counter()
        self._stirred = asyncio.Event()
        self._closed = asyncio.Event()
        self.evidence.on_closed = self._closed.set

    def _make_fleet(self, servers: int, settings: Mapping[str, object]) -> Fleet:
        return Fleet(self._url, size=servers, settings=settings, evidence=self.evidence)

    async def run(self, kills: int, show: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Raises `AssertionError` with the seed when anything was wrong; else what was done."""
        started = time.monotonic()
        try:
            await self._streams.start()
            await self._requests.start()
            await asyncio.gather(*map(self._fleet.start, range(self._fleet.size)))
            await self._truth.open()
            self._begin_beside()
            for number in range(kills):
                self._fill_up()
                await (self._cycle_of_several() if self._several else self._cycle())
                self.evidence.require_none()
                show(number + 1)
            await self._finish()
        finally:
            await self._close()
        self.evidence.require_none()
        counts = self.evidence.counts
        counts["cycles"] = kills
        counts["kills"] = kills + counts["kills while starting"]
        counts["cuts"] = self._streams.cut_count + self._requests.cut_count
        counts["conversations"] = self._made
        return {"seconds": round(time.monotonic() - started, 1), **dict(sorted(counts.items()))}

    def _begin_beside(self) -> None:
        """What goes on beside the crowds."""
        if self._several:
            self._unwatched = Unwatched(self._world(), self._seed)
            self._tasks.append(asyncio.create_task(self._unwatched.run()))

    # One crash.

    async def _cycle(self) -> None:
        """The only server dies, what it left is looked at, and it starts again."""
        moment = self._random.choices([*self.moments], [*self.moments.values()])[0]
        if moment != "while starting":
            await self._wait_for(moment)
        self.evidence.counts[f"kills {moment}"] += 1
        await self._fleet.kill(0)
        await self._look_at_remains()
        if moment == "while starting":
            came_up = await self._fleet.start_and_kill(0, self._random.uniform(0, START_S_MAX))
            self.evidence.counts["kills while starting, when it was up"] += came_up
            await self._look_at_remains()
        await self._fleet.start(0)
        if not self._truth.is_open:
            await self._truth.open()

    async def _look_at_remains(self) -> None:
        if self._truth.sqlite_path is None:
            remains = await Witness(self._url).open()
        else:
            await self._truth.close()
            remains = await copy_of(self._truth, self._folder)
        try:
            await self._take_census(remains)
            await self._compare(remains)
            await check_whole(remains, self.evidence, at_rest=False)
        finally:
            await remains.close()

    async def _compare(self, truth: Witness) -> None:
        """What was told before a kill with what is there after it."""
        await check_kept(truth, [crowd.conversation for crowd in self._crowds])

    async def _take_census(self, remains: Witness) -> None:
        """In which states the crash has found conversations."""
        found = (await remains.states()).values()
        states = {state for state, _ in found} - REST_STATES
        for state in states or {"at rest"}:
            self.evidence.counts[f"kills that found {state}"] += 1
        if any(queued for _, queued in found):
            self.evidence.counts["kills that found a queue"] += 1

    async def _cycle_of_several(self) -> None:
        """One of the servers dies or stands still; the others take over what it had."""
        moment = self._random.choices([*self.moments], [*self.moments.values()])[0]
        await self._wait_for(moment)
        victim = self._random.randrange(self._fleet.size)
        if self._random.random() < 0.3:
            self.evidence.counts["freezes"] += 1
            self._fleet.freeze(victim)
            await asyncio.sleep(self._random.uniform(LEASE_S, FREEZE_S_MAX))
            if self._random.random() < 0.7:
                self._fleet.thaw(victim)
                await asyncio.sleep(self._random.uniform(0, 0.5))
        await self._fleet.kill(victim)
        await self._compare(self._truth)
        await asyncio.sleep(self._random.uniform(0, 1.5 * LEASE_S))
        await self._fleet.start(victim)

    # Its moment.

    async def _wait_for(self, moment: str) -> None:
        if moment != "right after the start":
            await asyncio.sleep(self._random.choice((0.0, self._random.uniform(0, WORK_S_MAX))))
        try:
            async with asyncio.timeout(self.wait_s_max):
                match moment:
                    case "in a state":
                        await self._wait_for_state(self._random.choice(self.states))
                    case "at a message's end":
                        self._closed.clear()
                        await self._closed.wait()
                        await asyncio.sleep(self._random.uniform(0, 0.003))
                    case "during an operation":
                        await self._wait_for_operation(self._random.choice(self.operations))
                    case "at random":
                        await asyncio.sleep(self._random.uniform(0, WORK_S_MAX))
        except TimeoutError:
            self.evidence.counts["kills whose moment did not come"] += 1

    async def _wait_for_state(self, state: str) -> None:
        """Looks into the database all the time: some states last a millisecond."""
        pause_s = self.look_s if state.startswith("processing") else 0.001
        while True:
            found = (await self._truth.states()).values()
            if any(queued if state == "queued" else at == state for at, queued in found):
                return
            await asyncio.sleep(pause_s)

    async def _wait_for_operation(self, operation: str) -> None:
        before = self._operated[operation]
        while self._operated[operation] == before:
            self._stirred.clear()
            await self._stirred.wait()
        await asyncio.sleep(self._random.uniform(0, 0.004))

    def _note_operation(self, operation: str) -> None:
        self._operated[operation] += 1
        self._stirred.set()

    # The crowds.

    def _fill_up(self) -> None:
        self._crowds = [crowd for crowd in self._crowds if not crowd.over]
        while len(self._crowds) < self._crowd_count:
            manners = Manners(
                sends=self._random.randint(2, 8),
                script_s_max=self._random.choice((0.1, 0.4, 1.5)),
                readers=3,
                delete_share=0.15,
            )
            self._made += 1
            crowd = self._new_crowd(f"c{self._made}", manners)
            self._crowds.append(crowd)
            self._tasks.append(asyncio.create_task(crowd.run()))

    def _world(self) -> World:
        return World(
            self.evidence,
            self._truth,
            self._requests.port,
            self._streams.port,
            self._fleet.port,
            self._fleet.up,
            several=self._several,
            ports=lambda: [*self._fleet.ports.values()],
        )

    def _new_crowd(self, name: str, manners: Manners) -> Crowd:
        return Crowd(self._world(), name, manners, seed=self._seed, operating=self._note_operation)

    async def _finish(self) -> None:
        """No more kills: everything comes to rest, is read to its end, and compared."""
        self._streams.calm()
        self._requests.calm()
        if self._unwatched:
            self._unwatched.stop()
        for crowd in self._crowds:
            crowd.hurry = True
        _, pending = await asyncio.wait(self._tasks, timeout=FINISH_S_MAX)
        if pending:
            stages = [crowd.stage for crowd in self._crowds if not crowd.over]
            self.evidence.fault("conversations that do not come to their end", stages=stages)
        self.evidence.require_none()
        await self._end()

    async def _end(self) -> None:
        """Everything is at rest and compared; the database as a whole is left."""
        await check_whole(self._truth, self.evidence)
        if not self._several:
            await self._stop_and_purge()

    async def _stop_and_purge(self) -> None:
        """A clean stop and a last start, which must find nothing to do but to purge."""
        codes = await self._fleet.stop()
        await self._truth.close()
        if any(codes):
            self.evidence.fault("a server that did not stop cleanly", codes=codes)
        await self._fleet.start(0)
        await self._truth.open()
        left = "SELECT count(*) FROM tombstones WHERE NOT purged"
        deadline = time.monotonic() + 30
        while (await self._truth.rows(left))[0][0]:
            if time.monotonic() > deadline:
                self.evidence.fault("deleted contexts that are never purged")
                break
            await asyncio.sleep(0.05)
        for table in ("messages", "turns", "journal", "branches", "segments"):
            ((count,),) = await self._truth.rows(
                f"SELECT count(*) FROM {table} WHERE context_key NOT IN (SELECT key FROM contexts)"
            )
            if count:
                self.evidence.fault("rows of a deleted context", table=table, rows=count)
        await check_whole(self._truth, self.evidence)
        await self._fleet.stop()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._streams.close()
        await self._requests.close()
        await self._truth.close()
        await self._fleet.abandon()
