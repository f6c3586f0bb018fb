"""Any order of commits, publications, takes, reconnects and time keeps every rule of §4.1 and §4.2.

A model stands in for the database. Its commits are published late, in order, or lost; clients attach
in steps, take when they like, break off and come back with the last id they saw. `_Client` checks
each event as it comes; at the end everyone must hold exactly what the database holds.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st
from signals_rig import CONTEXT, TICK, Event, Rig, Tap, closing, head, parse, standing

from contextd.core.signal import ContentDelta, Heartbeat, MessageCompleted, StateChanged
from contextd.signals import Change, Closing, Head, Standing
from contextd.signals.backlog import BLOCK_FRAMES_MAX

SLOTS = 3
THROTTLES = (0, 3, 16)  # ticks
PAGE = 2

Op: TypeAlias = tuple[Any, ...]


@dataclass
class _Message:
    role: str
    opened: int
    position: int = 0
    revision: int = 0
    closed: bool = False


@dataclass
class _Database:
    """What is committed."""

    revision: int = 1
    messages: dict[str, _Message] = field(default_factory=dict)

    def standing(self) -> Standing:
        return standing(self.revision, f"s{self.revision}")

    def open_heads(self) -> list[Head]:
        return [
            head(name, m.position, m.opened) for name, m in self.messages.items() if not m.closed
        ]

    def changes(self, after: int) -> list[tuple[int, Change]]:
        """By revision, the messages that changed after it."""
        changed = sorted(
            (m.revision, name) for name, m in self.messages.items() if m.revision > after
        )
        return [(revision, self._change(name)) for revision, name in changed]

    def _change(self, name: str) -> Change:
        m = self.messages[name]
        if m.closed:
            return closing(name, m.position, m.revision, m.role)
        return head(name, m.position, m.opened)


class _World:
    """The model database, and the hub that is told of it."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.database = _Database()
        self.outbox: list[Callable[[], None]] = []
        self.published: dict[str, Closing] = {}
        self.lossy = False
        self.clients = [_Client(self) for _ in range(SLOTS)]

    def open(self, role: str, position: int) -> None:
        database = self.database
        database.revision += 1
        name = f"m{len(database.messages)}"
        database.messages[name] = _Message(role, database.revision, position, database.revision)
        self._tell_head(name)
        self._tell_change([])

    def append(self, pick: int, count: int) -> None:
        opened = self.database.open_heads()
        if opened:
            name = opened[pick % len(opened)].message_id
            self.database.messages[name].position += count
            self._tell_head(name)

    def close(self, pick: int, count: int) -> None:
        """Close up to `count` open messages in one change."""
        names = [h.message_id for h in self.database.open_heads()]
        start = pick % len(names) if names else 0
        self._close(names[start : start + count])

    def send(self) -> None:
        """A user's message: opened and closed by the same change."""
        name = f"m{len(self.database.messages)}"
        self.database.messages[name] = _Message("user", self.database.revision + 1, 1)
        self._close([name])

    def deliver(self, count: int) -> None:
        for publish in self.outbox[:count]:
            publish()
        del self.outbox[:count]

    def lose(self) -> None:
        if self.outbox:
            self.lossy = True
            self.outbox.pop(0)

    def fill(self) -> None:
        """What the service does when it is asked, or reads again by itself."""
        after = self.rig.hub.contiguous(CONTEXT)
        if after is None:
            return
        closings = [c for _, c in self.database.changes(after) if isinstance(c, Closing)]
        self.published |= {c.message_id: c for c in closings}
        self.rig.hub.fill(
            CONTEXT,
            after=after,
            heads=self.database.open_heads(),
            closings=closings,
            standing=self.database.standing(),
        )

    def settle(self) -> None:
        """Everything is delivered and read again; every client is attached and takes all there is."""
        self.deliver(len(self.outbox))
        for client in self.clients:
            client.attach(0)
            client.read()
            client.go()
        self.fill()
        for _ in range(200):
            for client in self.clients:
                client.take(1000)
            self.rig.pass_ticks(4)

    def _close(self, names: list[str]) -> None:
        self.database.revision += 1
        closings = []
        for name in names:
            message = self.database.messages[name]
            message.closed, message.revision = True, self.database.revision
            closings.append(closing(name, message.position, message.revision, message.role))
        self._tell_change(closings)

    def _tell_head(self, name: str) -> None:
        message = self.database.messages[name]
        told = head(name, message.position, message.opened)
        self.outbox.append(lambda: self.rig.hub.publish_head(told))

    def _tell_change(self, closings: list[Closing]) -> None:
        told = self.database.standing()

        def publish() -> None:
            self.published.update({c.message_id: c for c in closings})
            self.rig.hub.publish(revision=told.revision, closings=closings, standing=told)

        self.outbox.append(publish)


