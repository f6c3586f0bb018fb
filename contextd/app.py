"""The composition root: settings → adapters → application. Only here is it known what is in use."""

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import structlog
import uuid_utils
import uvicorn
from rich.console import Console

from contextd.core.errors import ContextdError, InternalError, Overloaded
from contextd.http.application import make_application
from contextd.http.connection import Connection, Limits, sweep
from contextd.http.gate import Gate
from contextd.listening import announce, check_exposure, listen, possible_connections
from contextd.log import configure_logging
from contextd.provider import Provider
from contextd.provider.late import LateProvider
from contextd.provider.openai_server import checked_key, checked_url
from contextd.provider.scripted import ScriptedProvider
from contextd.service import (
    Branches,
    Calls,
    CallSteps,
    Content,
    Contexts,
    Ledger,
    Messages,
    Payloads,
    Producers,
    Records,
    Recovery,
    Retries,
    Service,
    Steps,
    Streams,
    Toolset,
)
from contextd.service.call_rows import Results
from contextd.service.succession import Succession
from contextd.settings import Settings, SettingsError
from contextd.signals.hub import Hub
from contextd.store.clock import Clock
from contextd.store.engines import Engines, StoreError, make_engines, parse_url, shown
from contextd.store.history import History
from contextd.store.incarnation import Incarnation
from contextd.store.leases import Leases
from contextd.store.presence import Presence
from contextd.store.reader import Reader
from contextd.store.tail import TRUST_S, Tail
from contextd.store.trouble import Kind
from contextd.store.upgrade import find_incarnation, upgrade
from contextd.store.writer import Writer
from contextd.tools.arguments import ArgumentChecker
from contextd.tools.server import ServerTools, open_workspace
from contextd.tools.workspace import Workspace
from contextd.turns import Executing, Turns
from contextd.workflows import Workflows

log = structlog.get_logger(__name__)

# Objects live long here and cycles are rare: fewer, later collections cut the worst delays of a
# thousand readers from 57 to 11 ms.
GC_THRESHOLDS = (50_000, 20, 1000)
START_TRIES, START_PAUSE_S = 30, 0.5
CLOSE_S = 5.0  # for each thing that is let go at the end
STOP_TRIES = 10
LEAVE_S = 0.5  # for what is left after that
CLOCK_FOLLOW_S = 60.0
CUT_OFF_S = 0.3  # from the last word to a request that takes too long to its connection's end


class Contextd:
    """Everything that runs: the service, the agent loop, and the application around them."""

    def __init__(
        self,
        *,
        settings: Settings,
        service: Service,
        turns: Turns,
        reader: Reader,
        providers: Sequence[str],
    ) -> None:
        self.settings = settings
        self.service = service
        self.turns = turns
        self._reader = reader
        self._providers = providers

    @cached_property
    def gate(self) -> Gate:
        """The application, made when it is first asked for."""
        return make_application(
            self.settings, self.service, self.turns, self._reader, self._providers
        )

    def farewell(self) -> None:
        """Ends streams and open bodies cleanly; called on the loop when the process has to stop."""
        self.gate.closing = True
        self.service.ledger.hub.close_all()
        self.service.producers.closing.set()


def now_ms() -> int:
    """The wall clock, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A UUIDv7: unique, and in the order of its making."""
    return str(uuid_utils.uuid7())


def make_providers(settings: Settings) -> dict[str, Provider]:
    """The providers by name. Raises `SettingsError`."""
    checked_key(settings.openai_api_key)
    if settings.openai_base_url:
        checked_url(settings.openai_base_url)
    late = LateProvider("openai", lambda: _openai_provider(settings))
    return {
        "scripted": ScriptedProvider(rate=settings.scripted_rate),
        "openai": _openai_provider(settings) if settings.provider == "openai" else late,
    }


