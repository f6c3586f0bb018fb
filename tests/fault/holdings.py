"""What one reader holds of each message, and how it pulls: one pull in flight for each (§4.4).

Pulls go through the cutting proxy, so any of them may break; a broken pull is asked again from the same
position. An answer is appended only if it continues what is held, and is compared with everything that
others were given.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from evidence import Evidence
from raw_http import Answer, BrokenError, Connection, GarbledError, HungError
from witness import Witness

RANGE_FIELDS = {"context_id", "message_id", "from_sequence", "sequence", "content"}
PULL_FIELDS = RANGE_FIELDS | {"head_sequence", "status", "final"}
RETRY_S_MAX = 0.03
STALE_S_MAX = 20.0


@dataclass
class World:
    """What the readers and senders of a run share.

    `port` and `stream_port` are those of proxies, `direct_port` that of a server, or None while there
    is none; `up` is set while there is one. `truth` is looked into when it is open. `several`: more
    than one server is at work, so that one may be a moment behind the other; `ports` are those of all
    that are up.
    """

    evidence: Evidence
    truth: Witness
    port: int
    stream_port: int
    direct_port: Callable[[], int | None]
    up: asyncio.Event
    cache: dict[str, Answer] = field(default_factory=dict)
    several: bool = False
    ports: Callable[[], list[int]] = list


@dataclass
class Holding:
    """One message as one reader holds it."""

    message_id: str
    sequence: int = 0
    pieces: list[str] = field(default_factory=list)
    wanted: int = 0
    closed: tuple[str, int] | None = None
    final: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def text(self) -> str:
        """Everything that was appended."""
        return "".join(self.pieces)


class Holder:
    """Holds the messages of one context. `way`: json | bounded | plain | chunks."""

    def __init__(self, world: World, context_id: str, name: str, way: str, random: Random) -> None:
        self.world = world
        self.evidence = world.evidence
        self.context_id = context_id
        self.name = name
        self.random = random
        self.messages: dict[str, Holding] = {}
        self.gone = False  # the context was deleted
        self.progress = asyncio.Event()
        self._way = way
        self._idle: list[Connection] = []

    def holding(self, message_id: str) -> Holding:
        """The message, from position 0 when it is new."""
        return self.messages.setdefault(message_id, Holding(message_id))

    def want(self, message_id: str, position: int, closed: tuple[str, int] | None = None) -> None:
        """A signal: pull until `position`, or until the end."""
        holding = self.holding(message_id)
        holding.wanted = max(holding.wanted, position)
        holding.closed = closed or holding.closed
        if not holding.final and (holding.task is None or holding.task.done()):
            holding.task = asyncio.create_task(self._pull_until_content(holding))

    async def close(self) -> None:
        """Stops pulling."""
        tasks = [holding.task for holding in self.messages.values() if holding.task is not None]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for error in outcomes:
            if isinstance(error, Exception):
                self.evidence.fault("a puller that broke", by=self.name, error=repr(error))
        for connection in self._idle:
            connection.close()

    async def ask(self, target: str, headers: dict[str, str] | None = None) -> Answer:
        """A GET through the proxy, until it is answered in full."""
        while True:
            connection = self._idle.pop() if self._idle else Connection(self.world.port)
            try:
                answer = await connection.request("GET", target, headers=headers)
            except BrokenError:
                self.evidence.counts["broken requests"] += 1
            except (HungError, GarbledError, UnicodeError) as error:
                self.evidence.fault("an answer that is none", by=self.name, error=repr(error))
            else:
                if self.random.random() < 0.5:
                    self._idle.append(connection)
                else:
                    connection.close()
                if answer.status != 503:
                    return answer
            await self.world.up.wait()
            await asyncio.sleep(self.random.uniform(0.001, RETRY_S_MAX))

    async def _pull_until_content(self, holding: Holding) -> None:
        stale_until = asyncio.get_running_loop().time() + STALE_S_MAX
        while not self.gone and (holding.sequence < holding.wanted or self._unfinished(holding)):
            heard = holding.wanted, holding.closed
            before = holding.sequence
            await self._pull(holding)
            self.progress.set()
            if self.gone or holding.final or holding.sequence > before:
                continue
            if holding.sequence < heard[0] or heard[1] is not None:
                await self._not_there_yet(holding, heard, stale_until)

    async def _not_there_yet(
        self, holding: Holding, heard: tuple[int, tuple[str, int] | None], stale_until: float
    ) -> None:
        """A pull after a signal gave nothing. With several servers one may be a moment behind."""
        if not self.world.several or asyncio.get_running_loop().time() > stale_until:
            self.evidence.fault(
                "a signal ahead of what can be pulled",
                by=self.name,
                message=holding.message_id,
                heard=heard,
                held=holding.sequence,
            )
            holding.closed, holding.wanted = None, holding.sequence
        self.evidence.counts["pulls of a server that is behind"] += 1
        await asyncio.sleep(RETRY_S_MAX)

    def _unfinished(self, holding: Holding) -> bool:
        return holding.closed is not None and not holding.final

    async def _pull(self, holding: Holding) -> None:
        self.evidence.counts[f"pulls, {self._way}"] += 1
        path = f"/contexts/{self.context_id}/messages/{holding.message_id}"
        if self._way == "bounded" and holding.sequence < holding.wanted:
            await self._pull_bounded(holding, path)
        elif self._way == "plain":
            await self._pull_plain(holding, path)
        elif self._way == "chunks":
            await self._pull_chunks(holding, path)
        else:
            answer = await self.ask(f"{path}/content?from_sequence={holding.sequence}")
            if self.accept(answer):
                await self.take_pull(holding, answer.json())

    def accept(self, answer: Answer) -> bool:
        """Whether it is a 200; a 404 is right only for what is being deleted."""
        if answer.status == 200:
            return True
        if answer.status == 404 and self.context_id in self.evidence.deleting:
            self.gone = True
            self.progress.set()
        else:
            self.evidence.fault(
                "a refused read", by=self.name, status=answer.status, body=answer.body[:200]
            )
            self.gone = True
        return False

    async def take_pull(self, holding: Holding, body: dict[str, Any]) -> None:
        """An answer with a head: §3.3's whole form."""
        if set(body) != PULL_FIELDS or body["from_sequence"] != holding.sequence:
            self.evidence.fault("a pull of another form", by=self.name, fields=sorted(body))
            return
        self._append(holding, body["sequence"], body["content"])
        await self._look_at_head(
            holding, body["head_sequence"], body["status"], final=body["final"]
        )

    def _append(self, holding: Holding, sequence: int, content: str) -> None:
        self.evidence.pulled(
            self.context_id, holding.message_id, holding.sequence, sequence, content, self.name
        )
        holding.pieces.append(content)
        holding.sequence = sequence

    async def _look_at_head(self, holding: Holding, head: int, status: str, *, final: bool) -> None:
        held = holding.sequence
        if head < held:
            self.evidence.fault("a head below what was pulled", by=self.name, head=head, held=held)
        if final != (status != "streaming" and held == head):
            self.evidence.fault(
                "a wrong `final`", by=self.name, final=final, status=status, head=head, held=held
            )
        self.evidence.reached(self.context_id, holding.message_id, head, self.name)
        if status != "streaming":
            self.evidence.closed(self.context_id, holding.message_id, status, head, self.name)
            await self._compare_end(holding, status, head)
        holding.final = final

    async def _compare_end(self, holding: Holding, status: str, head: int) -> None:
        """What says that nothing will follow must be what the database says, at this moment."""
        if not self.world.truth.is_open or self.context_id in self.evidence.deleting:
            return
        stored = await self.world.truth.end(self.context_id, holding.message_id)
        self.evidence.counts["ends compared with the database"] += 1
        if stored != (status, head, head) and self.context_id not in self.evidence.deleting:
            self.evidence.fault(
                "an end that is not the database's",
                by=self.name,
                message=holding.message_id,
                told=(status, head),
                stored=stored,
            )

    async def _pull_bounded(self, holding: Holding, path: str) -> None:
        """With `to_sequence`, through a cache that keeps by URL whatever says `immutable`."""
        wanted = holding.wanted
        target = f"{path}/content?from_sequence={holding.sequence}&to_sequence={wanted}"
        answer = self.world.cache.get(target)
        if answer is None or self.random.random() < 0.05:
            fresh = await self.ask(target)
            if not self.accept(fresh):
                return
            if answer is not None and fresh.body != answer.body:
                self.evidence.fault("two answers at one immutable URL", url=target)
            answer = fresh
        else:
            self.evidence.counts["answers from the cache"] += 1
        body = answer.json()
        if "immutable" in answer.headers.get("cache-control", ""):
            self.world.cache[target] = answer
            if body["sequence"] != wanted:
                self.evidence.fault("an immutable answer that is not whole", url=target)
        if set(body) != RANGE_FIELDS or body["from_sequence"] != holding.sequence:
            self.evidence.fault("a bounded pull of another form", url=target, fields=sorted(body))
            return
        self._append(holding, body["sequence"], body["content"])

    async def _pull_plain(self, holding: Holding, path: str) -> None:
        target = f"{path}/content?from_sequence={holding.sequence}"
        answer = await self.ask(target, {"Accept": "text/plain"})
        if self.accept(answer):
            fields = answer.headers
            self._append(holding, int(fields["contextd-sequence"]), answer.body.decode())
            await self._look_at_head(
                holding,
                int(fields["contextd-head-sequence"]),
                fields["contextd-status"],
                final=fields["contextd-final"] == "true",
            )

    async def _pull_chunks(self, holding: Holding, path: str) -> None:
        limit = self.random.choice((1, 10, 100, 1000))
        answer = await self.ask(f"{path}/chunks?from_sequence={holding.sequence}&limit={limit}")
        if not self.accept(answer):
            return
        body = answer.json()
        for chunk in body["chunks"]:
            if chunk["sequence"] != holding.sequence + 1:
                self.evidence.fault("a hole among chunks", by=self.name, message=holding.message_id)
            self._append(holding, chunk["sequence"], chunk["content"])
        if body["sequence"] != holding.sequence:
            self.evidence.fault("chunks that do not end where they say", by=self.name)
        await self._look_at_head(
            holding, body["head_sequence"], body["status"], final=body["final"]
        )
