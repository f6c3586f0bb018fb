"""Who watches what: levels go in, in commit order, and each reader's stream comes out (§4).

The hub is told facts after their commit, and knows neither SQL nor HTTP. Nothing here waits for a
reader: publishing marks what each reader of that context still has to be told, and wakes those for
which something is due. A context that nobody watches costs one look-up.

A context's revisions are published one by one. When one is missing, `on_gap` asks for it; until it
has been filled, signals go on, and no reader gets an `id:` at or beyond the hole (§4.2).

All of it lives on one event loop's thread.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from contextd.core.signal import DELETED_STATE
from contextd.signals.backlog import Stats
from contextd.signals.frames import Closing, Completion, Delta, Head, Progress, Standing, State
from contextd.signals.reader import Desk, Reader
from contextd.signals.wheel import Wheel

# How many closed messages a watched context remembers, so that what another process said before the
# end, and arrives after it, is not taken for news. Beyond it a late signal is repeated, not wrong.
CLOSED_MAX: Final = 1024
RETRY_MIN_MS: Final = 1_000
RETRY_MAX_MS: Final = 5_000


class _Topic:
    """One watched context."""

    __slots__ = ("asked", "closed", "progress", "readers", "watches")

    def __init__(self, database_id: str) -> None:
        self.progress = Progress(database_id)
        self.readers: set[Reader] = set()
        self.watches: dict[str, set[Watch]] = {}
        self.closed: dict[str, None] = {}
        self.asked = False  # on_gap was called, and no fill has come since


class Hub:
    """The readers and long polls of one process.

    `clock` gives seconds that never go back, `now_ms` the wall clock for timestamps, `jitter(a, b)` a
    number from a to b. `on_gap(context_id)` is called when a context's revisions have a hole, once
    until the next `fill`; it must not raise.
    """

    def __init__(
        self,
        *,
        database_id: str,
        clock: Callable[[], float],
        now_ms: Callable[[], int],
        tick_s: float = 0.01,
        slow_reader_s: float = 30.0,
        reader_pending_max: int = 10_000,
        jitter: Callable[[int, int], int] = random.randint,
    ) -> None:
        self.on_gap: Callable[[str], None] | None = None
        self.database_id = database_id  # of the database whose revisions are told from now on
        self._jitter = jitter
        self._topics: dict[str, _Topic] = {}
        self._readers: set[Reader] = set()
        self._wheel = Wheel(clock, tick_s)
        self._closed = False
        self._desk = Desk(
            clock=clock,
            now_ms=now_ms,
            wheel=self._wheel,
            slow_s=slow_reader_s,
            pending_max=reader_pending_max,
            forget=self._forget,
            ask=self._ask,
        )

    def start(self) -> None:
        """Keep time by the running loop: throttles, heartbeats and time limits work from now on."""
        self._wheel.start()

    def stop(self) -> None:
        """Keep time no more."""
        self._wheel.stop()

    def advance(self) -> None:
        """Do what is due by the clock; after `start` the loop does it by itself."""
        self._wheel.advance()

    @property
    def reader_count(self) -> int:
        """Streams that are open."""
        return len(self._readers)

    @property
    def stats(self) -> Stats:
        """Counters for metrics."""
        return self._desk.stats

    def watched(self) -> Sequence[str]:
        """The contexts that have a reader or a watch, as of now."""
        return tuple(self._topics)

    def contiguous(self, context_id: str) -> int | None:
        """The revision up to which every change was published; None before the first reader's snapshot.

        Meant for the one who fills: read the changes after it, then `fill` with it as `after`.
        """
        topic = self._topics.get(context_id)
        return None if topic is None else topic.progress.through

    # Publishing: synchronous, in commit order, after the commit.

    def publish_head(self, head: Head) -> None:
        """A message has chunks up to `head.position`."""
        topic = self._topics.get(head.context_id)
        if topic is not None:
            self._offer_head(topic, head)

    def publish(
        self, *, revision: int, closings: Sequence[Closing] = (), standing: Standing
    ) -> None:
        """One committed change: the messages that it closed, and the state that it led to."""
        topic = self._topics.get(standing.context_id)
        if topic is not None:
            topic.progress.note(revision)
            self._offer_change(topic, closings, standing)
            self._ask_if_gap(standing.context_id, topic)

    def publish_deleted(self, context_id: str, revision: int) -> None:
        """The context is gone: its readers are told, then their streams end."""
        topic = self._topics.pop(context_id, None)
        if topic is None:
            return
        # Whoever deleted it elsewhere may know less of it than was told here: this is the last word.
        revision = max(revision, topic.progress.newest + 1)
        topic.progress.note(revision)
        gone = Standing(
            context_id=context_id, state=DELETED_STATE, revision=revision, record_revision=revision
        )
        self._offer_change(topic, (), gone)
        _finish_watches(topic)

    def fill(
        self,
        context_id: str,
        *,
        after: int,
        heads: Sequence[Head] = (),
        closings: Sequence[Closing] = (),
        standing: Standing,
    ) -> None:
        """All changes after revision `after`, up to that of `standing`, as one snapshot has them.

        Closes a hole in what was published if `after` is not above `contiguous`; else it is asked for
        again. Also for what was read anew without a hole being known: what is no news is dropped.
        """
        topic = self._topics.get(context_id)
        if topic is None:
            return
        for head in heads:
            self._offer_head(topic, head)
        topic.progress.fill(after, standing.revision)
        self._offer_change(topic, closings, standing)
        topic.asked = False
        self._ask_if_gap(context_id, topic)

    # Watching.

    def subscribe(
        self, context_id: str, *, throttle_s: float, heartbeat_s: float, named: bool = False
    ) -> Reader:
        """A stream's reader; from now on signals merge in it. Close it whatever happens."""
        topic = self._topic(context_id)
        reader = Reader(
            self._desk,
            topic.progress,
            context_id=context_id,
            throttle_s=throttle_s,
            heartbeat_s=heartbeat_s,
            named=named,
        )
        topic.readers.add(reader)
        self._readers.add(reader)
        if self._closed:
            reader.end(self._farewell())
        return reader

    def watch(self, context_id: str, message_id: str) -> "Watch":
        """A look-out for news of one message: `with hub.watch(…) as watch`, read, then wait (§3.3)."""
        return Watch(self, context_id, message_id)

    def close_all(self) -> None:
        """Shutdown: every stream ends after a `retry:`, every watch is over, also later ones."""
        if self._closed:
            return
        self._closed = True
        for reader in tuple(self._readers):
            reader.end(self._farewell())
        for topic in self._topics.values():
            _finish_watches(topic)

    def end_all(self) -> None:
        """Another database: every stream ends after a `retry:`, every watch is over; new ones may come."""
        topics, self._topics = self._topics, {}
        for reader in tuple(self._readers):
            reader.end(self._farewell())
        for topic in topics.values():
            _finish_watches(topic)

    def awaited(self) -> dict[int, list["Watch"]]:
        """Who waits for which message, by the key that a waiting pull has found for it."""
        found: dict[int, list[Watch]] = {}
        for topic in self._topics.values():
            for watches in topic.watches.values():
                for watch in watches:
                    if watch.message_key is not None:
                        found.setdefault(watch.message_key, []).append(watch)
        return found

    # For readers and watches.

    def _forget(self, reader: Reader) -> None:
        self._readers.discard(reader)
        topic = self._topics.get(reader.context_id)
        if topic is not None:
            topic.readers.discard(reader)
            self._drop_if_unwatched(reader.context_id, topic)

    def _enter(self, watch: "Watch") -> None:
        topic = self._topic(watch.context_id)
        topic.watches.setdefault(watch.message_id, set()).add(watch)
        if self._closed:
            watch.finish()

    def _leave(self, watch: "Watch") -> None:
        topic = self._topics.get(watch.context_id)
        if topic is None:
            return
        watches = topic.watches.get(watch.message_id)
        if watches is not None:
            watches.discard(watch)
            if not watches:
                del topic.watches[watch.message_id]
        self._drop_if_unwatched(watch.context_id, topic)

    def _topic(self, context_id: str) -> _Topic:
        topic = self._topics.get(context_id)
        if topic is None:
            topic = self._topics[context_id] = _Topic(self.database_id)
        return topic

    def _drop_if_unwatched(self, context_id: str, topic: _Topic) -> None:
        if not topic.readers and not topic.watches:
            del self._topics[context_id]

    def _offer_head(self, topic: _Topic, head: Head) -> None:
        if head.message_id in topic.closed:
            return
        for watch in topic.watches.get(head.message_id, ()):
            watch.reach(head.position)
        if topic.readers:
            delta = Delta(head, self._desk.now_ms())
            now = self._desk.clock()
            for reader in tuple(topic.readers):  # one that is given up leaves the set
                reader.offer_head(delta, now)

    def _offer_change(self, topic: _Topic, closings: Sequence[Closing], standing: Standing) -> None:
        at_ms, now = self._desk.now_ms(), self._desk.clock()
        completions = [
            Completion(closing, at_ms) for closing in closings if _close_once(topic, closing)
        ]
        state = State(standing, at_ms)
        for reader in tuple(topic.readers):
            for completion in completions:
                reader.offer_completion(completion, now)
            reader.offer_state(state, now)

    def _ask_if_gap(self, context_id: str, topic: _Topic) -> None:
        if topic.progress.gap and not topic.asked:
            topic.asked = True
            self._desk.stats.gaps += 1
            if self.on_gap is not None:
                self.on_gap(context_id)

    def _ask(self, context_id: str) -> None:
        topic = self._topics.get(context_id)
        if topic is not None:
            self._ask_if_gap(context_id, topic)

    def _farewell(self) -> bytes:
        return b"retry: %d\n\n" % self._jitter(RETRY_MIN_MS, RETRY_MAX_MS)