def _openai_provider(settings: Settings) -> Provider:
    from contextd.provider.openai import OpenAIProvider  # noqa: PLC0415 - the SDK loads slowly

    return OpenAIProvider(
        base_url=settings.openai_base_url,
        api_key=settings.openai_api_key,
        model=settings.model,
        timeout_s=settings.token_timeout_s,
        think_tags=settings.think_tags,
    )


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    clock_ms: Callable[[], int] = now_ms,
    make_id: Callable[[], str] = new_id,
    providers: Mapping[str, Provider] | None = None,
) -> AsyncIterator[Contextd]:
    """contextd without its socket: the database upgraded, the turns recovered, everything at work.

    Raises `StoreError` when the database cannot be used, `SettingsError` for tools that are wrong.
    """
    incarnation = Incarnation(await upgrade(settings.database))
    engines = make_engines(settings.database, readers=settings.readers, incarnation=incarnation)
    presence = Presence(settings.database)
    clock = Clock(clock_ms, time.monotonic)
    writer = Writer(
        engines.writer,
        clock_ms=clock.now_ms,
        queue_max=settings.writer_queue_max,
        file=engines.file,
        waiting=engines.waiting,
    )
    reader = Reader(engines.reader, connections=settings.readers)
    hub = Hub(
        database_id=incarnation.value,
        clock=time.monotonic,
        now_ms=clock.now_ms,
        slow_reader_s=settings.slow_reader_s,
        reader_pending_max=settings.reader_pending_max,
    )
    ledger = Ledger(
        writer=writer,
        tail=Tail(
            bytes_max=settings.tail_bytes_max,
            trust_s=min(TRUST_S, settings.poll_s),
            clock=time.monotonic,
        ),
        hub=hub,
        database_id=incarnation.value,
        owner_id=make_id(),
        clock=clock,
        new_id=make_id,
    )
    leases = Leases(settings.database, writer, owner_id=ledger.owner_id, lease_s=settings.lease_s)
    in_use = dict(providers or make_providers(settings))
    workspace = open_workspace(settings)
    tools = ServerTools(settings, workspace)
    # Two, so that no running turn waits behind what clients declare and decide.
    for_turns, for_clients = ArgumentChecker(), ArgumentChecker()
    toolset = Toolset(lambda: tools.by_name)
    service = make_service(
        settings, ledger, reader, leases, in_use, toolset, for_clients, workspace
    )
    turns = Turns(
        ledger=ledger,
        steps=service.steps,
        calls=service.call_steps,
        toolset=toolset,
        executing=Executing(service.call_steps, toolset, for_turns, settings),
        payloads=service.payloads,
        recovery=service.recovery,
        history=History(reader),
        providers=in_use,
        settings=settings,
    )
    writer.start()
    hub.start()
    background: list[asyncio.Task[Any]] = []
    try:
        await tools.open()
        if engines.dialect == "postgresql":
            await _follow_database(clock, reader)
            follow = _keep_following(clock, reader)
            background.append(asyncio.create_task(follow, name="clock-keep"))
        await presence.enter(
            lambda: _retry_while_busy(leases.end_others, writer, settings.database)
        )
        await _retry_while_busy(leases.renew, writer, settings.database)
        await _retry_while_busy(turns.look, writer, settings.database)
        background += [
            asyncio.create_task(leases.keep(), name="leases-keep"),
            asyncio.create_task(turns.keep(), name="turns-keep"),
            asyncio.create_task(service.producers.keep(), name="producers-keep"),
            asyncio.create_task(service.streams.keep_in_step(), name="streams-keep-in-step"),
            asyncio.create_task(service.content.keep_in_step(), name="content-keep-in-step"),
            asyncio.create_task(service.contexts.keep_purged(), name="contexts-keep-purged"),
        ]
        if engines.dialect == "postgresql":
            succession = Succession(
                ledger,
                reader,
                service.producers,
                incarnation,
                find=lambda: find_incarnation(settings.database),
                leave_turns=turns.leave_all,
                poll_s=settings.poll_s,
            )
            background += [
                asyncio.create_task(succession.keep(), name="succession-keep"),
                asyncio.create_task(succession.compare(), name="succession-compare"),
            ]
        yield Contextd(
            settings=settings,
            service=service,
            turns=turns,
            reader=reader,
            providers=sorted(in_use),
        )
    finally:
        hub.close_all()
        await _stop(background)
        for close in (
            turns.close,
            leases.close,
            service.streams.close,
            writer.close,
            reader.close,
            tools.close,
            for_turns.close,
            for_clients.close,
            *(provider.aclose for provider in in_use.values()),
            presence.leave,
            engines.dispose,
        ):
            await _within_limit(close)
        _keep_logs_apart(engines)
        hub.stop()


