"""Who takes part: people who send, producers, viewers, those who decide, and what goes wrong."""

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from actor import Actor
from truth import expect
from viewer import Viewer
from virtual_server import Cut, Server

from contextd.core.context import ApprovalPolicy, ContextPatch, ContextRequest, ExternalTool
from contextd.core.errors import (
    ContextdError,
    ContextNotFound,
)
from contextd.core.message import SendRequest, TextPayload
from contextd.core.producing import (
    CompleteRequest,
    FailRequest,
    OpenRequest,
    Producer,
    ProducerError,
)
from contextd.core.tool_call import ToolDecision, ToolResultRequest
from contextd.service import Service

if TYPE_CHECKING:
    from world import World

REST_S = 60.0  # after the last fault everything has come to rest


class Person(Actor):
    """Sends, cancels, retries, patches, branches and at times deletes, in one context."""

    def __init__(self, world: "World", name: str, context_id: str) -> None:
        super().__init__(world, name)
        self.context_id = context_id
        self.sent = 0

    async def act(self) -> None:
        """Until time is up."""
        context = self.context_id
        request = ContextRequest(
            id=context,
            approval_policy=ApprovalPolicy(mode=self.rng.choice(("auto", "auto", "manual"))),
            tools=["quick", "slow", "hanging", "failing", "guarded", EXTERNAL],
        )
        await self.stubborn("create", lambda s: s.contexts.create(request))
        while self.world.loop.time() < self.world.act_s:
            act = self.rng.choices(
                (self.send, self.cancel, self.retry, self.patch, self.fork, self.delete),
                (10, 2, 2, 1, 1, 0.3),
            )[0]
            try:
                await act()
            except ContextNotFound:
                return
            except (ContextdError, Cut):
                pass
            await self.pause(1.5)

    async def send(self, **how: Any) -> None:
        """The same message, with its id, until it is taken."""
        self.sent += 1
        request = SendRequest(
            payload=TextPayload(content=script(self.rng)),
            message_id=f"{self.name}-{self.sent}",
            on_busy=self.rng.choice((None, None, "interrupt", "reject")),
            respond=self.rng.random() < 0.9,
            **how,
        )
        self.world.tally("sends")
        answer = await self.stubborn(
            f"send {request.message_id}", lambda s: s.messages.send(self.context_id, request)
        )
        known = self.world.truth.message(self.context_id, answer.message_id) is not None
        expect(known, f"a send of {answer.message_id} was answered, and nothing is committed")

    async def cancel(self) -> None:
        await self.once("cancel", lambda s: s.steps.cancel(self.context_id, None))

    async def retry(self) -> None:
        await self.once("retry", lambda s: s.retries.retry(self.context_id))

    async def patch(self) -> None:
        patch = ContextPatch(title=f"title {self.rng.random()}")
        await self.once("patch", lambda s: s.contexts.patch(self.context_id, patch))

    async def fork(self) -> None:
        context = self.world.truth.context(self.context_id)
        placed = [fact.id for fact in context.messages.values()] if context else []
        if placed:
            await self.send(parent_id=self.rng.choice(placed))

    async def delete(self) -> None:
        await self.once("delete", lambda s: s.contexts.delete(self.context_id))


class Decider(Actor):
    """Decides what waits for a person, and posts what external tools found."""

    async def act(self) -> None:
        """For ever."""
        while True:
            await self.pause(0.8)
            rows = self.world.truth.query(
                "SELECT c.id AS context_id, t.id, t.status, t.external, c.state FROM tool_calls t"
                " JOIN contexts c ON c.key = t.context_key WHERE t.status = 'pending'"
                " OR (t.status = 'approved' AND t.external"
                " AND c.state IN ('executing_tools', 'awaiting_tool_results'))"
            )
            if not rows:
                continue
            with suppress(ContextdError, Cut):
                await self._answer(self.rng.choice(rows))

    async def _answer(self, row: Any) -> None:
        context, call = row["context_id"], row["id"]
        if row["status"] == "pending":
            said = self.rng.choice(("approve", "approve", "deny"))
            decision = ToolDecision(tool_call_id=call, decision=said)
            await self.once(f"{said} {call}", lambda s: s.calls.decide(context, [decision]))
        else:
            result = ToolResultRequest(content=f"result of {call}")
            await self.once(
                f"result of {call}", lambda s: s.calls.post_result(context, call, result)
            )


