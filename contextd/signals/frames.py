"""What a stream says, as bytes: levels, their frames, and the cursor between them (§4).

A *level* is a fact that stays true: this far, closed there, in this state. The hub is told levels,
so that any of them can be merged, repeated or lost without harm. A *frame* is a level on its way to
many readers: it is encoded when the first one needs it, and the bytes are shared by all.
"""

from typing import Final, TypeAlias, assert_never

import msgspec

from contextd.core.signal import (
    DELETED_STATE,
    ContentDelta,
    Heartbeat,
    MessageCompleted,
    Signal,
    StateChanged,
)
from contextd.core.values import SEQUENCE_MAX, timestamp

REVISION_DIGITS_MAX: Final = len(str(SEQUENCE_MAX))
USER_ROLE: Final = "user"

_encode = msgspec.json.Encoder().encode


class Head(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The open message has chunks up to `position`; the change that opened it is `opened_revision`."""

    context_id: str
    message_id: str
    role: str
    kind: str
    position: int
    opened_revision: int


class Closing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The message was closed at position `final` by the change `revision`."""

    context_id: str
    message_id: str
    role: str
    kind: str
    final: int
    status: str
    revision: int


class Standing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The state of the context at `revision`; `deleted` when it is gone."""

    context_id: str
    state: str
    revision: int
    record_revision: int


Level: TypeAlias = Head | Closing | Standing


def cursor(database_id: str, revision: int) -> str:
    """The opaque `id:` that stands for everything up to `revision` (§4.1)."""
    return f"{database_id}-{revision}"


def parse_cursor(database_id: str, text: str) -> int | None:
    """The revision in a cursor of this database; None for another database's, or for garbage.

    Whether the revision lies in the future is not known here: the caller compares.
    """
    digits = text.removeprefix(f"{database_id}-")
    if digits == text or not 1 <= len(digits) <= REVISION_DIGITS_MAX:
        return None
    if not (digits.isascii() and digits.isdigit()):  # isdigit alone takes "²"
        return None
    revision = int(digits)
    return revision if str(revision) == digits and revision <= SEQUENCE_MAX else None


def signal_of(level: Level, at_ms: int) -> Signal:
    """The signal that tells `level`, stamped with the wall clock's `at_ms`."""
    match level:
        case Head():
            return ContentDelta(
                context_id=level.context_id,
                message_id=level.message_id,
                current_sequence=level.position,
                role=level.role,
                kind=level.kind,
                timestamp=timestamp(at_ms),
            )
        case Closing():
            return MessageCompleted(
                context_id=level.context_id,
                message_id=level.message_id,
                final_sequence=level.final,
                role=level.role,
                kind=level.kind,
                status=level.status,
                revision=level.revision,
                timestamp=timestamp(at_ms),
            )
        case Standing():
            return StateChanged(
                context_id=level.context_id,
                new_state=level.state,
                revision=level.revision,
                record_revision=level.record_revision,
                timestamp=timestamp(at_ms),
            )
        case _:
            assert_never(level)


def encode(signal: Signal, *, named: bool) -> bytes:
    """One server-sent event without an id; `named` adds its `event:` line for addEventListener."""
    data = b"data: " + _encode(signal) + b"\n\n"
    return (
        b"event: " + str(type(signal).__struct_config__.tag).encode() + b"\n" + data
        if named
        else data
    )


class Frame:
    """One level on its way to many readers, encoded at most once for each framing."""

    __slots__ = ("_at_ms", "_level", "_named", "_plain")

    def __init__(self, level: Level, at_ms: int) -> None:
        self._level = level
        self._at_ms = at_ms
        self._plain: bytes | None = None
        self._named: bytes | None = None

    def data(self, named: bool) -> bytes:
        """The event's bytes, without an id line."""
        if named:
            if self._named is None:
                self._named = encode(signal_of(self._level, self._at_ms), named=True)
            return self._named
        if self._plain is None:
            self._plain = encode(signal_of(self._level, self._at_ms), named=False)
        return self._plain


class Delta(Frame):
    """`content_delta`: the newest position of one message."""

    __slots__ = ("message_id", "opened_revision", "position")

    def __init__(self, head: Head, at_ms: int) -> None:
        super().__init__(head, at_ms)
        self.message_id = head.message_id
        self.position = head.position
        self.opened_revision = head.opened_revision


class Completion(Frame):
    """`message_completed`, with the delta at the final position that goes before it.

    `holds`: states of this revision or a later one wait for it. A user's message holds nothing.
    """

    __slots__ = ("delta", "final", "holds", "message_id", "revision")

    def __init__(self, closing: Closing, at_ms: int) -> None:
        super().__init__(closing, at_ms)
        self.message_id = closing.message_id
        self.final = closing.final
        self.revision = closing.revision
        self.holds = closing.role != USER_ROLE
        self.delta = Delta(_final_head(closing), at_ms) if closing.final else None


class State(Frame):
    """`state_changed`; `last` when nothing can follow it, because the context is gone."""

    __slots__ = ("last", "revision")

    def __init__(self, standing: Standing, at_ms: int) -> None:
        super().__init__(standing, at_ms)
        self.revision = standing.revision
        self.last = standing.state == DELETED_STATE


def _final_head(closing: Closing) -> Head:
    return Head(
        context_id=closing.context_id,
        message_id=closing.message_id,
        role=closing.role,
        kind=closing.kind,
        position=closing.final,
        opened_revision=closing.revision,  # not read: a delta made from a closing is never weighed
    )


class Heartbeats:
    """The heartbeat's bytes, made anew when `fresh_ms` have passed since they were last made."""

    __slots__ = ("_at_ms", "_frames", "_fresh_ms")

    def __init__(self, fresh_ms: int = 10) -> None:
        self._fresh_ms = fresh_ms
        self._at_ms = -fresh_ms
        self._frames: dict[bool, bytes] = {}

    def data(self, at_ms: int, *, named: bool) -> bytes:
        """The event's bytes; its timestamp is at most `fresh_ms` old."""
        if not 0 <= at_ms - self._at_ms < self._fresh_ms:
            self._at_ms = at_ms
            self._frames.clear()
        frame = self._frames.get(named)
        if frame is None:
            frame = encode(Heartbeat(timestamp=timestamp(self._at_ms)), named=named)
            self._frames[named] = frame
        return frame


class Progress:
    """Which revisions of one context have been published without a hole: what an `id:` may promise.

    Everything after `_low` and up to `through` was published while the context was watched. A
    reader's snapshot is read after it subscribed, so whatever was published before then is in its
    snapshot, and whatever was published since was offered to it. Hence a reader whose snapshot is
    not below `_low` misses nothing up to `through`. Revisions that came after a hole wait in one
    run, `_ahead_from` to `_ahead_to`; an older run is forgotten, which only asks for a wider read.
    """

    __slots__ = (
        "_ahead_from",
        "_ahead_to",
        "_database_id",
        "_line",
        "_line_revision",
        "_low",
        "through",
    )

    def __init__(self, database_id: str) -> None:
        self._database_id = database_id
        self._line = b""
        self._line_revision = -1
        self._low = 0
        self._ahead_from = 0
        self._ahead_to = 0
        self.through: int | None = None

    @property
    def newest(self) -> int:
        """The highest revision that was published or read."""
        return max(self.through or 0, self._ahead_to)

    @property
    def gap(self) -> bool:
        """Revisions between `through` and a published one are missing."""
        return self._ahead_from > 0

    def note(self, revision: int) -> None:
        """`revision` was published."""
        through = self.through
        if through is None or (through == self._low and revision <= through):
            # Below a snapshot and nothing published since: the publisher is behind that snapshot.
            self._low, self.through = revision - 1, revision
        elif revision == through + 1:
            self.through = revision
            self._join()
        elif revision > through:
            self._note_ahead(revision)

    def anchor(self, revision: int) -> None:
        """A reader starts from a snapshot at `revision`."""
        if self.through is None:
            self._low = self.through = revision
        elif revision < self._low:
            if self.through > self._low and not self.gap:
                self._ahead_from, self._ahead_to = self._low + 1, self.through
            self._low = self.through = revision

    def fill(self, after: int, revision: int) -> None:
        """All changes after `after` and up to `revision` were read and published."""
        if self.through is None or after > self.through:
            self.note(revision)
        elif revision > self.through:
            self.through = revision
            self._join()

    def id_line(self, revision: int) -> bytes:
        """`id:` for `revision`; the last one is kept, since many readers need the same."""
        if revision != self._line_revision:
            self._line = f"id: {cursor(self._database_id, revision)}\n".encode()
            self._line_revision = revision
        return self._line

    def _note_ahead(self, revision: int) -> None:
        if self.gap and revision == self._ahead_to + 1:
            self._ahead_to = revision
        elif revision > self._ahead_to:
            self._ahead_from = self._ahead_to = revision

    def _join(self) -> None:
        if self.through is not None and self._ahead_from and self.through >= self._ahead_from - 1:
            self.through = max(self.through, self._ahead_to)
            self._ahead_from = self._ahead_to = 0
