"""What one connection has been sent, what waits for it, and when that may go (§4.1, §4.2).

A `_Track` is kept for each message that is open or has something waiting. Nothing waits in a queue:
a newer position replaces an older one, and a block is put together only when it is taken. So a reader
that takes slowly costs one track a message, and a fast one gets a write for each change.

The order on the connection comes from three rules. A track's `due` is when its next delta may go, or
the completion after its last delta. A state is held back while a completion of its revision or an
older one waits. An id is sent when nothing that waits belongs to it.

No clock, no asyncio: time is an argument.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Final, TypeAlias

from contextd.signals.frames import Closing, Completion, Delta, Head, Progress, State

Change: TypeAlias = Head | Closing

# One write: large enough to be cheap, small enough that a slow but living connection gets it away
# within the time after which a blocked send counts as dead.
BLOCK_FRAMES_MAX: Final = 256

NEVER: Final = float("inf")
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


class _Track:
    """One message on one connection: the position sent (-1: none), and what waits."""

    __slots__ = ("closing", "due", "head", "sent")

    def __init__(self) -> None:
        self.sent = _NOTHING
        self.due = _AT_ONCE
        self.head: Delta | None = None
        self.closing: Completion | None = None


class Backlog:
    """The levels that one reader still has to be told, merged. Its reader alone uses it.

    `waiting`: by message, what is to be sent now or later. `next_due`: when the first of it is due,
    as far as was known when `collect` ran last; `ended`: the state that nothing follows was sent.
    """

    __slots__ = (
        "_base", "_cursor", "_held", "_later", "_named", "_progress", "_state", "_state_seen",
        "_state_sent", "_stats", "_throttle_s", "_tracks", "ended", "next_due", "waiting",
    )  # fmt: skip

    def __init__(self, progress: Progress, stats: Stats, *, throttle_s: float, named: bool) -> None:
        self._progress = progress
        self._stats = stats
        self._throttle_s = throttle_s
        self._named = named

        self._tracks: dict[str, _Track] = {}
        self.waiting: dict[str, _Track] = {}
        self.next_due = NEVER
        self._held: float = NEVER  # the lowest revision of a waiting completion that holds states
        self._state: State | None = None  # the state to send next
        self._later: State | None = None  # the newest after it, while `_state` is held back
        self.ended = False

        self._base = _NOTHING  # the revision of the snapshot
        self._cursor = _NOTHING  # the last id sent
        self._state_sent = _NOTHING
        self._state_seen = _NOTHING

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not self.waiting and self._state is None

    @property
    def last_state(self) -> State | None:
        """The state that nothing follows, if it waits."""
        states = (self._state, self._later)
        return next((state for state in states if state is not None and state.last), None)

    # Offers give the time at which what is new may go, or None if nothing is.

    def offer_head(self, delta: Delta) -> float | None:
        """A message has a new position."""
        track = self._tracks.get(delta.message_id)
        if track is None:
            if delta.opened_revision <= self._base:
                return None  # not open in the snapshot, hence closed before it, and that was told
            track = self._tracks[delta.message_id] = _Track()
        elif delta.position <= track.sent or track.closing is not None:
            return None
        waiting = track.head
        if waiting is None:
            track.head = delta
            self.waiting[delta.message_id] = track
            return track.due
        if waiting.position < delta.position:
            track.head = delta
            self._stats.merged += 1
        return None

    def offer_completion(self, completion: Completion) -> float | None:
        """A message was closed."""
        if completion.revision <= self._cursor:
            return None
        track = self._tracks.get(completion.message_id)
        if track is None:
            track = self._tracks[completion.message_id] = _Track()
        elif track.closing is not None:
            return None
        elif track.head is not None:
            self._stats.merged += 1
        track.closing = completion
        track.head = completion.delta if track.sent < completion.final else None
        if completion.holds and completion.revision < self._held:
            self._held = completion.revision
        self.waiting[completion.message_id] = track
        return track.due if completion.final else _AT_ONCE

    def offer_state(self, state: State) -> float | None:
        """The context has a new state."""
        if state.revision <= self._state_seen:
            return None
        self._state_seen = state.revision
        if self._state is None:
            self._state = state
        else:
            # The older one may be held back. Replacing it would move the moment at which it goes
            # further and further away while messages keep closing.
            self._stats.merged += self._later is not None
            self._later = state
        return _AT_ONCE if self._state.revision < self._held else None

    # Attaching.

    def tell(self, change: Change, now: float) -> None:
        """A page tells `change`."""
        if isinstance(change, Head):
            track = self._tracks.get(change.message_id)
            if track is None:
                track = self._tracks[change.message_id] = _Track()
            track.sent = change.position
            track.due = now + self._throttle_s

    def may_name(self, head: Head, now: float) -> bool:
        """Whether a page may tell `head` now: it was not told yet, or is newer and its time has come."""
        track = self._tracks.get(head.message_id)
        return track is None or (track.sent < head.position and track.due <= now)

    def cover(self, open_ids: set[str], revision: int) -> None:
        """Forget what waits but was told, or overtaken, by the snapshot at `revision`."""
        for message_id, track in list(self._tracks.items()):
            if _is_covered(track, message_id in open_ids, revision):
                del self._tracks[message_id]
                self.waiting.pop(message_id, None)
            elif track.head is not None and track.head.position <= track.sent:
                track.head = None
                if track.closing is None:
                    del self.waiting[message_id]
        if self._later is not None and self._later.revision <= revision:
            self._later = None
        if self._state is not None and self._state.revision <= revision:
            self._state, self._later = self._later, None
        self._base = self._cursor = self._state_sent = revision
        self._state_seen = max(self._state_seen, revision)
        self._held = self.next_due = NEVER  # `collect` finds out anew

    # Sending.

    def collect(self, now: float) -> list[bytes]:
        """What is due: deltas, completions, then the state, the last of them with an id if one is."""
        if not self.waiting:
            return self._with_id(self._states(), NEVER)
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
        unsent = held = next_due = NEVER
        for message_id, track in self.waiting.items():
            closing = track.closing
            if len(deltas) + len(done) < BLOCK_FRAMES_MAX:
                if track.head is not None and track.due <= now:
                    deltas.append(track.head.data(self._named))
                    track.sent = track.head.position
                    track.due = now + self._throttle_s
                    track.head = None
                if track.head is None and (
                    closing is None or not closing.final or track.due <= now
                ):
                    clean.append(message_id)
                    if closing is not None:
                        done.append(closing)
                    continue
            next_due = min(next_due, track.due)
            if closing is not None:
                unsent = min(unsent, closing.revision)
                held = min(held, closing.revision) if closing.holds else held
        for message_id in clean:
            if self.waiting.pop(message_id).closing is not None:
                del self._tracks[message_id]
        self._held, self.next_due = held, next_due
        return deltas, done, unsent

    def _states(self) -> list[bytes]:
        """The newest state that no waiting completion holds back, if there is one."""
        state, later = self._state, self._later
        if later is not None and later.revision < self._held:
            self._stats.merged += 1
            state, later = later, None
        elif state is None or state.revision >= self._held:
            return []
        self._state, self._later = later, None
        self._state_sent = state.revision
        self.ended = state.last
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


def _is_covered(track: _Track, is_open: bool, revision: int) -> bool:
    """Whether the snapshot at `revision` says all there is to say of `track`'s message."""
    if track.closing is not None:
        return track.closing.revision <= revision
    if is_open:
        return False
    return track.head is None or track.head.opened_revision <= revision