class Writer(Actor):
    """A producer: opens a message and writes it chunk by chunk, anywhere, until somebody closes it."""

    def __init__(self, world: "World", name: str, context_id: str, message_id: str) -> None:
        super().__init__(world, name)
        self.context_id = context_id
        self.message_id = message_id
        self.epoch = 0
        self.head = 0
        self.numbered = self.rng.random() < 0.8

    async def act(self) -> None:
        """From the opening to the end, if it comes to it."""
        try:
            await self._open()
            for _ in range(self.rng.randint(1, 6)):
                await self._append()
                if self.rng.random() < 0.03:
                    await asyncio.sleep(9.0)  # silent for too long
                await self.pause(self.rng.choice((0.02, 0.3)))
            await self._end()
        except (ContextdError, Cut) as error:
            self.note(f"gives up: {type(error).__name__}")

    async def _open(self) -> None:
        request = OpenRequest(producer=Producer(id=self.name))
        message, _ = await self.stubborn(
            f"open {self.message_id}",
            lambda s: s.producers.open(self.context_id, self.message_id, request),
        )
        assert isinstance(message.epoch, int)
        self.epoch, self.head = message.epoch, message.current_sequence

    async def _append(self) -> None:
        count = self.rng.choice((1, 1, 2, 5))
        texts = [f"{self.name}:{self.head + 1 + index} " for index in range(count)]
        sequences = [self.head + 1 + index if self.numbered else None for index in range(count)]

        async def work(service: Service) -> Any:
            live = await service.producers.find(self.context_id, self.message_id)
            return await service.producers.append(
                live,
                epoch=self.epoch,
                texts=texts,
                sizes=[len(text) for text in texts],
                sequences=sequences,
            )

        tries = self.stubborn if self.numbered else self.once
        self.world.tally("appends")
        appended = await tries(f"append {count} after {self.head}", work)
        fact = self.world.truth.message(self.context_id, self.message_id)
        head = self.head + count if self.numbered else appended.head
        stored = fact is not None and fact.texts[head - count : head] == texts
        expect(stored, f"{self.name} was told that {texts} are stored, and they are not")
        self.head = head

    async def _end(self) -> None:
        how = self.rng.choice(("complete", "complete", "complete", "fail", "vanish"))
        if how == "complete":
            final = self.head if self.numbered else None
            done = CompleteRequest(epoch=self.epoch, final_sequence=final)
            await self.stubborn(
                "complete", lambda s: s.producers.complete(self.context_id, self.message_id, done)
            )
        elif how == "fail":
            broken = FailRequest(epoch=self.epoch, error=ProducerError(type="x", message="x"))
            await self.stubborn(
                "fail", lambda s: s.producers.fail(self.context_id, self.message_id, broken)
            )


class Fate(Actor):
    """What goes wrong: servers die, freeze, stop, lose the database."""

    async def act(self) -> None:
        """Until time is up."""
        while True:
            await self.pause(self.rng.choice((1.0, 3.0)))
            if self.world.loop.time() > self.world.act_s:
                return
            servers = [server for server in self.world.servers if server.up]
            if servers:
                blow = self.rng.choice(
                    (self._kill, self._stop, self._freeze, self._cut, self._outage)
                )
                await blow(self.rng.choice(servers))

    async def _kill(self, server: Server) -> None:
        self.note(f"kills {server.name}")
        self.world.tally("kills")
        server.kill()
        await self.pause(self.rng.choice((0.1, 4.0)))
        self.world.start(server.number)

    async def _stop(self, server: Server) -> None:
        self.note(f"stops {server.name}")
        self.world.tally("stops")
        server.stop()
        await server.gone.wait()
        await self.pause(1.0)
        self.world.start(server.number)

    async def _freeze(self, server: Server) -> None:
        seconds = self.rng.choice((0.3, 2.0, 9.0))
        self.note(f"freezes {server.name} for {seconds} s")
        self.world.tally("freezes")
        self.world.disturbed(seconds)
        self.world.loop.freeze(server)
        await asyncio.sleep(seconds)
        self.world.loop.thaw(server)
        self.note(f"{server.name} goes on")

    async def _cut(self, server: Server) -> None:
        self.note(f"cuts the connections of {server.name}")
        self.world.tally("cuts")
        self.world.disturbed()
        self.world.database.cut(server)

    async def _outage(self, server: Server) -> None:
        seconds = self.rng.choice((0.5, 3.0))
        self.note(f"takes the database from {server.name} for {seconds} s")
        self.world.tally("outages")
        self.world.database.away.add(server)
        self.world.database.cut(server)
        self.world.disturbed(seconds)
        await asyncio.sleep(seconds)
        self.world.database.away.discard(server)


