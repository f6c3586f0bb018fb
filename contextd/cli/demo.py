"""`demo`: what contextd is for, in ten seconds: a reader stays exact over the death of its server."""

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import assert_never

import httpx
import msgspec
import rich_click as click
from rich.console import Console
from rich.text import Text as Styled

from contextd.cli.terminal import complain, run
from contextd.client import Client, Closed, Current, Disconnected, Restarted, Text
from contextd.client.errors import patiently
from contextd.core import signal
from contextd.core.message import MessageStatus, Role
from contextd.settings import ENVIRONMENT_PREFIX

QUESTION = (
    "A stream that carries text loses some whenever a phone changes its network, a laptop sleeps or "
    "a server is replaced. Here the stream carries only signals, which may be lost or repeated. The "
    "text waits in a database, numbered chunk by chunk, and each reader pulls what it lacks."
)
ANSWER = f"You said: {QUESTION}"
CHUNKS_A_SECOND = 16
KILL_AT_CHUNK = 20
THROTTLE_MS = 200  # slow, so that a person can read along
START_WAIT_S = 20.0
DEMO_MAX_S = 60.0
CONTEXT_ID = "demo"
LEFT_WIDTH = 50
LOST = "        (no connection)"


@click.command()
def demo() -> int:
    """Watch an answer survive a kill -9 of its server. Needs nothing, leaves nothing behind."""
    return run(_demo())


async def _demo() -> int:
    with tempfile.TemporaryDirectory(prefix="contextd-demo-") as folder:
        server = _Server(Path(folder))
        stage = _Stage()
        try:
            async with asyncio.timeout(DEMO_MAX_S):
                return await _play(server, stage)
        except TimeoutError:
            complain(f"the demo did not end within {DEMO_MAX_S:g} s")
            return 1
        finally:
            await server.stop()


async def _play(server: "_Server", stage: "_Stage") -> int:
    stage.scene("contextd starts: scripted provider, SQLite in a temporary folder, loopback only")
    # A transport of its own: what the environment says of proxies is not for this machine.
    async with Client(server.url, transport=httpx.AsyncHTTPTransport()) as client:
        await server.start(client)
        context = await client.create_context(id=CONTEXT_ID, title="A demonstration")
        stage.scene(f"a message is sent to process {server.pid}; two readers watch")
        stage.row("reader 1: signals, no text", "reader 2: the text it pulls")
        reader = _Reader(stage)
        async with _watching_signals(client, context.stream_cursor, stage):
            await client.send(CONTEXT_ID, QUESTION)
            await reader.read_until_killed(client, context.stream_cursor, server)
        return await _conclude(client, stage, reader)


@asynccontextmanager
async def _watching_signals(client: Client, cursor: str, stage: "_Stage") -> AsyncIterator[None]:
    """Reader 1, beside whatever else is done."""
    task = asyncio.create_task(_watch_signals(client, cursor, stage))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch_signals(client: Client, cursor: str, stage: "_Stage") -> None:
    signals = client.signals(CONTEXT_ID, cursor=cursor, throttle_ms=THROTTLE_MS)
    async with aclosing(signals):
        async for told in signals:
            if isinstance(told, Disconnected):
                stage.lose()
            else:
                stage.signal(told)


class _Reader:
    """Reader 2: follows the text, and has the server killed in the middle of it."""

    def __init__(self, stage: "_Stage") -> None:
        self.texts: dict[str, str] = {}
        self.pulls = 0
        self.attached = 0
        self._stage = stage

    async def read_until_killed(self, client: Client, cursor: str, server: "_Server") -> None:
        """To the end of the answer; the killing happens on the way."""
        killing: asyncio.Task[None] | None = None
        events = client.follow(CONTEXT_ID, cursor=cursor, throttle_ms=THROTTLE_MS)
        async with aclosing(events):
            async for event in events:
                match event:
                    case Text(role=Role.ASSISTANT):
                        self._append(event)
                        if killing is None and event.sequence >= KILL_AT_CHUNK:
                            killing = asyncio.create_task(self._kill(client, server, event))
                    case Restarted():
                        self.texts.pop(event.message_id, None)
                    case Current():
                        self.attached += 1
                    case Closed(role=Role.ASSISTANT):
                        self._stage.text(f"[{event.status} at {event.final_sequence}]")
                        if event.status != MessageStatus.INTERRUPTED:
                            break
                    case _:
                        pass
        if killing:
            await killing

    def _append(self, event: Text) -> None:
        self.pulls += 1
        self.texts[event.message_id] = self.texts.get(event.message_id, "") + event.content
        self._stage.text(event.content)

    async def _kill(self, client: Client, server: "_Server", event: Text) -> None:
        dead = server.pid
        await server.kill()
        self._stage.scene(f"kill -9 {dead} in mid-answer; reader 2 holds {event.sequence} chunks")
        await server.start(client)
        self._stage.scene(f"process {server.pid} has taken over; it tries the turn again")


