"""One run: a seed, one or two servers, people who use them, and what befalls them."""

import asyncio
import atexit
import gc
import logging
import random
import shutil
import sqlite3
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import structlog
from cast import play
from promises import Promises, process_name
from sqlalchemy.exc import SAWarning
from truth import Truth, Violation, expect
from virtual_loop import PROCESS, Process, StuckError, VirtualLoop, virtual_time
from virtual_server import ENGINES, Model, Server, composition, settings_for
from virtual_store import Database

from contextd.store.upgrade import upgrade

DEFECTS = frozenset({"a hook after a commit failed", "the turn failed by a defect"})
LOOK_S = 0.25


@dataclass
class Outcome:
    """How a run ended. `violation` says which promise was broken, in words."""

    seed: int
    servers: int
    violation: str | None = None
    trace: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class World:
    """What all parts of a run share."""

    def __init__(self, seed: int, servers: int, loop: VirtualLoop, path: Path) -> None:
        self.seed = seed
        self.count = servers
        self.loop = loop
        self.settings = settings_for(str(path))
        self.database_id = "simulated"
        self.truth = Truth(path, loop.time)
        self.database = Database(path, self.rng("store"), self.note)
        self.database.committed = self._committed
        self.database.disturbed = self.disturbed
        self.servers: list[Server] = []  # the newest life of each
        self.lives: list[Server] = []
        self.present: set[Process | None] = set()
        self.starting: Process | None = None
        self.disturbed_at = 0.0
        self.act_s = self.rng("length").choice((0.7, 1.2, 2.5))  # people act, and things go wrong
        self.over = False
        self.trace: list[str] = []
        self.counts: dict[str, int] = {}
        self.promises = Promises(self)

    def rng(self, name: str) -> Random:
        """Chance of its own for each part, so that one does not shift the other's."""
        return Random(f"{self.seed}/{self.count}/{name}")

    def note(self, who: Process | str | None, what: str) -> None:
        """A line of the trace, which ends with the run."""
        if self.over:
            return
        name = who if isinstance(who, str) else process_name(who)
        self.trace.append(f"{self.loop.time():9.4f} {name:8} {what}")

    def log(self, _: Any, level: str, event: dict[str, Any]) -> Any:
        """What the servers log: what they call a defect is one."""
        if not self.over:
            words = " ".join(f"{name}={value!r}" for name, value in event.items())
            self.note(PROCESS.get(), f"logs {level} {words}")
            if event.pop("exc_info", None) and sys.exc_info()[1] is not None:
                self.trace.append(traceback.format_exc(limit=-6))
            if event["event"] in DEFECTS:
                expect(False, f"{process_name(PROCESS.get())} met a defect: {event['event']}")
        raise structlog.DropEvent

    def tally(self, what: str) -> None:
        """Counts, for the figures."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def disturbed(self, seconds: float = 0.0) -> None:
        """Something is wrong for so long, so what has a time limit has it from then on."""
        self.disturbed_at = max(self.disturbed_at, self.loop.time() + seconds)

    def model(self, server: Server) -> Model:
        """The model as this server asks it."""
        return Model(self, server)

    def start(self, number: int) -> None:
        """A server starts, for the first time or again."""
        life = sum(server.number == number for server in self.lives) + 1
        server = Server(self, f"{'ABC'[number]}{life}", number)
        self.note(server, "starts")
        self.servers = [one for one in self.servers if one.number != number] + [server]
        self.servers.sort(key=lambda one: one.number)
        self.lives.append(server)
        self.disturbed()

    async def run(self) -> None:
        """The whole run."""
        watching = asyncio.ensure_future(self._keep_looking())
        for number in range(self.count):
            self.start(number)
        await play(self)
        watching.cancel()

    def _committed(self, process: Process | None) -> None:
        if self.over:
            return
        self.tally("commits")
        self.promises.dirty = True
        self.truth.look()

    def step(self) -> None:
        """After each step of the loop."""
        if not self.over:
            self.promises.step()
        if Violation.first is not None:
            raise Violation.first

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for server in self.servers:
                if server.failed:
                    self.start(server.number)
            self.promises.look_round()


def simulate(seed: int, servers: int) -> Outcome:
    """One run. The same seed does the same."""
    outcome = Outcome(seed, servers)
    path = _fresh_database()
    loop = VirtualLoop()
    random.seed(seed)
    Violation.first = None
    world = World(seed, servers, loop, path)
    structlog.configure(
        processors=[world.log], wrapper_class=structlog.make_filtering_bound_logger("warning")
    )
    ENGINES.start(world.database)
    loop.after_step = world.step
    # Ends of runs leave connections behind that were lost, which the pool would lament.
    warnings.filterwarnings("ignore", "The garbage collector is trying", category=SAWarning)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    gc.disable()
    with virtual_time(loop), composition(world):
        try:
            loop.run_until_complete(world.run())
        except (Violation, StuckError) as error:
            outcome.violation = str(Violation.first or error)
            world.note("broken", outcome.violation)
        except Exception as error:  # of the simulation itself, or what nobody expects
            outcome.violation = repr(error)
            world.trace.append(traceback.format_exc())
        finally:
            world.over = True
            _bury(loop, world)
            gc.enable()
    outcome.trace = world.trace
    outcome.counts = world.counts
    return outcome


def without_trace(run: tuple[int, int]) -> Outcome:
    """One of many runs: who wants to know more runs its seed again."""
    outcome = simulate(*run)
    outcome.trace = []
    return outcome


def _bury(loop: VirtualLoop, world: World) -> None:
    """Ends all tasks, so that nothing of this run is left for the garbage collector to trip over."""
    Violation.first = None
    world.database.weather.calm = True
    world.database.close()
    for server in world.lives:
        loop.thaw(server)
    for _ in range(50):
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        with suppress(RuntimeError):  # the run's own end may still be on its way to the loop
            loop.run_until_complete(asyncio.sleep(1.0))
    world.truth.close()
    loop.close()


@cache
def _folder() -> Path:
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="contextd-simulation-", dir=shm if shm.is_dir() else None)

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _template() -> Path:
    """A database as contextd makes it, made once."""
    path = _folder() / "template.db"
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{path}"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE contextd_database SET id = 'simulated'")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


def _fresh_database() -> Path:
    path = _folder() / "run.db"
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copyfile(_template(), path)
    return path