class _Connection:
    """What one connection was sent, checked as it comes."""

    def __init__(self, world: _World, throttle: int, cursor: int) -> None:
        self.world = world
        self.throttle_s = throttle * TICK
        self.start = cursor
        self.base: int | None = None
        self.positions: dict[str, int] = {}
        self.told_at: dict[str, float] = {}
        self.completed: set[str] = set()
        self.state = -1
        self.last_id = -1

    def check_page(self, events: list[Event]) -> None:
        """Pages may tell an end without a delta before it; the rest holds for them too."""
        for event in events:
            match event.signal:
                case ContentDelta():
                    self._check_delta(event.signal)
                case MessageCompleted():
                    self._check_completed(event.signal)
                case StateChanged():
                    self.state = event.signal.revision
        assert all(event.id is None for event in events[:-2])
        self.last_id = max([self.last_id, *(e.id for e in events if e.id is not None)])

    def check_block(self, events: list[Event]) -> None:
        """One write of the live stream."""
        ranks = [_rank(event) for event in events]
        assert ranks == sorted(ranks)
        assert ranks.count(2) <= 1
        assert len(events) == 1 or 3 not in ranks
        assert len(events) <= BLOCK_FRAMES_MAX + 1
        for event in events:
            match event.signal:
                case ContentDelta():
                    self._check_delta(event.signal)
                case MessageCompleted():
                    self._check_spacing(event.signal)
                    self._check_completed(event.signal)
                case StateChanged():
                    self._check_state(event.signal)
        self._check_ids(events)

    def _check_delta(self, signal: ContentDelta) -> None:
        name = signal.message_id
        assert name not in self.completed
        assert signal.current_sequence > self.positions.get(name, -1)
        now = self.world.rig.now
        assert now - self.told_at.get(name, float("-inf")) >= self.throttle_s
        self.positions[name] = signal.current_sequence
        self.told_at[name] = now

    def _check_spacing(self, signal: MessageCompleted) -> None:
        if signal.final_sequence:
            assert self.positions[signal.message_id] == signal.final_sequence
            assert self.world.rig.now - self.told_at[signal.message_id] >= self.throttle_s

    def _check_completed(self, signal: MessageCompleted) -> None:
        assert signal.message_id not in self.completed
        assert signal.final_sequence >= self.positions.get(signal.message_id, 0)
        self.completed.add(signal.message_id)

    def _check_state(self, signal: StateChanged) -> None:
        assert signal.revision > self.state
        self.state = signal.revision
        assert self.base is not None
        for told in self.world.published.values():
            if told.role != "user" and self.base < told.revision <= signal.revision:
                assert told.message_id in self.completed

    def _check_ids(self, events: list[Event]) -> None:
        bearing = [event for event in events if _rank(event) in (1, 2)]
        for event in events:
            if event.id is None:
                continue
            assert event is bearing[-1]
            assert event.id > self.last_id
            assert self.state >= event.id
            self.last_id = event.id
            for name, message in self.world.database.messages.items():
                if message.closed and self.start < message.revision <= event.id:
                    assert name in self.completed


