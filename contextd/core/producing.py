"""Producing from outside: what a producer sends, and what it is answered (§7)."""

from typing import Annotated

import msgspec
from msgspec import Meta

from contextd.core.message import TEXT, Problem, Role, Usage
from contextd.core.values import NO_NUL_PATTERN, SEQUENCE_MAX, Id, JsonObject, Label, Sequence

KIND_PATTERN = "^[a-z][a-z0-9_-]{0,63}$"

Epoch = Annotated[int, Meta(ge=1, le=SEQUENCE_MAX)]
Kind = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9_-]{0,63}\Z",
        description="A lower-case word",
        extra_json_schema={"pattern": KIND_PATTERN},
    ),
]
MediaType = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]+/[ -~]+\Z",
        max_length=256,
        extra_json_schema={"pattern": "^[!-~]+/[ -~]+$"},
    ),
]
Position = Annotated[int, Meta(ge=1, le=SEQUENCE_MAX)]


# Decoded without the pattern, which would cost more than the rest: who decodes looks for U+0000.
ChunkText = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": NO_NUL_PATTERN})]


class Producer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who writes, and in which epoch: of two the higher one may. Null: the current one + 1."""

    id: Id
    epoch: Epoch | None = None


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /contexts/{id}/messages/{message_id}`: opens a message, or takes it over."""

    producer: Producer
    role: Role = Role.ASSISTANT
    kind: Kind = TEXT
    branch: Id | None = None
    parent_id: Id | None = None
    media_type: MediaType = "text/plain"
    metadata: JsonObject = msgspec.field(default_factory=dict)


class ChunkInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chunk. With its sequence a retry is harmless; without, the server numbers it."""

    content: ChunkText
    sequence: Position | None = None


class AppendRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST …/chunks`: either `chunks`, or one chunk as `content` (and its `sequence`)."""

    epoch: Epoch | None = None
    chunks: Annotated[list[ChunkInput], Meta(min_length=1)] | None = None
    content: ChunkText | None = None
    sequence: Position | None = None


class AppendAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Durable up to `sequence`: `accepted` chunks are new, `duplicates` were stored before."""

    message_id: str
    sequence: int
    accepted: int
    duplicates: int


class ProducerUsage(Usage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens, as the producer counts them."""


class CompleteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST …/complete`. `final_sequence` says how many chunks there should be."""

    epoch: Epoch | None = None
    final_sequence: Sequence | None = None
    finish_reason: Label | None = None
    usage: ProducerUsage | None = None


class ProducerError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What went wrong at the producer."""

    type: Label
    message: Annotated[str, Meta(pattern=NO_NUL_PATTERN, max_length=8192)]

    def as_problem(self) -> Problem:
        """As it is kept on the message."""
        return Problem(type=self.type, message=self.message)


class FailRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST …/fail`: the message ends here, with what it has."""

    error: ProducerError
    epoch: Epoch | None = None


class Ending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the last line of an NDJSON body may say."""

    finish_reason: Label | None = None
    usage: ProducerUsage | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of an NDJSON body: first `epoch`, then `content` again and again, last `complete`."""

    content: ChunkText | None = None
    sequence: Position | None = None
    epoch: Epoch | None = None
    complete: Ending | None = None
