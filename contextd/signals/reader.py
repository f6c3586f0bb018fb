"""One stream, from subscription to its end (§4.1, §4.2).

A reader subscribes first. From then on live levels merge in its backlog, and nothing is sent. The
route reads the database and writes the pages of `replay` and the last one, of `snapshot`, which drops
what the snapshot already covers; then `take` gives blocks for as long as the stream lasts.

A reader has no task and no timer of its own. It sleeps on one future, and has one alarm in the
hub's wheel: for what is due next, its next heartbeat, or the end of patience with a blocked send.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from contextd.signals.backlog import NEVER, Backlog, Change, Stats
from contextd.signals.frames import (
    Completion,
    Delta,
    Head,
    Heartbeats,
    Level,
    Progress,
    Standing,
    State,
    encode,
    signal_of,
)
from contextd.signals.wheel import Wheel


@dataclass(slots=True, kw_only=True)
class Desk:
    """What all readers of one hub share."""

    clock: Callable[[], float]
    now_ms: Callable[[], int]
    wheel: Wheel
    slow_s: float
    pending_max: int
    forget: "Callable[[Reader], None]"
    ask: Callable[[str], None]  # for the missing revisions of a context
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    stats: Stats = field(default_factory=Stats)


class Reader:
    """One stream of signals. Made by `Hub.subscribe`; used by one task; `close` it whatever happens.

    `on_stuck` is called, once, when the reader is given up for being slow (§4.2): the hub has
    forgotten it by then, and the owner cancels the send that hangs.
    """

    __slots__ = (
        "_backlog", "_closed", "_desk", "_farewell", "_handed_at", "_heartbeat_s", "_live", "_named",
        "_over", "_patient", "_progress", "_sent_at", "_waiter", "alarm", "context_id", "on_stuck",
    )  # fmt: skip

    def __init__(
        self,
        desk: Desk,
        progress: Progress,
        *,
        context_id: str,
        throttle_s: float,
        heartbeat_s: float,
        named: bool,
    ) -> None:
        self.context_id = context_id
        self.on_stuck: Callable[[], None] | None = None
        self.alarm = 0
        self._desk = desk
        self._progress = progress
        self._backlog = Backlog(progress, desk.stats, throttle_s=throttle_s, named=named)
        self._heartbeat_s = heartbeat_s
        self._named = named
        self._live = False  # the snapshot was taken
        self._over = False  # nothing follows what was handed over
        self._closed = False
        self._farewell: bytes | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sent_at = desk.clock()
        self._handed_at: float | None = None  # since when a block is being written
        self._patient = (
            True  # the alarm is for a send that hangs, so it may be late for a heartbeat
        )
        self._set_alarm(self._sent_at)

    # For the route.

    @property
    def ending(self) -> bool:
        """The stream should end: leave the replay where it is; `take` gives what is still to be said."""
        return self._over or self._farewell is not None or self._backlog.last_state is not None

    def replay(self, changes: Sequence[Change], *, up_to: int | None) -> bytes:
        """One page of what changed since the cursor, by revision; its last frame carries `up_to`."""
        now = self._desk.clock()
        frames = [self._tell(change, now) for change in changes]
        if frames and up_to is not None:
            frames[-1] = self._progress.id_line(up_to) + frames[-1]
        return self._hand_over(frames, now)

    def snapshot(
        self, *, changes: Sequence[Change], open_heads: Sequence[Head], standing: Standing
    ) -> bytes:
        """The last page, which makes the reader live: changes, open messages, state, heartbeat (§4.1).

        All of it is of one snapshot of the database, read after the subscription. `changes`: what no
        earlier page told, by revision. `open_heads`: every message that is open; those named on this
        connection are not named again, but a newer position follows when the throttle allows.
        """
        now = self._desk.clock()
        frames = [self._tell(change, now) for change in changes]
        for head in open_heads:
            if self._backlog.may_name(head, now):
                frames.append(self._tell(head, now))
            else:
                self._backlog.offer_head(Delta(head, self._desk.now_ms()))
        self._backlog.cover({head.message_id for head in open_heads}, standing.revision)
        frames.append(self._progress.id_line(standing.revision) + self._encode(standing))
        frames.append(self._heartbeat())
        self._live = True
        self._progress.anchor(standing.revision)
        if self._progress.gap:
            self._desk.ask(self.context_id)
        return self._hand_over(frames, now)

    async def take(self) -> bytes | None:
        """The next block, to be written in one send, waiting until something is due; None: the end.

        Coming back for the next block says that the one before was written. Before `snapshot` it gives
        nothing but the end of the stream.
        """
        self._handed_at = None
        while not self._over:
            now = self._desk.clock()
            if frames := self._due(now):
                return self._hand_over(frames, now)
            if self._backlog.waiting or self._patient or not self.alarm:
                self._set_alarm(now)  # else it is set for a heartbeat, and not too late
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return None

    def sent(self) -> None:
        """The page that was handed over last is written (of blocks, `take` knows it by itself)."""
        self._handed_at = None

    def close(self) -> None:
        """Forget the reader; `take` gives None from now on. Repeatable."""
        if self._closed:
            return
        self._closed = self._over = True
        self._desk.wheel.disarm(self)
        self._desk.forget(self)
        self._wake()

    # For the hub.

    def offer_head(self, delta: Delta, now: float) -> None:
        """A message has a new position."""
        due = self._backlog.offer_head(delta)
        if due is not None:
            self._mark(due, now)

    def offer_completion(self, completion: Completion, now: float) -> None:
        """A message was closed."""
        due = self._backlog.offer_completion(completion)
        if due is not None:
            self._mark(due, now)

    def offer_state(self, state: State, now: float) -> None:
        """The context has a new state."""
        due = self._backlog.offer_state(state)
        if due is not None:
            self._mark(due, now)

    def end(self, farewell: bytes) -> None:
        """The stream ends after `farewell`, which goes out with what is due."""
        if self._farewell is None:
            self._farewell = farewell
            self._wake()

    def ring(self, now: float) -> None:
        """The wheel's alarm: something is due, or a send has taken too long."""
        if self._closed:
            return
        if self._handed_at is not None:
            if now - self._handed_at >= self._desk.slow_s:
                self._give_up()
                return
        elif self._waiter is not None and self._due_at() <= now:
            self._wake()
            return
        self._set_alarm(now)

    # Pages and blocks.

    def _tell(self, change: Change, now: float) -> bytes:
        self._backlog.tell(change, now)
        return self._encode(change)

    def _encode(self, level: Level) -> bytes:
        return encode(signal_of(level, self._desk.now_ms()), named=self._named)

    def _heartbeat(self) -> bytes:
        return self._desk.heartbeats.data(self._desk.now_ms(), named=self._named)

    def _due(self, now: float) -> list[bytes]:
        """The frames to send now, if there are any; `_over` is set with the last ones."""
        if not self._live:
            return self._last_words()
        frames = [] if self._backlog.idle else self._backlog.collect(now)
        if self._backlog.ended:
            self._over = True
        elif self._farewell is not None:
            frames.append(self._farewell)
            self._over = True
        elif not frames and now >= self._sent_at + self._heartbeat_s:
            frames.append(self._heartbeat())
        return frames

    def _last_words(self) -> list[bytes]:
        """The end of a stream that never became live."""
        state = self._backlog.last_state
        words = [] if state is None else [state.data(self._named)]
        if self._farewell is not None:
            words.append(self._farewell)
        self._over = bool(words)
        return words

    def _hand_over(self, frames: list[bytes], now: float) -> bytes:
        if not frames:
            return b""
        self._handed_at = self._sent_at = now
        if not self.alarm:
            self._set_alarm(now)
        stats = self._desk.stats
        stats.blocks_sent += 1
        stats.frames_sent += len(frames)
        return frames[0] if len(frames) == 1 else b"".join(frames)

    # Sleeping and waking.

    def _mark(self, due: float, now: float) -> None:
        """Something new waits, and may go at `due`."""
        backlog = self._backlog
        if len(backlog.waiting) > self._desk.pending_max:
            self._give_up()
        elif due <= now:
            self._wake()
        elif due < backlog.next_due:
            backlog.next_due = due
            self._desk.wheel.arm(self, due)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _due_at(self) -> float:
        """When a reader that waits is to be woken, if nothing comes before."""
        if not self._live:
            return NEVER
        return min(self._backlog.next_due, self._sent_at + self._heartbeat_s)

    def _set_alarm(self, now: float) -> None:
        """For what is due next, or for the look at a send that may hang."""
        self._patient = self._handed_at is not None or not self._live
        if self._handed_at is not None:
            at = self._handed_at + self._desk.slow_s
        else:
            at = min(now + self._desk.slow_s, self._due_at())
        self._desk.wheel.arm(self, at)

    def _give_up(self) -> None:
        if self._closed:
            return
        self._desk.stats.slow_disconnects += 1
        self.close()
        if self.on_stuck is not None:
            self.on_stuck()