async def _follow_database(clock: Clock, reader: Reader) -> None:
    """Several servers share the clock of their database."""
    with suppress(ContextdError):
        clock.follow(await reader.now_ms())


async def _keep_following(clock: Clock, reader: Reader) -> None:
    """Background task: corrects the drift between this machine and the database."""
    while True:
        await asyncio.sleep(CLOCK_FOLLOW_S)
        await _follow_database(clock, reader)


def _keep_logs_apart(engines: Engines) -> None:
    if engines.file is not None and (aside := engines.file.set_log_aside()):
        log.error("the database was replaced; the log of the one before was set aside", path=aside)


async def _retry_while_busy(
    write: Callable[[], Awaitable[object]], writer: Writer, database: str
) -> None:
    """Retry `write` while other processes lock the database, or while it is starting.

    Raises `StoreError` with the reason when waiting is of no use.
    """
    for left in reversed(range(START_TRIES)):
        try:
            await write()
            return
        except (Overloaded, InternalError):
            trouble = writer.trouble
            if left and trouble is not None and trouble.kind in {Kind.BUSY, Kind.AWAY}:
                await asyncio.sleep(START_PAUSE_S)
                continue
            what = (trouble and trouble.reason) or "does not take what has to be written at a start"
            raise StoreError(f"The database {shown(parse_url(database))} {what}") from None


async def _stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels tasks until they have ended: a library may lose a cancel that comes together with a result."""
    running = set(tasks)
    for _ in range(STOP_TRIES):
        if not running:
            return
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=LEAVE_S)
    for task in running:
        log.warning("a background task does not end", task=task.get_name())


async def _within_limit(close: Callable[[], Awaitable[object]]) -> None:
    """One thing that hangs or fails must not keep the others from being let go."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await close()
    except Exception:
        log.exception("something could not be closed", what=getattr(close, "__qualname__", "?"))


def make_service(
    settings: Settings,
    ledger: Ledger,
    reader: Reader,
    leases: Leases,
    providers: Mapping[str, Provider],
    toolset: Toolset,
    checker: ArgumentChecker,
    workspace: Workspace | None,
) -> Service:
    """The rooms of the service, put together."""
    history = History(reader)
    steps = Steps(ledger, attempts_max=settings.attempts_max)
    workflows = Workflows(Path(settings.workflows) if settings.workflows else None)
    payloads = Payloads(
        steps, workspace=workspace, workflows=workflows, bytes_max=settings.file_bytes_max
    )
    results = Results(new_id=ledger.new_id, chunk_bytes_max=settings.chunk_bytes_max)
    return Service(
        ledger=ledger,
        workflows=workflows,
        payloads=payloads,
        contexts=Contexts(
            ledger,
            reader,
            toolset=toolset,
            checker=checker,
            default_provider=settings.provider,
            providers=sorted(providers),
            metadata_bytes_max=settings.metadata_bytes_max,
        ),
        messages=Messages(
            ledger,
            reader,
            steps,
            payloads,
            queue_max=settings.queue_max,
            page_bytes_max=settings.pull_bytes_max,
            metadata_bytes_max=settings.metadata_bytes_max,
        ),
        content=Content(
            ledger,
            reader,
            pull_bytes_max=settings.pull_bytes_max,
            waiting_max=settings.waiting_pulls_max,
            poll_s=settings.poll_s,
        ),
        records=Records(history),
        steps=steps,
        retries=Retries(ledger, steps, queue_max=settings.queue_max),
        recovery=Recovery(ledger, reader, steps, leases, patience_s=2 * settings.poll_s),
        producers=Producers(
            ledger,
            reader,
            steps,
            silence_ms=round(settings.producer_silence_s * 1000),
            metadata_bytes_max=settings.metadata_bytes_max,
        ),
        calls=Calls(
            ledger,
            history,
            steps,
            toolset=toolset,
            checker=checker,
            results=results,
            arguments_bytes_max=settings.tool_arguments_bytes_max,
            result_bytes_max=settings.tool_result_bytes_max,
        ),
        call_steps=CallSteps(ledger, steps, toolset=toolset, results=results),
        branches=Branches(ledger, reader),
        streams=Streams(ledger, reader, streams_max=settings.streams_max, poll_s=settings.poll_s),
    )


