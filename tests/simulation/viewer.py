"""Who watches: a stream at one server after the other, and pulls of what it tells."""

import asyncio
import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from actor import TRIES, Actor
from truth import MessageFact, expect
from virtual_server import Cut, Server

from contextd.core.errors import ContextdError, ContextNotFound, Overloaded, ShuttingDown
from contextd.service import Service

if TYPE_CHECKING:
    from world import World


class Viewer(Actor):
    """Follows a context by its stream, at one server after the other, and pulls what it is told of."""

    def __init__(self, world: "World", name: str, context_id: str) -> None:
        super().__init__(world, name)
        self.context_id = context_id
        self.cursor: str | None = "beginning" if self.rng.random() < 0.5 else None
        self.base: int | None = 0 if self.cursor else None  # what came before is not promised
        self.positions: dict[str, int] = {}
        self.closed: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.held: dict[str, int] = {}
        self.caught_up = asyncio.Event()

    async def act(self) -> None:
        """For ever: attaches, watches for a while, comes back elsewhere."""
        while True:
            server = self.anywhere()
            most_s = self.rng.choice((0.5, 2.0, 30.0))
            try:
                async with asyncio.timeout(most_s):
                    await self._watch(server)
            except (TimeoutError, Cut, ContextdError) as error:
                self.note(f"leaves {server.name}: {type(error).__name__}")
                if isinstance(error, ContextNotFound):
                    known = self.world.truth.contexts.get(self.context_id)
                    if known is not None and known.deleted_at is not None:
                        return
            await self.pause(0.6)

    async def _watch(self, server: Server) -> None:
        if server.service is None or server.gone.is_set():
            raise Cut
        blocks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        work = _stream(server.service, self.context_id, self.cursor, blocks)
        task = server.spawn(work, "stream")
        gone = asyncio.ensure_future(server.gone.wait())
        gone.add_done_callback(lambda _: blocks.put_nowait(None))
        connection = Connection(self, server)
        try:
            while (block := await blocks.get()) is not None:
                if isinstance(block, Exception):
                    raise block
                connection.take(block)
                await self._pull(server, connection)
        finally:
            gone.cancel()
            task.cancel()

    async def _pull(self, server: Server, connection: "Connection") -> None:
        for message_id in [m for m, at in self.positions.items() if at > self.held.get(m, 0)]:
            while self.positions[message_id] > self.held.get(message_id, 0):
                await self.pull_once(server, message_id, connection.positions.get(message_id, 0))

    async def pull_once(self, server: Server, message_id: str, told: int = 0) -> None:
        """One pull from what is held; `told`: how far this server said that the message has got."""
        start = self.held.get(message_id, 0)
        wait_s = self.rng.choice((0, 0, 0, 1.0))

        async def work(service: Service) -> Any:
            if wait_s:
                return await service.content.wait(
                    self.context_id, message_id, start=start, end=None, wait_s=wait_s
                )
            return await service.content.pull(self.context_id, message_id, start=start, end=None)

        try:
            found = await server.ask(work)
        except (Overloaded, ShuttingDown):
            await self.pause(0.5)
            return
        self.world.tally("pulls")
        self.world.promises.pulled(server, self.context_id, message_id, start, found)
        words = f"{server.name} told {self.name} of {told} of {message_id}, and pulls end at"
        expect(found.head >= told, f"{words} {found.head}")
        self.texts[message_id] = self.texts.get(message_id, "") + found.content
        self.held[message_id] = max(start, found.sequence)

    async def watch_once_more(self) -> None:
        """At the end: comes back once more, and takes what there is."""
        for _ in range(TRIES):
            server = self.anywhere()
            if self.world.truth.context(self.context_id) is None or server.gone.is_set():
                return
            try:
                async with asyncio.timeout(0.3):
                    await self._watch(server)
            except TimeoutError:
                return
            except (Cut, Overloaded):
                await asyncio.sleep(0.2)

    def verify(self) -> None:
        """At the end it knows all, exactly."""
        context = self.world.truth.context(self.context_id)
        if context is None or self.base is None:
            return
        for fact in context.messages.values():
            if self.promised(fact, context.revision):
                expect(fact.id in self.closed, f"{self.name} never heard of the end of {fact.id}")
        for message_id, text in self.texts.items():
            fact = context.messages[message_id]
            expect(text == fact.text(0, fact.head), f"{self.name} has {text!r} of {fact.id}")

    def promised(self, fact: MessageFact, revision: int) -> bool:
        """Whether an `id:` at `revision` says that the end of the message was told."""
        closed = fact.closed_revision
        new = closed is not None and self.base is not None and self.base < closed
        return new and fact.revision <= revision


