"""What all readers and senders of a run were told, together: each word must fit every other.

`Evidence` keeps what was answered, signalled or pulled. Two readers that were given different text for
one range, a position beyond a final one, two ends of one message, or a revision with two states are
faults at once; what a crash must not take away is compared with the database later.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAULTS_SHOWN_MAX = 20


@dataclass
class Known:
    """One message as readers know it. `offsets`: characters up to a sequence, where that is known."""

    text: str = ""
    head: int = 0
    offsets: dict[int, int] = field(default_factory=lambda: {0: 0})
    closed: tuple[str, int] | None = None
    role: str | None = None
    kind: str | None = None


class Evidence:
    """Shared by everything in a run. `seed` is named with each fault, so that it can be run again."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.faults: list[str] = []
        self.messages: dict[str, dict[str, Known]] = {}
        self.states: dict[str, dict[int, str]] = {}
        self.deleting: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.on_closed: Callable[[], None] = lambda: None

    def fault(self, what: str, **facts: Any) -> None:
        """Something that must never happen did."""
        shown = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        self.faults.append(f"{what}: {shown} [seed {self.seed}]")

    def require_none(self) -> None:
        """Raises when there was a fault."""
        if self.faults:
            shown = "\n".join(self.faults[:FAULTS_SHOWN_MAX])
            raise AssertionError(f"{len(self.faults)} faults, seed {self.seed}:\n{shown}")

    def known(self, context_id: str, message_id: str) -> Known:
        """What is known of a message; nothing at first."""
        return self.messages.setdefault(context_id, {}).setdefault(message_id, Known())

    def revision(self, context_id: str) -> int:
        """The newest that anybody was told."""
        return max(self.states.get(context_id, {0: ""}))

    def reached(self, context_id: str, message_id: str, position: int, by: str) -> None:
        """A signal or an answer says that the message has chunks up to `position`."""
        known = self.known(context_id, message_id)
        if known.closed is not None and position > known.closed[1]:
            self.fault(
                "a position beyond the final one",
                by=by,
                message=message_id,
                position=position,
                closed=known.closed,
            )
        known.head = max(known.head, position)

    def described(self, context_id: str, message_id: str, role: str, kind: str, by: str) -> None:
        """A message's role and kind never change."""
        known = self.known(context_id, message_id)
        if known.role is not None and (known.role, known.kind) != (role, kind):
            self.fault("a message changed its role or kind", by=by, message=message_id, kind=kind)
        known.role, known.kind = role, kind

    def closed(self, context_id: str, message_id: str, status: str, final: int, by: str) -> None:
        """A message closes once, and not below what was heard of it."""
        known = self.known(context_id, message_id)
        if known.closed is not None and known.closed != (status, final):
            self.fault(
                "a message that closed twice",
                by=by,
                message=message_id,
                was=known.closed,
                now=(status, final),
            )
        if final < known.head:
            self.fault(
                "a message that closed below a position that was told",
                by=by,
                message=message_id,
                told=known.head,
                final=final,
            )
        if known.closed is None:
            self.on_closed()
        known.closed = status, final
        known.head = max(known.head, final)

    def pulled(
        self, context_id: str, message_id: str, start: int, sequence: int, content: str, by: str
    ) -> None:
        """Chunks `start` + 1 … `sequence` are `content`: they are so for every reader, for ever."""
        known = self.known(context_id, message_id)
        if (sequence == start) != (content == "") or sequence < start:
            self.fault(
                "text and positions that do not fit",
                by=by,
                message=message_id,
                start=start,
                sequence=sequence,
            )
        self.reached(context_id, message_id, sequence, by)
        begin = known.offsets.get(start)
        if begin is None:
            return  # a range whose beginning nobody has walked up to yet
        end = begin + len(content)
        before = known.text[begin:end]
        if before != content[: len(before)] or known.offsets.get(sequence, end) != end:
            self.fault(
                "different text for one range",
                by=by,
                message=message_id,
                start=start,
                sequence=sequence,
            )
            return
        known.text += content[len(before) :]
        known.offsets[sequence] = end

    def standing(self, context_id: str, revision: int, state: str, by: str) -> None:
        """A context has one state at each revision."""
        states = self.states.setdefault(context_id, {})
        if states.setdefault(revision, state) != state:
            self.fault(
                "two states at one revision",
                by=by,
                context=context_id,
                revision=revision,
                states=(states[revision], state),
            )