class Watch:
    """A look-out for news of one message, from `with` on, whether or not anyone waits yet.

    Enter, read the message, then wait with what was read: news in between is not missed.
    """

    __slots__ = (
        "_after", "_deadline", "_hub", "_over", "_position", "_waiter", "alarm", "context_id",
        "message_id", "message_key",
    )  # fmt: skip

    def __init__(self, hub: Hub, context_id: str, message_id: str) -> None:
        self.context_id = context_id
        self.message_id = message_id
        self.message_key: int | None = None
        self.alarm = 0
        self._hub = hub
        self._position = -1
        self._over = False
        self._after = 0
        self._deadline = 0.0
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        self._hub._enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hub._leave(self)

    async def reached(self, after: int, timeout_s: float) -> bool:
        """Wait for a position above `after`, the message's or the context's end, shutdown, or the time.

        False when only the time was up; else there is something to read, or nothing ever will be.
        """
        if self._over or self._position > after or timeout_s <= 0:
            return self._over or self._position > after
        desk = self._hub._desk
        self._after = after
        self._deadline = desk.clock() + timeout_s
        desk.wheel.arm(self, self._deadline)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            desk.wheel.disarm(self)
        return self._over or self._position > after

    def reach(self, position: int) -> None:
        """The message has chunks up to `position`."""
        self._position = max(self._position, position)
        if self._position > self._after:
            self._wake()

    def finish(self) -> None:
        """Nothing more will come."""
        self._over = True
        self._wake()

    def ring(self, now: float) -> None:
        """The time is up, but for what rounding left of it."""
        if now >= self._deadline:
            self._wake()
        else:
            self._hub._desk.wheel.arm(self, self._deadline)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _close_once(topic: _Topic, closing: Closing) -> bool:
    """Whether the end of this message is news; wakes who watches it."""
    if closing.message_id in topic.closed:
        return False
    topic.closed[closing.message_id] = None
    if len(topic.closed) > CLOSED_MAX:
        del topic.closed[next(iter(topic.closed))]
    for watch in topic.watches.get(closing.message_id, ()):
        watch.finish()
    return True


def _finish_watches(topic: _Topic) -> None:
    for watches in topic.watches.values():
        for watch in watches:
            watch.finish()
