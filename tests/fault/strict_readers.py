"""A reader that follows §4.4 to the letter, and accuses the server of everything that §4 forbids.

It holds a stream open, comes back with its cursor after each cut (or with one that means nothing) and
pulls what it is told of. It is built on bare sockets and shares no code with contextd or its client.
"""

import asyncio
import json
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import quote

from holdings import RETRY_S_MAX, Holder, World
from raw_http import (
    BrokenError,
    Connection,
    Event,
    EventStream,
    GarbledError,
    HungError,
)

SIGNAL_BYTES_MAX = 1024
HEARTBEAT_S = 5
SILENCE_S_MAX = 25.0

FIELDS = {
    "state_changed": "type context_id new_state revision record_revision timestamp",
    "content_delta": "type context_id message_id current_sequence role kind timestamp",
    "message_completed": (
        "type context_id message_id final_sequence role kind status revision timestamp"
    ),
    "heartbeat": "type timestamp",
}
REST_STATES = frozenset({"idle", "failed"})
GARBAGE = ("garbage", "0", "-1", "\u00ff", "zzzzzzzz-3", "a" * 64, "-", "{}", "k3f9-118")


@dataclass(frozen=True)
class Habits:
    """How one reader reads."""

    way: str = "json"
    throttle_ms: int | None = None
    named: bool = False
    start: str = "created"  # created | garbage | listed
    garbage_share: float = 0.0
    pause_s_max: float = 0.0  # between two events: a reader that is slow to take


@dataclass
class _Attached:
    """What one connection was told, for the rules that hold within one."""

    anchored: bool
    live: bool = False
    revision: int = -1
    record_revision: int = -1
    id_revision: int = -1
    positions: dict[str, int] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)