class _StartUp:
    """Signals until the server takes them itself: the start is given up, and what it did is undone.

    uvicorn raises a signal again once it has stopped; by then there is nothing left to give up.
    """

    def __init__(self) -> None:
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._give_up)
        _end_on_hangup()

    def _give_up(self, number: int, frame: Any) -> None:
        if not self.over and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)


def _end_on_hangup() -> None:
    """SIGHUP is SIGTERM while there is nothing to read again, unless it is ignored, as by `nohup`."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


class _Server(uvicorn.Server):
    """uvicorn, which by itself would wait for open streams for ever when told to stop."""

    def __init__(
        self, config: uvicorn.Config, contextd: Contextd, start_up: _StartUp, console: Console
    ) -> None:
        super().__init__(config)
        self._start_up = start_up
        self._contextd = contextd
        self._console = console
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._start_up.over = True
        await super().startup(sockets)
        if sockets and not self.should_exit:
            announce(self._console, self._contextd.settings, sockets[0])

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        sweeping = asyncio.create_task(sweep(self.server_state.connections))  # type: ignore[arg-type]
        try:
            await super().serve(sockets)
        finally:
            sweeping.cancel()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._contextd.farewell)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = self._loop.call_later(self._contextd.settings.shutdown_s, self._end_requests)
        await super().shutdown(sockets)
        ending.cancel()

    def _end_requests(self) -> None:
        """What has not come to its end in time gets a 503, or is cut off where its answer had begun."""
        for connection in list(self.server_state.connections):
            connection.cut_off()  # type: ignore[union-attr]
        for task in self.server_state.tasks:
            task.cancel()
        self._loop.call_later(CUT_OFF_S, self._abort_all)

    def _abort_all(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def serve(settings: Settings, console: Console) -> None:
    """Serves until SIGTERM or SIGINT. Raises `SettingsError` or `StoreError`."""
    check_exposure(settings)
    start_up = _StartUp()
    listening = listen(settings)
    try:
        async with running(settings) as contextd:
            connections_max = possible_connections(settings.connections_max)
            limits = Limits.of(settings, connections_max=connections_max)
            config = uvicorn.Config(
                contextd.gate,
                http=partial(Connection, limits=limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_s + 2 * CUT_OFF_S,  # type: ignore[arg-type]
            )
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            gc.enable()  # it may have been off until everything was loaded
            await _Server(config, contextd, start_up, console).serve(sockets=[listening])
    finally:
        listening.close()


async def _serve_to_the_end(settings: Settings, console: Console) -> None:
    """A loop that ends waits for all its tasks, and a tool may not let itself be stopped."""
    try:
        await serve(settings, console)
    finally:
        await _leave()


async def _leave() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left and (await asyncio.wait(left, timeout=LEAVE_S))[1]:
        log.warning("a tool does not let itself be stopped; it ends with the process")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # everything is closed: the database, the streams, the children


def run(settings: Settings) -> int:
    """Blocks until the server has stopped; returns the process's exit code (§12)."""
    configure_logging(settings)
    console = Console(soft_wrap=True)
    try:
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            _run_loop(_serve_to_the_end(settings, console))
    except (SettingsError, StoreError) as error:
        print(f"contextd: {error}", file=sys.stderr)  # noqa: T201 - the one line for the operator
        return 1
    return 0


def _run_loop(main: Any) -> None:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


__all__ = ["Contextd", "now_ms", "run", "running", "serve"]