class _Client:
    """Reads one stream at a time, and remembers what it was told and the last id."""

    def __init__(self, world: _World) -> None:
        self.world = world
        self.cursor = 0
        self.positions: dict[str, int] = {}
        self.completed: dict[str, int] = {}
        self.state = ""
        self.tap: Tap | None = None
        self.connection: _Connection | None = None
        self.read_so_far: tuple[list[Change], list[Head], Standing] | None = None

    def attach(self, throttle: int) -> None:
        if self.tap is None:
            reader = self.world.rig.hub.subscribe(
                CONTEXT, throttle_s=throttle * TICK, heartbeat_s=1000 * TICK
            )
            self.tap = Tap(reader)
            self.connection = _Connection(self.world, throttle, self.cursor)
            self.read_so_far = None

    def page(self) -> None:
        """Read and get one page of the replay."""
        if self.tap and self.connection and self.connection.base is None:
            self.read_so_far = None
            changes = self.world.database.changes(self.cursor)[:PAGE]
            if changes:
                block = self.tap.reader.replay([c for _, c in changes], up_to=changes[-1][0])
                events = parse(block)
                self.connection.check_page(events)
                self._learn(events)

    def read(self) -> None:
        """Read the last page's snapshot, without sending it yet."""
        if self.tap and self.connection and self.connection.base is None:
            database = self.world.database
            changes = [change for _, change in database.changes(self.cursor)]
            self.read_so_far = (changes, database.open_heads(), database.standing())

    def go(self) -> None:
        """Get the snapshot that was read, and be live."""
        if self.tap and self.connection and self.read_so_far:
            changes, heads, state = self.read_so_far
            block = self.tap.reader.snapshot(changes=changes, open_heads=heads, standing=state)
            self.read_so_far = None
            events = parse(block)
            assert [_rank(event) for event in events[-2:]] == [2, 3]
            assert [event.id for event in events[-2:]] == [state.revision, None]
            self.connection.base = state.revision
            self.connection.check_page(events)
            self._learn(events)

    def take(self, blocks: int) -> None:
        """Get up to so many blocks, if they are due."""
        if self.tap and self.connection and self.connection.base is not None:
            for _ in range(blocks):
                block = self.tap.take()
                if block is None:
                    return
                events = parse(block)
                self.connection.check_block(events)
                self._learn(events)

    def drop(self) -> None:
        if self.tap:
            self.tap.reader.close()
            self.tap = self.connection = None

    def notice(self) -> None:
        """What waits is bounded by the messages; who took nothing for too long was given up."""
        if self.tap:
            assert len(self.tap.reader._backlog.waiting) <= len(self.world.database.messages)
            if self.tap.stuck:
                self.drop()

    def _learn(self, events: list[Event]) -> None:
        for event in events:
            match event.signal:
                case ContentDelta(message_id=name, current_sequence=position):
                    self.positions[name] = max(position, self.positions.get(name, 0))
                case MessageCompleted(message_id=name, final_sequence=final):
                    self.completed[name] = self.positions[name] = final
                case StateChanged(new_state=state):
                    self.state = state
            if event.id is not None:
                self.cursor = event.id


def _rank(event: Event) -> int:
    order = (ContentDelta, MessageCompleted, StateChanged, Heartbeat)
    return next(rank for rank, kind in enumerate(order) if isinstance(event.signal, kind))


_slot = st.integers(0, SLOTS - 1)
_small = st.integers(0, 3)
_ops = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(["assistant", "tool"]), st.integers(0, 1)),
    st.tuples(st.just("append"), _small, st.integers(1, 3)),
    st.tuples(st.just("close"), _small, st.integers(0, 3)),
    st.tuples(st.just("send")),
    st.tuples(st.just("deliver"), st.integers(1, 6)),
    st.tuples(st.just("time"), st.sampled_from([1, 2, 3, 8, 16, 1000])),
    st.tuples(st.just("take"), _slot, st.integers(1, 3)),
    st.tuples(st.just("attach"), _slot, st.sampled_from(THROTTLES)),
    st.tuples(st.sampled_from(["page", "read", "go", "go", "drop"]), _slot),
)
_losses = st.one_of(_ops, st.tuples(st.sampled_from(["lose", "fill"])))


def _apply(world: _World, op: Op) -> None:
    match op:
        case ("time", ticks):
            world.rig.pass_ticks(ticks)
        case (("open" | "append" | "close" | "send" | "deliver" | "lose" | "fill") as name, *rest):
            getattr(world, name)(*rest)
        case (name, slot, *rest):
            getattr(world.clients[slot], name)(*rest)


def _run(ops: list[Op]) -> _World:
    async def play() -> _World:
        world = _World()
        for client in world.clients:
            client.attach(THROTTLES[world.clients.index(client)])
            client.read()
            client.go()
        for op in ops:
            _apply(world, op)
            for client in world.clients:
                client.notice()
        world.settle()
        return world

    return asyncio.run(play())


def _check_exact(world: _World) -> None:
    """Every client knows of each message how far it goes and whether it ended, and the state."""
    messages = world.database.messages
    for client in world.clients:
        assert client.positions == {name: m.position for name, m in messages.items()}
        closed = {name: m.position for name, m in messages.items() if m.closed}
        assert client.completed == closed
        assert client.state == f"s{world.database.revision}"
        assert client.tap
        assert not client.tap.reader._backlog.waiting
        assert len(client.tap.reader._backlog._tracks) <= len(messages) - len(closed)


@settings(max_examples=250, deadline=None)
@given(st.lists(_ops, max_size=60))
def test_published_in_order(ops: list[Op]) -> None:
    """Late but complete publications: all rules hold, no gap is seen, and the last id is the newest."""
    world = _run(ops)
    _check_exact(world)
    assert world.rig.gaps == []
    assert [client.cursor for client in world.clients] == [world.database.revision] * SLOTS


@settings(max_examples=250, deadline=None)
@given(st.lists(_losses, max_size=60))
def test_published_with_losses(ops: list[Op]) -> None:
    """Lost publications cost latency only: after the next read of the database all is exact."""
    _check_exact(_run(ops))
