"""contextd's own composition as a process of the virtual loop, which can be frozen, killed, restarted.

Everything inside is real but for what touches the world outside: the driver of the database, the marks
of who is present, the process that checks arguments, the HTTP application.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

from virtual_loop import EPOCH_S, PROCESS, Process
from virtual_store import Database, through

from contextd import app
from contextd.provider.scripted import ScriptedProvider
from contextd.service import Service
from contextd.settings import Settings
from contextd.signals.frames import Closing, Head, Standing
from contextd.signals.hub import Hub
from contextd.store.engines import Engines
from contextd.store.engines import make_engines as make_real_engines

if TYPE_CHECKING:
    from world import World

T = TypeVar("T")
REQUEST_S = 4.0  # how patient clients are


class Cut(Exception):
    """The connection to the server broke, or nothing was answered: done or not, nobody knows."""


class Server(Process):
    """One life of a server: from its start to its death or its stop."""

    def __init__(self, world: "World", name: str, number: int) -> None:
        super().__init__(name)
        self.number = number
        self.skew_ms = world.rng(f"{name}/clock").choice((0,))
        self.service: Service | None = None
        self.owner_id = ""
        self.failed = False  # it could not start
        self.gone = asyncio.Event()
        self._world = world
        self._ids = itertools.count(1)
        self._stop = asyncio.Event()
        self._context = copy_context()
        self._context.run(PROCESS.set, self)
        self._task = self.spawn(self._serve(), "server")

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.service is not None and not self.frozen and not self.gone.is_set()

    @property
    def accepts(self) -> bool:
        """Whether a client can connect: a frozen server is not told from a slow one."""
        return self.service is not None and not self.gone.is_set()

    def spawn(self, work: Any, name: str) -> "asyncio.Task[Any]":
        """A task of this process."""
        return asyncio.get_running_loop().create_task(
            work, name=f"{self.name}:{name}", context=self._context.copy()
        )

    async def ask(self, work: Callable[[Service], Awaitable[T]]) -> T:
        """A request. Raises what the service raises, or `Cut` when no answer comes."""
        if self.service is None or self.gone.is_set():
            raise Cut
        task = self.spawn(work(self.service), "request")
        gone = asyncio.ensure_future(self.gone.wait())
        done, _ = await asyncio.wait(
            [task, gone], timeout=REQUEST_S, return_when=asyncio.FIRST_COMPLETED
        )
        gone.cancel()
        if task in done:
            return task.result()
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise Cut

    def kill(self) -> None:
        """SIGKILL."""
        self.dead = True
        self.gone.set()
        self._world.database.kill(self)
        self._world.present.discard(self)

    def stop(self) -> None:
        """SIGTERM."""
        self._stop.set()

    def make_id(self) -> str:
        """In the order of their making within a process."""
        return f"{self.name}-{next(self._ids):04d}"

    def clock_ms(self) -> int:
        """The wall clock of the machine that it runs on."""
        return round((EPOCH_S + asyncio.get_running_loop().time()) * 1000) + self.skew_ms

    async def _serve(self) -> None:
        world = self._world
        try:
            async with app.running(
                world.settings,
                clock_ms=self.clock_ms,
                make_id=self.make_id,
                providers={"scripted": world.model(self)},
            ) as contextd:
                self.service = contextd.service
                self.owner_id = contextd.service.ledger.owner_id
                world.note(self, "is up")
                await self._stop.wait()
        except Exception as error:
            self.failed = True
            world.note(self, f"could not start: {error!r}")
        finally:
            if not self.dead:
                world.present.discard(self)
                self.gone.set()
                world.note(self, "has stopped")


class Presence:
    """The marks of who is present, as in contextd/store/presence.py."""

    world: "World"

    def __init__(self, _: str) -> None:
        self._process = PROCESS.get()

    async def enter(self, when_sole: Callable[[], Awaitable[None]]) -> bool:
        """Starters go one at a time; who is alone says so."""
        world = self.world
        while world.starting is not None and not world.starting.dead:
            await asyncio.sleep(0.02)
        world.starting = self._process
        try:
            sole = not world.present
            if sole:
                await when_sole()
            world.present.add(self._process)
        finally:
            world.starting = None
        return sole

    async def leave(self) -> None:
        """The mark is taken away."""
        self.world.present.discard(self._process)


class Checker:
    """Arguments always fit."""

    async def check(self, *_: Any) -> list[str]:
        """Nothing is wrong."""
        return []

    async def check_schema(self, *_: Any) -> list[str]:
        """Nothing is wrong."""
        return []

    async def close(self) -> None:
        """Nothing is held."""


class WatchedHub(Hub):
    """The real hub; what it is told is compared with what is committed."""

    world: "World"

    def publish_head(self, head: Head) -> None:
        self.world.promises.head_published(PROCESS.get(), head)
        super().publish_head(head)

    def publish(
        self, *, revision: int, closings: Sequence[Closing] = (), standing: Standing
    ) -> None:
        self.world.promises.published(PROCESS.get(), revision, closings, standing)
        super().publish(revision=revision, closings=closings, standing=standing)

    def fill(self, context_id: str, *, closings: Sequence[Closing] = (), **facts: Any) -> None:
        self.world.promises.filled(PROCESS.get(), closings, facts["standing"], facts["heads"])
        super().fill(context_id, closings=closings, **facts)


class EngineRoom:
    """Engines live for many runs, because compiling their statements costs more than a run does."""

    def __init__(self) -> None:
        self._engines: list[Engines] = []
        self.database: Database | None = None
        self._used = 0

    def start(self, database: Database) -> None:
        """A new run, whose connections go to its own database."""
        self.database = database
        self._used = 0

    def make(self, url: str, *, readers: int, **_: Any) -> Engines:
        """The engines of the next server that starts. What else is asked for concerns PostgreSQL."""
        if self._used == len(self._engines):
            engines = make_real_engines(url, readers=readers)
            for engine in (engines.writer, engines.reader):
                through(engine, lambda: self.database)
            self._engines.append(engines)
        engines = self._engines[self._used]
        self._used += 1
        for engine in (engines.writer, engines.reader):
            engine.sync_engine.dispose(close=False)
        if getattr(engines, "file", None) is not None:
            engines.file.opened()  # the file is the one of the run before, its log is a new one
        return engines


ENGINES = EngineRoom()


def composition(world: "World") -> Any:
    """What `running` takes from the world outside, replaced for one run."""

    async def upgrade(_: str) -> str:
        return world.database_id

    Presence.world = WatchedHub.world = world
    return mock.patch.multiple(
        app,
        upgrade=upgrade,
        make_engines=ENGINES.make,
        Presence=Presence,
        ArgumentChecker=Checker,
        Hub=WatchedHub,
        make_application=lambda *_: mock.Mock(),
    )


class Model(ScriptedProvider):
    """The scripted model, whose requests are counted."""

    def __init__(self, world: "World", server: Server) -> None:
        super().__init__(rate=25.0, clock=asyncio.get_running_loop().time)
        self._world = world
        self._server = server

    def stream(self, request: Any) -> Any:
        self._world.promises.asked(self._server, request)
        return super().stream(request)


def settings_for(path: str) -> Settings:
    """Short times, so that a run is short; what they relate to is as in the defaults."""
    return Settings(
        database=f"sqlite+aiosqlite:///{path}",
        readers=2,
        tools="sim_tools",
        token_timeout_s=3.0,
        turn_timeout_s=20.0,
        attempts_max=3,
        backoff_initial_s=0.2,
        backoff_max_s=1.0,
        lease_s=8.0,
        producer_silence_s=6.0,
        poll_s=1.0,
        tool_timeout_s=1.5,
        queue_max=4,
        throttle_ms=20,
    )
