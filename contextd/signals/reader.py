"""One stream: what its reader has been sent, what waits for it, and when that is due (§4.1, §4.2).

A reader subscribes first. From then on live levels merge in it, and nothing is sent. The route reads
the database, takes the pages from `replay` and the last one from `snapshot`, which drops what the
snapshot already covers; then `take` gives blocks for as long as the stream lasts.

A `_Track` is kept for each message that is open or has something waiting. Its `due` is when the next
delta, or the completion after it, may go. Nothing waits in a queue: a newer position replaces an
older one, and what is due is put together only when the reader comes to take it. So a reader that
takes slowly costs one track a message, and a fast one gets a write for each change.

A reader has no task and no timer of its own. It sleeps on one future, and has one alarm in the
hub's wheel: for its next track, its next heartbeat, or the end of patience with a blocked send.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, TypeAlias

from contextd.signals.frames import (
    Closing,
    Completion,
    Delta,
    Head,
    Heartbeats,
    Progress,
    Standing,
    State,
    encode,
    signal_of,
)
from contextd.signals.wheel import Wheel

Change: TypeAlias = Head | Closing

# One write: large enough to be cheap, small enough that a slow but living connection gets it away
# within the time after which a blocked send counts as dead.
BLOCK_FRAMES_MAX: Final = 256

_NEVER: Final = float("inf")
_AT_ONCE: Final = float("-inf")
_NOTHING: Final = -1
_revision = attrgetter("revision")


@dataclass(slots=True)
class Stats:
    """What the hub has done since it was made, for metrics."""

    blocks_sent: int = 0
    frames_sent: int = 0
    gaps: int = 0
    merged: int = 0
    slow_disconnects: int = 0


@dataclass(slots=True, kw_only=True)
class Desk:
    """What all readers of one hub share."""

    clock: Callable[[], float]
    now_ms: Callable[[], int]
    wheel: Wheel
    slow_s: float
    pending_max: int
    forget: "Callable[[Reader], None]"
    ask: Callable[[str], None]
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    stats: Stats = field(default_factory=Stats)


class _Track:
    """One message on one connection: the position sent (-1: none), and what waits."""

    __slots__ = ("closing", "due", "head", "message_id", "sent")

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.sent = _NOTHING
        self.due = _AT_ONCE
        self.head: Delta | None = None
        self.closing: Completion | None = None


class Reader:
    """One stream of signals. Made by `Hub.subscribe`; used by one task; `close` it whatever happens.

    `on_stuck` is called, once, when the reader is given up for being slow (§4.2): the hub has
    forgotten it by then, and the owner cancels the send that hangs.
    """

    __slots__ = (
        "_base", "_closed", "_cursor", "_desk", "_dirty", "_farewell", "_handed_at", "_heartbeat_s",
        "_held", "_later", "_live", "_named", "_next_due", "_over", "_progress", "_sent_at", "_state",
        "_state_seen", "_state_sent", "_throttle_s", "_tracks", "_waiter", "alarm", "context_id",
        "on_stuck",
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
        self._throttle_s = throttle_s
        self._heartbeat_s = heartbeat_s
        self._named = named

        self._tracks: dict[str, _Track] = {}
        self._dirty: dict[str, _Track] = {}  # the tracks with something waiting
        self._next_due = _NEVER  # of the dirty tracks; may be early, never late
        self._held: float = _NEVER  # the lowest revision of a waiting completion that holds states
        self._state: State | None = None  # the state to send next
        self._later: State | None = None  # the newest after it, while `_state` is held back

        self._base = _NOTHING  # the revision of the snapshot
        self._cursor = _NOTHING  # the last id sent
        self._state_sent = _NOTHING
        self._state_seen = _NOTHING

        self._live = False
        self._over = False  # nothing follows
        self._closed = False
        self._farewell: bytes | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sent_at = desk.clock()
        self._handed_at: float | None = None  # since when a block is being written
        desk.wheel.arm(self, self._sent_at + desk.slow_s)

    # For the route.

    @property
    def ending(self) -> bool:
        """The stream should end: leave the replay where it is, `take` gives what is still to be said."""
        said = self._over or self._farewell is not None
        return said or _last_of(self._state, self._later) is not None

    def replay(self, changes: Sequence[Change], *, up_to: int | None) -> bytes:
        """One page of what changed since the cursor, by revision; its last frame carries `up_to`."""
        now = self._desk.clock()
        frames = [self._tell(change, now) for change in changes]
        if frames and up_to is not None:
            frames[-1] = self._progress.id_line(up_to) + frames[-1]
            self._cursor = up_to
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
        frames += [self._tell(head, now) for head in open_heads if self._may_name(head, now)]
        self._drop_covered({head.message_id for head in open_heads}, standing.revision)
        state = encode(signal_of(standing, self._desk.now_ms()), named=self._named)
        frames.append(self._progress.id_line(standing.revision) + state)
        frames.append(self._heartbeat())
        self._live = True
        self._progress.anchor(standing.revision)
        if self._progress.gap:
            self._desk.ask(self.context_id)
        return self._hand_over(frames, now)

    async def take(self) -> bytes | None:
        """The next block, to be written in one send, waiting until something is due; None: the end.

        Coming back for the next block says that the one before was written.
        """
        self._handed_at = None
        while not self._over:
            now = self._desk.clock()
            if frames := self._block(now):
                return self._hand_over(frames, now)
            if self._dirty or not self.alarm:  # else it is set, and not too late
                self._set_alarm(now)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return None

    def sent(self) -> None:
        """The block that was handed over last is written (for pages; `take` says it by itself)."""
        self._handed_at = None

    def close(self) -> None:
        """Forget the reader; `take` gives None from now on. Repeatable."""
        if self._closed:
            return
        self._closed = self._over = True
        self._tracks.clear()
        self._dirty.clear()
        self._desk.wheel.disarm(self)
        self._desk.forget(self)
        self._wake()

    # For the hub.

    def offer_head(self, delta: Delta, now: float) -> None:
        """A message has a new position."""
        track = self._tracks.get(delta.message_id)
        if track is None:
            if delta.opened_revision <= self._base:
                return  # not open in the snapshot, hence closed before it: the reader knows its end
            track = self._tracks[delta.message_id] = _Track(delta.message_id)
        elif delta.position <= track.sent or track.closing is not None:
            return
        waiting = track.head
        if waiting is not None:
            if waiting.position < delta.position:
                self._desk.stats.merged += 1
                track.head = delta
            return
        track.head = delta
        self._mark(track, track.due, now)

    def offer_completion(self, completion: Completion, now: float) -> None:
        """A message was closed."""
        if completion.revision <= self._cursor:
            return
        track = self._tracks.get(completion.message_id)
        if track is None:
            track = self._tracks[completion.message_id] = _Track(completion.message_id)
        elif track.closing is not None:
            return
        elif track.head is not None:
            self._desk.stats.merged += 1
        track.closing = completion
        track.head = completion.delta if track.sent < completion.final else None
        if completion.holds and completion.revision < self._held:
            self._held = completion.revision
        self._mark(track, track.due if completion.final else now, now)

    def offer_state(self, state: State) -> None:
        """The context has a new state."""
        if state.revision <= self._state_seen:
            return
        self._state_seen = state.revision
        if self._state is None:
            self._state = state
        else:
            # The older one may be held back. Replacing it would move the moment at which it goes
            # further and further away while messages keep closing.
            self._desk.stats.merged += self._later is not None
            self._later = state
        if self._state.revision < self._held:
            self._wake()

    def end(self, farewell: bytes) -> None:
        """The stream ends after `farewell`, which goes out with what is due."""
        if self._farewell is None:
            self._farewell = farewell
            self._wake()

    def ring(self, now: float) -> None:
        """The wheel's alarm: a track or a heartbeat is due, or a send has taken too long."""
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

    # Pages.

    def _tell(self, change: Change, now: float) -> bytes:
        if isinstance(change, Head):
            track = self._tracks.get(change.message_id)
            if track is None:
                track = self._tracks[change.message_id] = _Track(change.message_id)
            track.sent = change.position
            track.due = now + self._throttle_s
        return encode(signal_of(change, self._desk.now_ms()), named=self._named)

    def _may_name(self, head: Head, now: float) -> bool:
        """Whether the snapshot names `head` now; a newer position may have to wait for its time."""
        track = self._tracks.get(head.message_id)
        if track is None or track.sent == _NOTHING:
            return True
        if head.position <= track.sent:
            return False
        if track.due <= now:
            return True
        self.offer_head(Delta(head, self._desk.now_ms()), now)
        return False

    def _drop_covered(self, open_ids: set[str], revision: int) -> None:
        """Forget what waits but was told, or overtaken, by the snapshot at `revision`."""
        for message_id, track in list(self._tracks.items()):
            if _is_covered(track, message_id in open_ids, revision):
                del self._tracks[message_id]
                self._dirty.pop(message_id, None)
            elif track.head is not None and track.head.position <= track.sent:
                track.head = None
                if track.closing is None:
                    self._dirty.pop(message_id, None)
        if self._later is not None and self._later.revision <= revision:
            self._later = None
        if self._state is not None and self._state.revision <= revision:
            self._state, self._later = self._later, None
        self._base = self._cursor = self._state_sent = revision
        self._state_seen = max(self._state_seen, revision)

    # Blocks.

    def _block(self, now: float) -> list[bytes]:
        """The frames to send now, if there are any; `_over` is set with the last ones."""
        waiting = self._live and (self._dirty or self._state is not None)
        frames = self._collect(now) if waiting else []
        if self._farewell is not None:
            frames.append(self._farewell)
            self._over = True
        elif not self._live and (state := _last_of(self._state, self._later)) is not None:
            frames.append(state.data(self._named))
            self._over = True
        elif self._live and not frames and now >= self._sent_at + self._heartbeat_s:
            frames.append(self._heartbeat())
        return frames

    def _collect(self, now: float) -> list[bytes]:
        """What is due: deltas, completions, then the state, the last of them with an id if one is."""
        if not self._dirty:
            self._held = self._next_due = _NEVER
            return self._with_id(self._states(), _NEVER)
        frames, done, unsent = self._sweep(now)
        full = len(frames) + len(done) >= BLOCK_FRAMES_MAX
        if len(done) > 1:
            done.sort(key=_revision)
        frames += [completion.data(self._named) for completion in done]
        # A full block may have left deltas behind, and they go before the state.
        states = [] if full else self._states()
        if done or states:
            return self._with_id(frames + states, unsent)
        return frames

    def _sweep(self, now: float) -> tuple[list[bytes], list[Completion], float]:
        """Deltas and completions that are due, and the lowest revision of a completion that is not."""
        deltas: list[bytes] = []
        done: list[Completion] = []
        clean: list[str] = []
        unsent = held = next_due = _NEVER
        for message_id, track in self._dirty.items():
            room = len(deltas) + len(done) < BLOCK_FRAMES_MAX
            head, closing = track.head, track.closing
            if head is not None and room and track.due <= now:
                deltas.append(head.data(self._named))
                track.sent = head.position
                track.due = now + self._throttle_s
                track.head = head = None
            if head is None:
                if closing is None:
                    clean.append(message_id)
                    continue
                if room and (track.due <= now or not closing.final):
                    done.append(closing)
                    clean.append(message_id)
                    del self._tracks[message_id]
                    continue
            next_due = min(next_due, track.due)
            if closing is not None:
                unsent = min(unsent, closing.revision)
                if closing.holds:
                    held = min(held, closing.revision)
        for message_id in clean:
            del self._dirty[message_id]
        self._held, self._next_due = held, next_due
        return deltas, done, unsent

    def _states(self) -> list[bytes]:
        """The newest state that no waiting completion holds back, if there is one."""
        state, later = self._state, self._later
        if later is not None and later.revision < self._held:
            self._desk.stats.merged += 1
            state, later = later, None
        elif state is None or state.revision >= self._held:
            return []
        self._state, self._later = later, None
        self._state_sent = state.revision
        if state.last:
            self._over = True
        return [state.data(self._named)]

    def _with_id(self, frames: list[bytes], unsent: float) -> list[bytes]:
        """`frames`, which end with a completion or a state, with an id if one is due (§4.1).

        Each revision has a state, so what is sent in full ends at the last state's revision, before
        the first completion that waits, and where the revisions published have a hole.
        """
        through = self._progress.through
        if frames and through is not None:
            revision = min(self._state_sent, through, unsent - 1)
            if revision > self._cursor:
                self._cursor = int(revision)
                frames[-1] = self._progress.id_line(self._cursor) + frames[-1]
        return frames

    def _heartbeat(self) -> bytes:
        return self._desk.heartbeats.data(self._desk.now_ms(), named=self._named)

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

    def _due_at(self) -> float:
        """When a reader that waits is to be woken, if nothing comes before."""
        if not self._live:
            return _NEVER
        return min(self._next_due, self._sent_at + self._heartbeat_s)

    def _set_alarm(self, now: float) -> None:
        """For what is due next, or for the look at a send that may hang."""
        since = now if self._handed_at is None else self._handed_at
        at = since + self._desk.slow_s
        if self._handed_at is None:
            at = min(at, self._due_at())
        self._desk.wheel.arm(self, at)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _mark(self, track: _Track, due: float, now: float) -> None:
        """Something waits in `track` and may go at `due`."""
        self._dirty[track.message_id] = track
        if len(self._dirty) > self._desk.pending_max:
            self._give_up()
        elif due <= now:
            self._wake()
        elif due < self._next_due:
            self._next_due = due
            self._desk.wheel.arm(self, due)

    def _give_up(self) -> None:
        if self._closed:
            return
        self._desk.stats.slow_disconnects += 1
        self.close()
        if self.on_stuck is not None:
            self.on_stuck()


def _last_of(*states: State | None) -> State | None:
    return next((state for state in states if state is not None and state.last), None)


def _is_covered(track: _Track, is_open: bool, revision: int) -> bool:
    """Whether the snapshot at `revision` says all there is to say of `track`'s message."""
    if track.closing is not None:
        return track.closing.revision <= revision
    if is_open:
        return False
    return track.head is None or track.head.opened_revision <= revision