EXTERNAL = ExternalTool(name="external", description="x", parameters={}, external=True)


def script(rng: Any) -> str:
    """What a person says, which is what the model will do."""
    steps: list[Any] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("text", "text", "chunks", "thinking", "delay", "tools", "error"))
        match kind:
            case "text":
                steps.append({"text": " ".join(["word"] * rng.randint(1, 6))})
            case "chunks":
                steps += [{"rate": 0}, {"chunks": [f"c{n} " for n in range(rng.randint(1, 4))]}]
            case "thinking":
                steps.append({"thinking": "let me see"})
            case "delay":
                steps.append({"delay_ms": rng.choice((50, 400, 1500))})
            case "tools":
                names = ("quick", "slow", "failing", "guarded", "external", "hanging")
                for name in rng.choices(names, (3, 2, 1, 2, 2, 0.3), k=rng.choice((1, 2))):
                    steps.append({"tool_call": {"name": name, "arguments": {}}})
            case "error":
                often = rng.choice((1, 2))
                steps.append(
                    rng.choice(({"error": "fatal"}, {"error": "transient", "times": often}))
                )
    return json.dumps({"script": steps})


async def play(world: "World") -> None:
    """People act while things go wrong; then all comes to rest, and everybody knows everything."""
    rng = world.rng("cast")
    contexts = [f"c{number}" for number in range(rng.choice((1, 1, 1, 2)))]
    busy: list[asyncio.Future[None]] = []
    for number, context in enumerate(contexts):
        busy.append(_start(Person(world, f"person{number}", context).act()))
        if rng.random() < 0.6:
            busy.append(_start(_produce(world, context, number)))
    viewers = [
        Viewer(world, f"viewer{number}", rng.choice(contexts))
        for number in range(rng.choice((1, 1, 2)))
    ]
    watching = [_start(viewer.act()) for viewer in viewers]
    watching.append(_start(Decider(world, "decider").act()))
    busy.append(_start(Fate(world, "fate").act()))
    await _until_done(busy, watching)
    world.note("world", "the weather is calm from here on")
    world.database.weather.calm = True
    world.disturbed()
    await _until_rest(world, watching)
    await _let_all_know(world, viewers, watching)


async def _produce(world: "World", context_id: str, number: int) -> None:
    """A message of a producer, and at times a second producer who takes it over."""
    rng = world.rng(f"producing{number}")
    for turn in range(rng.choice((1, 1, 2))):
        await asyncio.sleep(rng.random() * 1.5)
        message = f"produced{number}-{turn}"
        first = _start(Writer(world, f"writer{number}.{turn}", context_id, message).act())
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random())
            await Writer(world, f"rival{number}.{turn}", context_id, message).act()
        await first


def _start(work: Any) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(work)


async def _until_done(busy: list[Any], watching: list[Any]) -> None:
    pending = set(busy)
    while pending:
        done, _ = await asyncio.wait([*pending, *watching], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
            pending.discard(task)
        watching[:] = [task for task in watching if not task.done()]


async def _until_rest(world: "World", watching: list[Any]) -> None:
    deadline = world.loop.time() + REST_S
    while unrest := world.promises.unrest():
        expect(world.loop.time() < deadline, f"{REST_S:g} s later: {'; '.join(unrest)}")
        await asyncio.sleep(0.1)
        for task in watching:
            if task.done():
                task.result()
    await asyncio.sleep(1.3)


async def _let_all_know(world: "World", viewers: list[Viewer], watching: list[Any]) -> None:
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    for viewer in viewers:
        await viewer.watch_once_more()
        viewer.verify()
    world.promises.look_at_all()
    world.truth.verify()
