"""What a producer of the fault run is to write, worked out from the seed by it and by the verdict alike.

Each chunk says who wrote it: its text begins with the epoch of its writer and its own sequence. Of two
producers that race for one message each writes another text, so whatever is mixed can be seen.
"""

import json
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from nasty_scripts import NASTY

UNFENCED = 0  # stands for the epoch in the text of a producer that names none
LARGE_SHARE = 0.004
LARGE_BYTES = 60_000  # below the 64 KiB that a chunk may have
WAYS = ("single", "batch", "ndjson")
PACED_S_MAX = 10.0  # what all pauses of a message may come to
ENDINGS = ("complete", "complete", "complete", "line", "fail", "leave")


@dataclass(frozen=True)
class MessagePlan:
    """One message. `ending`: complete | fail, by a request; line: complete, in a body's last line;
    leave: not at all, so that silence ends it."""

    id: str
    chunks: int
    ways: tuple[str, ...] = WAYS
    numbered: bool = True
    fenced: bool = True
    ending: str = "complete"
    pace_s: float = 0.0  # the most that is waited between two requests, or pieces of a body


@dataclass(frozen=True)
class ProducerPlan:
    """One producer: a process, and its successors that go on from the same ledger.

    `port` is a proxy's, `port_file` names the server's own. `take_backs`: how often it takes a message
    back that another one took over. `planted`: a fault that the run must find. `via`: bare | client.
    """

    name: str
    context_id: str
    seed: str
    port: int
    port_file: str
    ledger: str
    messages: tuple[MessagePlan, ...]
    take_backs: int = 1
    pause_s: float = 0.0  # the most that it waits between a take-over and its next write
    mischief_share: float = 0.08
    planted: str = ""
    via: str = "bare"

    @property
    def message_ids(self) -> frozenset[str]:
        """What it writes to."""
        return frozenset(message.id for message in self.messages)

    def encoded(self) -> str:
        """As the argument of a process."""
        return json.dumps(asdict(self))


def decoded(argument: str) -> ProducerPlan:
    """The plan of `encoded`."""
    fields: dict[str, Any] = json.loads(argument)
    messages = tuple(
        MessagePlan(**{**one, "ways": tuple(one["ways"])}) for one in fields.pop("messages")
    )
    return ProducerPlan(**fields, messages=messages)


@dataclass
class Author:
    """The texts of one message, by epoch and sequence."""

    seed: str
    message_id: str
    _known: dict[tuple[int, int], str] = field(default_factory=dict, repr=False)

    def text(self, epoch: int, sequence: int) -> str:
        """Always the same for the same place, and unlike any other of the message."""
        place = epoch, sequence
        if place not in self._known:
            self._known[place] = self._make(epoch, sequence)
        return self._known[place]

    def _make(self, epoch: int, sequence: int) -> str:
        random = Random(f"{self.seed}:{self.message_id}:{epoch}:{sequence}")
        pieces = random.choices(NASTY, k=random.choice((0, 1, 1, 2, 3)))
        if random.random() < LARGE_SHARE:
            piece = random.choice(("🧵", "x", "\u2028", "\\"))
            pieces.append(piece * (LARGE_BYTES // len(piece.encode())))
        mark = f"⟦{epoch}.{sequence}⟧"
        return mark + "".join(pieces)


def read_mark(text: str) -> tuple[int, int] | None:
    """The epoch and sequence that a chunk claims; None when it has no mark."""
    mark, found, _ = text.removeprefix("⟦").partition("⟧")
    epoch, dot, sequence = mark.partition(".")
    if not (found and dot and epoch.isdigit() and sequence.isdigit()):
        return None
    return int(epoch), int(sequence)


def make_messages(random: Random, stem: str, count: int) -> tuple[MessagePlan, ...]:
    """The messages of one producer, one after the other."""
    return tuple(_make_message(random, f"{stem}.{number}") for number in range(1, count + 1))


def make_contested(random: Random, message_id: str) -> MessagePlan:
    """A message that takes long enough to be fought for."""
    chunks = random.choice((100, 200, 300))
    return MessagePlan(message_id, chunks, numbered=random.random() < 0.6, pace_s=6.0 / chunks)


def _make_message(random: Random, message_id: str) -> MessagePlan:
    fenced = random.random() < 0.85
    chosen = tuple(way for way in WAYS if random.random() < 0.7)
    chunks = random.choice((1, 3, 20, 60, 150, 400))
    return MessagePlan(
        message_id,
        chunks=chunks,
        ways=chosen or WAYS,
        # Without numbers only a fence makes a writer exact: who was cut off takes over from itself.
        numbered=not fenced or random.random() < 0.75,
        fenced=fenced,
        ending=random.choice(ENDINGS),
        pace_s=min(random.choice((0.0, 0.01, 0.05, 0.2)), PACED_S_MAX / chunks),
    )