class SignalReader(Holder):
    """Follows one context. `cursor` is that of the context when it was made."""

    def __init__(
        self, world: World, context_id: str, name: str, habits: Habits, cursor: str, seed: str
    ) -> None:
        super().__init__(world, context_id, name, habits.way, Random(seed))
        self._habits = habits
        self._cursor = cursor if habits.start == "created" else None
        self._stopping = False
        self._stream: EventStream | None = None
        self._direct: Connection | None = None
        self._revision = -1
        self.attached = 0

    async def run(self) -> None:
        """Until `stop`, or until the context is deleted."""
        try:
            if self._habits.start == "listed":
                await self._list()
            while not self._stopping and not self.gone:
                await self._follow()
                await self.world.up.wait()
                await asyncio.sleep(self.random.uniform(0, RETRY_S_MAX))
        except Exception as error:
            self.evidence.fault("a reader that broke", by=self.name, error=repr(error))
        finally:
            if self._stream is not None:
                self._stream.close()
            if self._direct is not None:
                self._direct.close()

    @property
    def began_with_list(self) -> bool:
        """Whether it listed first, and attached with the list's cursor."""
        return self._habits.start == "listed"

    def stop(self) -> None:
        """Ends `run` soon."""
        self._stopping = True
        if self._stream is not None:
            self._stream.close()

    async def _list(self) -> None:
        """§3.2: list, then attach with the first page's cursor, and nothing is missed."""
        target = f"/contexts/{self.context_id}/messages?limit=7"
        answer = await self.ask(target)
        if not self.accept(answer):
            return
        page = answer.json()
        self._cursor = page["stream_cursor"]
        while True:
            for item in page["items"]:
                self._note_listed(item)
            if page["next_cursor"] is None:
                return
            answer = await self.ask(f"{target}&cursor={page['next_cursor']}")
            if not self.accept(answer):
                return
            page = answer.json()

    def _note_listed(self, item: dict[str, Any]) -> None:
        closed = None
        if item["status"] != "streaming":
            closed = item["status"], item["final_sequence"]
            self.evidence.closed(self.context_id, item["id"], *closed, self.name)
        self.evidence.reached(self.context_id, item["id"], item["current_sequence"], self.name)
        self.want(item["id"], item["current_sequence"], closed)

    async def _follow(self) -> None:
        """One connection, to its end."""
        target, headers, anchored = self._attach()
        try:
            self._stream = await EventStream.open(self.world.stream_port, target, headers)
            if self._stream.status == 200:
                self.attached += 1
                self.evidence.counts["streams opened"] += 1
                await self._listen(self._stream, _Attached(anchored))
            elif self._stream.status == 404 and self.context_id in self.evidence.deleting:
                self.gone = True
                self.progress.set()
            elif self._stream.status != 503:
                self.evidence.fault("a refused stream", by=self.name, status=self._stream.status)
                self._stopping = True
        except BrokenError:
            self.evidence.counts["broken streams"] += 1
        except HungError as error:
            self.evidence.fault("a stream that hangs", by=self.name, error=str(error))
        except GarbledError as error:
            self.evidence.fault("a garbled stream", by=self.name, error=str(error))
            self._stopping = True
        finally:
            if self._stream is not None:
                self._stream.close()

    def _attach(self) -> tuple[str, dict[str, str], bool]:
        """Target and headers of an attach, and whether the cursor is one that was given."""
        habits = self._habits
        cursor, anchored = self._cursor, self._cursor is not None
        if cursor is None or self.random.random() < habits.garbage_share:
            cursor, anchored = self.random.choice(GARBAGE), False
        query = [f"heartbeat={HEARTBEAT_S}"]
        if habits.throttle_ms is not None:
            query.append(f"throttle_ms={habits.throttle_ms}")
        if habits.named:
            query.append("framing=named")
        headers = {}
        if self.random.random() < 0.5 and cursor.isascii():
            headers["Last-Event-ID"] = cursor
        else:
            query.append(f"last_event_id={quote(cursor)}")
        return f"/contexts/{self.context_id}/stream?{'&'.join(query)}", headers, anchored

    async def _listen(self, stream: EventStream, link: _Attached) -> None:
        async for event in stream.events(SILENCE_S_MAX):
            await self._hear(link, event)
            if self._habits.pause_s_max:
                await asyncio.sleep(self.random.uniform(0, self._habits.pause_s_max))
            if self._stopping:
                return
        self.evidence.counts["streams that ended cleanly"] += 1

    async def _hear(self, link: _Attached, event: Event) -> None:
        signal = json.loads(event.data)
        kind = signal["type"]
        self.evidence.counts[f"signals, {kind}"] += 1
        well_formed = (
            len(event.data.encode()) < SIGNAL_BYTES_MAX
            and set(signal) == set(FIELDS.get(kind, "").split())
            and event.event == (kind if self._habits.named else None)
        )
        if not well_formed:
            self.evidence.fault("a signal of another form", by=self.name, fields=sorted(signal))
            return
        match kind:
            case "heartbeat":
                link.live = True
            case "state_changed":
                self._hear_state(link, signal)
            case "content_delta":
                await self._hear_delta(link, signal)
            case "message_completed":
                await self._hear_completion(link, signal)
        if event.id is not None:
            self._hear_id(link, event.id)
        self.progress.set()

    def _hear_state(self, link: _Attached, signal: dict[str, Any]) -> None:
        revision, record_revision = signal["revision"], signal["record_revision"]
        if signal["new_state"] == "deleted":
            if self.context_id not in self.evidence.deleting:
                self.evidence.fault("a context that nobody deleted is gone", by=self.name)
            self.gone = True
            return
        if revision < self._revision or revision <= link.revision or record_revision > revision:
            self.evidence.fault(
                "a state that goes back",
                by=self.name,
                revision=revision,
                before=(self._revision, link.revision),
            )
        if record_revision < link.record_revision:
            self.evidence.fault("a record revision that goes back", by=self.name)
        self._revision = link.revision = revision
        link.record_revision = record_revision
        self.evidence.standing(self.context_id, revision, signal["new_state"], self.name)

    async def _hear_delta(self, link: _Attached, signal: dict[str, Any]) -> None:
        message_id, position = signal["message_id"], signal["current_sequence"]
        before = link.positions.get(message_id, -1)
        if message_id in link.completed and position == before:
            self._hear_again(signal)
        elif position < before or (link.live and position == before):
            self.evidence.fault(
                "a position that does not rise",
                by=self.name,
                message=message_id,
                position=position,
                before=before,
            )
        link.positions[message_id] = position
        await self._check(signal, position)
        self.want(message_id, position)

    async def _hear_completion(self, link: _Attached, signal: dict[str, Any]) -> None:
        message_id, final = signal["message_id"], signal["final_sequence"]
        if link.live and final and link.positions.get(message_id) != final:
            self.evidence.fault(
                "an end without the delta before it",
                by=self.name,
                message=message_id,
                final=final,
                before=link.positions.get(message_id),
            )
        if link.live and message_id in link.completed:
            self._hear_again(signal)
        if signal["role"] != "user" and signal["revision"] <= link.revision:
            self._hear_late_completion(link, signal)
        link.positions[message_id] = final
        link.completed.add(message_id)
        self.evidence.closed(self.context_id, message_id, signal["status"], final, self.name)
        await self._check(signal, final)
        self.want(message_id, final, (signal["status"], final))

    def _hear_again(self, signal: dict[str, Any]) -> None:
        """The end of a message was told before on this connection: with one server never.

        A queued message gets its place later, in a revision that another server may read anew.
        """
        if self.world.several and signal["role"] == "user":
            self.evidence.counts["signals of a queued message that came again"] += 1
            return
        self.evidence.fault("an end that came again", by=self.name, signal=signal)

    def _hear_late_completion(self, link: _Attached, signal: dict[str, Any]) -> None:
        """With one server never. A server that changes what another has changed just before tells of
        its own change first, and of the other's when it has read it."""
        state = self.evidence.states[self.context_id][link.revision]
        if self.world.several:
            rests = "at rest" if state in REST_STATES else "at work"
            self.evidence.counts[f"ends after a later state of another server, {rests}"] += 1
            return
        self.evidence.fault(
            "an end after the state that follows it",
            by=self.name,
            message=signal["message_id"],
            revision=signal["revision"],
            state=(state, link.revision),
        )

    def _hear_id(self, link: _Attached, cursor: str) -> None:
        """The cursor is opaque to clients; a test may know that it ends with the revision."""
        revision = int(cursor.rpartition("-")[2])
        held = int(self._cursor.rpartition("-")[2]) if self._cursor and link.anchored else -1
        if revision < link.id_revision or revision < held:
            self.evidence.fault(
                "an id that goes back", by=self.name, id=cursor, before=(link.id_revision, held)
            )
        link.id_revision = revision
        self._cursor = cursor

    async def _check(self, signal: dict[str, Any], position: int) -> None:
        """Commit before visible: what is signalled is in the database, and can be pulled at once."""
        message_id = signal["message_id"]
        self.evidence.described(
            self.context_id, message_id, signal["role"], signal["kind"], self.name
        )
        self.evidence.reached(self.context_id, message_id, position, self.name)
        if self.world.truth.is_open:
            head = await self.world.truth.head(self.context_id, message_id)
            self.evidence.counts["signals compared with the database"] += 1
            if (head is None or head < position) and self.context_id not in self.evidence.deleting:
                self.evidence.fault(
                    "a signal ahead of its commit",
                    by=self.name,
                    message=message_id,
                    position=position,
                    head=head,
                )
        if position and self.random.random() < 0.1:
            await self._probe(message_id, position)

    async def _probe(self, message_id: str, position: int) -> None:
        """A pull past the proxy, right after the signal."""
        port = self.world.direct_port()
        if port is None:
            return
        if self._direct is None or self._direct.port != port:
            self._direct = Connection(port)
        path = f"/contexts/{self.context_id}/messages/{message_id}/content"
        target = f"{path}?from_sequence={position - 1}&to_sequence={position}"
        try:
            answer = await self._direct.request("GET", target)
        except BrokenError:
            return  # the server was killed meanwhile
        if answer.status == 503 or not self.accept(answer):
            return
        self.evidence.counts["direct pulls after a signal"] += 1
        body = answer.json()
        if body["sequence"] != position and not self.world.several:
            self.evidence.fault(
                "a signal that a pull right after it could not serve",
                by=self.name,
                message=message_id,
                position=position,
                served=body["sequence"],
            )
        self.evidence.pulled(
            self.context_id,
            message_id,
            position - 1,
            body["sequence"],
            body["content"],
            f"{self.name} directly",
        )