class Connection:
    """One stream of a viewer."""

    def __init__(self, viewer: Viewer, server: Server) -> None:
        self._viewer = viewer
        self._server = server
        self._revision = 0
        self.positions: dict[str, int] = {}

    def take(self, block: bytes) -> None:
        """The frames of a block."""
        for frame in block.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in frame.split("\n") if ": " in line)
            if "data" in lines:
                self._take_signal(json.loads(lines["data"]))
            if "id" in lines:
                self._take_id(lines["id"])

    def _take_signal(self, signal: dict[str, Any]) -> None:
        words = f"{self._server.name} told {self._viewer.name} {signal}"
        match signal["type"]:
            case "state_changed":
                expect(signal["revision"] >= self._revision, f"{words} after {self._revision}")
                self._revision = signal["revision"]
                if signal["new_state"] == "deleted":
                    context = self._viewer.world.truth.context(self._viewer.context_id)
                    expect(context is None, f"{words}, and it is there")
            case "content_delta":
                self._take_position(signal["message_id"], signal["current_sequence"], words)
            case "message_completed":
                self._take_end(signal, words)

    def _take_position(self, message_id: str, position: int, words: str) -> None:
        viewer = self._viewer
        before = self.positions.get(message_id, -1)
        expect(position >= before, f"{words} after {before}")
        self.positions[message_id] = position
        fact = viewer.world.truth.message(viewer.context_id, message_id)
        expect(fact is not None and position <= fact.head, f"{words}, not committed")
        viewer.positions[message_id] = max(position, viewer.positions.get(message_id, 0))

    def _take_end(self, signal: dict[str, Any], words: str) -> None:
        viewer, message_id = self._viewer, signal["message_id"]
        fact = viewer.world.truth.message(viewer.context_id, message_id)
        stored = fact and (fact.status, fact.final)
        expect(stored == (signal["status"], signal["final_sequence"]), f"{words}, stored {stored}")
        viewer.closed[message_id] = signal["final_sequence"]
        viewer.positions[message_id] = self.positions[message_id] = signal["final_sequence"]

    def _take_id(self, cursor: str) -> None:
        viewer = self._viewer
        revision = int(cursor.rsplit("-", 1)[1])
        viewer.cursor = cursor
        if viewer.base is None:
            viewer.base = revision
        context = viewer.world.truth.context(viewer.context_id)
        if context is None:
            return
        expect(revision <= context.revision, f"{self._server.name} gave the id {cursor}")
        words = f"{self._server.name} gave {viewer.name} the id {cursor}, and had not told of"
        for fact in context.messages.values():
            if viewer.promised(fact, revision):
                expect(fact.id in viewer.closed, f"{words} the end of {fact.id}")


async def _stream(
    service: Service,
    context_id: str,
    cursor: str | None,
    blocks: "asyncio.Queue[bytes | Exception | None]",
) -> None:
    """What `GET /contexts/{id}/stream` does."""
    reader = service.streams.subscribe(context_id, throttle_s=0.02, heartbeat_s=15.0, named=False)
    try:
        async with aclosing(service.streams.attach(reader, context_id, cursor)) as pages:
            async for page in pages:
                blocks.put_nowait(page)
                reader.sent()
        while (news := await reader.take()) is not None:
            blocks.put_nowait(news)
        blocks.put_nowait(None)
    except ContextdError as error:
        blocks.put_nowait(error)
    finally:
        reader.close()