async def _conclude(client: Client, stage: "_Stage", reader: _Reader) -> int:
    """A third reader, who comes afterwards with nothing, has to find the same."""
    stored = {}
    for message_id in reader.texts:
        stored[message_id] = (await client.pull(CONTEXT_ID, message_id)).content
    exact = stored == reader.texts and [*reader.texts.values()][-1:] == [ANSWER]
    broken = len(reader.texts) > 1
    stage.scene("what was seen")
    stage.fact("signals", f"{stage.signals}, the largest {stage.signal_bytes_max} bytes, no text")
    stage.fact("pulls with text", str(reader.pulls))
    stage.fact("reconnects", str(reader.attached - 1))
    stage.fact("attempts", f"{len(reader.texts)}{', one broken off by the kill' if broken else ''}")
    stage.fact("characters", str(len(ANSWER)))
    stage.fact("text equal", "yes" if exact else "NO")
    stage.scene("go on")
    stage.fact("", "contextd serve")
    stage.fact("", "contextd send --create tea 'Hello'")
    stage.fact("", "curl -N http://127.0.0.1:8600/contexts/tea/stream")
    return 0 if exact else 1


class _Server:
    """contextd in a process of its own, which can be killed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self, client: Client) -> None:
        """Raises `ClickException` when it does not answer."""
        log = self._folder / "server.log"
        with log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "contextd", "serve"),
                *("--port", str(self._port), "--log-level", "error", "--backoff-initial-s", "0.2"),
                *("--database", f"sqlite+aiosqlite:///{self._folder / 'demo.db'}"),
                *("--scripted-rate", str(CHUNKS_A_SECOND)),
                env={k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if not await self._answers(client, self._process):
            lines = log.read_text(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line), "it said nothing")
            raise click.ClickException(f"the demo's server did not start: {said}")

    async def _answers(self, client: Client, process: asyncio.subprocess.Process) -> bool:
        asked = asyncio.create_task(patiently(client.list_contexts, tries_max=None))
        exited = asyncio.create_task(process.wait())
        try:
            either = {asked, exited}
            await asyncio.wait(either, timeout=START_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            return asked.done() and asked.exception() is None
        finally:
            asked.cancel()
            exited.cancel()

    async def kill(self) -> None:
        """SIGKILL: no farewell, no flush."""
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> None:
        """Politely, then not."""
        if self._process and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                await self.kill()


class _Stage:
    """Two columns, a row for whatever happens; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._left = ""
        self._lost = False
        self.signals = 0
        self.signal_bytes_max = 0

    def scene(self, title: str) -> None:
        self._flush()
        self._console.print(Styled(f"\n── {title}", style="bold"))

    def text(self, right: str) -> None:
        """Stands beside the signal that it was pulled after."""
        left, self._left = self._left, ""
        self.row(left, right)

    def lose(self) -> None:
        """Said once, however often it is tried."""
        if not self._lost:
            self._flush()
            self.row(LOST, "")
        self._lost = True

    def _flush(self) -> None:
        if self._left:
            self.row(self._left, "")
        self._left = ""

    def row(self, left: str, right: str) -> None:
        left = f"{left:<{LEFT_WIDTH}}  " if right else left
        self._console.print(Styled(left, "cyan"), Styled(right), sep="")

    def fact(self, name: str, value: str) -> None:
        self._console.print(Styled(f"  {name:<18}", "dim"), Styled(value), sep="")

    def signal(self, told: signal.Signal) -> None:
        size = len(msgspec.json.encode(told))
        self.signals += 1
        self.signal_bytes_max = max(self.signal_bytes_max, size)
        self._flush()
        self._lost = False
        self._left = f"{size:>4} B  {_describe(told)}"


def _describe(told: signal.Signal) -> str:
    match told:
        case signal.ContentDelta():
            return f"content_delta      {told.role} at {told.current_sequence}"
        case signal.MessageCompleted():
            return f"message_completed  {told.role} {told.status} at {told.final_sequence}"
        case signal.StateChanged():
            return f"state_changed      {told.new_state}"
        case signal.Heartbeat():
            return "heartbeat"
        case _:
            assert_never(told)
