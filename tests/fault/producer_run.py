"""Producers that are killed, cut off, frozen, overtaken, cancelled and deleted, on a server that dies.

The run ends by itself when it has done as many faults as it was asked for. After each kill of the server
a copy of the database, as the crash left it, is compared with the ledgers of all producers; after each
kill of a producer the database itself, while the others go on.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from cutting_proxy import STREAM_MARKS, CuttingProxy
from evidence import Evidence
from fleet import LEASE_S, Fleet
from holdings import World
from producer_crew import Worker
from producer_ledger import now_ms
from producer_proxy import ProducerProxy
from producer_stage import Setting, Stage
from producer_verdict import check_producing
from unwatched import Unwatched
from verdict import check_kept, check_whole
from witness import SQLITE_PREFIX, Witness, copy_of

STAGES = 4
SILENCE_S = 3.0
WORK_S_MAX = 0.3
ABSENCE_S_MAX = 0.4
START_S_MAX = 1.0
DESERTED_SHARE = 0.07
FINISH_S_MAX = 150.0
CUT_SHARE = 0.45
CLIENT_SHARE = 0.25  # of the producers; the others speak for themselves

DEEDS = {
    "kill a producer": 32,
    "kill the server": 5,
    "rival": 14,
    "cancel": 8,
    "delete": 4,
    "freeze": 5,
    "wait": 12,
}
FAULTS = (
    "producer kills",
    "server kills",
    "cuts of producers",
    "rivals",
    "cancels",
    "deletions",
    "silences",
)


class ProducerRun:
    """One run; used once. `url`: an empty database. `stages`: how many contexts at any time.

    `servers`: how many work on the database; each connection goes to the next one.

    `brief`: one message a producer. `planted`: a fault that all producers have, for tests of the verdict.
    """

    def __init__(
        self,
        *,
        seed: str,
        folder: Path,
        url: str | None = None,
        servers: int = 1,
        stages: int = STAGES,
        settings: Mapping[str, object] | None = None,
        brief: bool = False,
        planted: str = "",
    ) -> None:
        self._random = Random(seed)
        self._folder = folder
        self._url = url or f"{SQLITE_PREFIX}{folder / 'producers.db'}"
        self._stage_count = stages
        self.evidence = Evidence(seed)
        lease = {"lease_s": LEASE_S} if servers > 1 else {}
        self._fleet = Fleet(
            self._url,
            size=servers,
            settings={"producer_silence_s": SILENCE_S, **lease, **(settings or {})},
            evidence=self.evidence,
        )
        self._truth = Witness(self._url)
        port = self._fleet.port
        self._producers = ProducerProxy(port, seed=f"{seed}:producers", cut_share=CUT_SHARE)
        self._requests = CuttingProxy(port, seed=f"{seed}:requests", cut_share=0.05)
        self._streams = CuttingProxy(
            port, seed=f"{seed}:streams", cut_share=0.3, marks=STREAM_MARKS
        )
        self._seed = seed
        self._brief = brief
        self._planted = planted
        self._starts_ms: list[float] = []
        self._stages: list[Stage] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._thawing: set[asyncio.Task[None]] = set()
        self._unwatched: Unwatched | None = None
        self._made = 0

    @property
    def _proxies(self) -> tuple[CuttingProxy, ...]:
        return self._producers, self._requests, self._streams

    async def run(
        self, faults: int, show: Callable[[int], None] = lambda _: None
    ) -> dict[str, Any]:
        """Raises `AssertionError` with the seed when anything was wrong; else what was done."""
        started = time.monotonic()
        try:
            for proxy in self._proxies:
                await proxy.start()
            self._starts_ms.append(now_ms())
            await asyncio.gather(*map(self._start_server, range(self._fleet.size)))
            await self._truth.open()
            setting = self._setting()
            if self._fleet.size > 1:
                self._unwatched = Unwatched(setting.world, self._seed)
                self._tasks.append(asyncio.create_task(self._unwatched.run()))
            while self._count_faults() < faults:
                self._fill_up(setting)
                await self._do_something()
                await check_producing(self._truth, self.evidence)
                self._require_none()
                show(min(faults, self._count_faults()))
            await self._finish()
        finally:
            await self._close()
        self.evidence.require_none()
        return {"seconds": round(time.monotonic() - started, 1), **self._figures()}

    def _count_faults(self) -> int:
        self.evidence.counts["cuts of producers"] = self._producers.cut_count
        return sum(self.evidence.counts[name] for name in FAULTS)

    def _figures(self) -> dict[str, int]:
        counts = self.evidence.counts
        counts["faults"] = self._count_faults()
        counts["contexts"] = self._made
        counts["cuts of readers"] = self._requests.cut_count + self._streams.cut_count
        counts.update({f"cuts, {where}": count for where, count in self._producers.cuts.items()})
        return dict(sorted(counts.items()))

    def _require_none(self) -> None:
        for stage in self._stages:
            stage.take_accusations()
        self.evidence.require_none()

    # The stages.

    def _setting(self) -> Setting:
        world = World(
            self.evidence,
            self._truth,
            self._requests.port,
            self._streams.port,
            self._fleet.port,
            self._fleet.up,
            several=self._fleet.size > 1,
            ports=lambda: [*self._fleet.ports.values()],
        )
        return Setting(
            world,
            self._seed,
            self._folder,
            self._producers.port,
            self._port_file,
            SILENCE_S,
            self._starts_ms,
            0.0 if self._planted else CLIENT_SHARE,
            self._brief,
            self._planted,
        )

    def _fill_up(self, setting: Setting) -> None:
        self._stages = [stage for stage in self._stages if not stage.over]
        while len(self._stages) < self._stage_count:
            self._made += 1
            stage = Stage(setting, f"c{self._made}", self._note)
            self._stages.append(stage)
            self._tasks.append(asyncio.create_task(stage.run()))

    def _note(self, fault: str) -> None:
        self.evidence.counts[fault] += 1

    # The faults.

    async def _do_something(self) -> None:
        deed = self._random.choices([*DEEDS], [*DEEDS.values()])[0]
        await asyncio.sleep(self._random.uniform(0, WORK_S_MAX))
        match deed:
            case "kill a producer":
                await self._kill_producer()
            case "kill the server":
                await self._kill_server()
            case "freeze":
                await self._freeze_producer()
            case "wait":
                await asyncio.sleep(WORK_S_MAX)
            case wish:
                busy = [stage for stage in self._stages if stage.busy_workers]
                self._random.choice(busy or self._stages).wish(wish)

    def _any_worker(self) -> tuple[Stage, Worker] | None:
        working = [(stage, worker) for stage in self._stages for worker in stage.busy_workers]
        return self._random.choice(working) if working else None

    async def _kill_producer(self) -> None:
        found = self._any_worker()
        if found is None:
            return
        stage, worker = found
        await worker.kill()
        self._note("producer kills")
        if self._random.random() < DESERTED_SHARE:
            worker.deserted = True
            self._note("producers that were not started again")
            return
        await stage.compare(self._truth)
        await asyncio.sleep(self._random.choice((0.0, self._random.uniform(0, ABSENCE_S_MAX))))
        if not stage.over:
            await worker.start()

    async def _freeze_producer(self) -> None:
        """It wakes up when its message is gone, and is told so."""
        found = self._any_worker()
        if found is None:
            return
        found[1].freeze()
        self._note("silences")
        task = asyncio.create_task(self._thaw_later(found[1]))
        self._thawing.add(task)
        task.add_done_callback(self._thawing.discard)

    async def _thaw_later(self, worker: Worker) -> None:
        await asyncio.sleep(self._random.uniform(0.5, 1.8) * SILENCE_S)
        worker.thaw()

    async def _kill_server(self) -> None:
        """It dies, what it left is looked at, and it starts again; sometimes it dies while it starts."""
        if self._fleet.size > 1:
            await self._kill_one_of_several()
            return
        self._port_file.unlink()
        await self._fleet.kill(0)
        self._note("server kills")
        await self._look_at_remains()
        if self._random.random() < 0.15:
            self._starts_ms.append(now_ms())
            await self._fleet.start_and_kill(0, self._random.uniform(0, START_S_MAX))
            self._note("server kills")
            await self._look_at_remains()
        self._starts_ms.append(now_ms())
        await self._start_server(0)
        if not self._truth.is_open:
            await self._truth.open()

    async def _kill_one_of_several(self) -> None:
        """The others go on. A silence may be judged by any of them, so it counts from the last write."""
        victim = self._random.randrange(self._fleet.size)
        await self._fleet.kill(victim)
        self._tell_ports()
        self._note("server kills")
        await check_kept(self._truth, [stage.conversation for stage in self._stages])
        for stage in self._stages:
            await stage.compare(self._truth)
        await asyncio.sleep(self._random.uniform(0, START_S_MAX))
        await self._start_server(victim)

    async def _start_server(self, number: int) -> None:
        await self._fleet.start(number)
        self._tell_ports()

    def _tell_ports(self) -> None:
        """For producers, which are processes of their own: a file that is whole at any moment."""
        new = self._port_file.with_suffix(".new")
        new.write_text(" ".join(map(str, self._fleet.ports.values())))
        new.replace(self._port_file)

    @property
    def _port_file(self) -> Path:
        return self._folder / "port"

    async def _look_at_remains(self) -> None:
        if self._truth.sqlite_path is None:
            remains = await Witness(self._url).open()
        else:
            await self._truth.close()
            remains = await copy_of(self._truth, self._folder)
        try:
            await self._take_census(remains)
            await check_kept(remains, [stage.conversation for stage in self._stages])
            await check_whole(remains, self.evidence, at_rest=False)
            await check_producing(remains, self.evidence)
            for stage in self._stages:
                await stage.compare(remains)
        finally:
            await remains.close()

    async def _take_census(self, remains: Witness) -> None:
        """What the crash has found."""
        states = await remains.states()
        producing = [queued for state, queued in states.values() if state == "producing"]
        self.evidence.counts["contexts found producing by a kill"] += len(producing)
        self.evidence.counts["contexts found producing with a queue"] += sum(map(bool, producing))
        ((count,),) = await remains.rows(
            """SELECT count(*) FROM contexts c JOIN messages m ON m.context_key = c.key
               JOIN heads h ON h.message_key = m.key
               WHERE m.status = 'streaming' AND h.producer_id IS NOT NULL"""
        )
        self.evidence.counts["open produced messages found by a kill"] += count

    # The end.

    async def _finish(self) -> None:
        """No more faults: everything comes to rest, is read to its end, and compared."""
        for proxy in self._proxies:
            proxy.calm()
        if self._unwatched:
            self._unwatched.stop()
        for stage in self._stages:
            stage.hurry = True
        _, pending = await asyncio.wait(self._tasks, timeout=FINISH_S_MAX)
        self._require_none()
        if pending:
            stages = [stage.conversation.id for stage in self._stages if not stage.over]
            self.evidence.fault("contexts that do not come to their end", contexts=stages)
        self.evidence.require_none()
        await check_whole(self._truth, self.evidence)
        await check_producing(self._truth, self.evidence)
        codes = await self._fleet.stop()
        if any(codes):
            self.evidence.fault("a server that did not stop cleanly", codes=codes)

    async def _close(self) -> None:
        for task in (*self._tasks, *self._thawing):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._thawing, return_exceptions=True)
        for proxy in self._proxies:
            await proxy.close()
        await self._truth.close()
        await self._fleet.abandon()
