"""Messages, their content, and what a client sends (§3)."""

from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

import msgspec

from contextd.core.values import (
    NO_NUL_PATTERN,
    SEQUENCE_MAX,
    Content,
    Id,
    JsonObject,
    Sequence,
    Timestamp,
)


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class MessageStatus(StrEnum):
    """`streaming` is open; every other status is closed for good."""

    STREAMING = "streaming"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


TEXT = "text"
THINKING = "thinking"
FILE_REFERENCE = "file_reference"
WORKFLOW = "workflow"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong in a turn or a message, without chat text."""

    type: str
    message: str


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the model's server counted them. A sum stops at `SEQUENCE_MAX`."""

    prompt_tokens: Sequence = 0
    completion_tokens: Sequence = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=min(self.prompt_tokens + other.prompt_tokens, SEQUENCE_MAX),
            completion_tokens=min(self.completion_tokens + other.completion_tokens, SEQUENCE_MAX),
        )

    @classmethod
    def read(cls, reported: object) -> "Usage | None":
        """What somebody else reported or stored, as far as it can be read; null for what is no object.

        A number that is too large or below zero counts as the nearest that is allowed, and what is no
        whole number as 0.
        """
        if not isinstance(reported, dict):
            return None
        return cls(
            prompt_tokens=_tokens(reported.get("prompt_tokens")),
            completion_tokens=_tokens(reported.get("completion_tokens")),
        )


def _tokens(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some servers write 12.0
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), SEQUENCE_MAX)


class MessageStats(msgspec.Struct, frozen=True, kw_only=True):
    """How a closed message came about. Times are in milliseconds."""

    chunks: int
    characters: int
    bytes: int
    first_chunk_ms: int | None
    total_ms: int
    mean_interval_ms: float | None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message. Its text is not here: it is pulled (§3.3), or asked for with `include=content`."""

    id: str
    context_id: str
    turn_id: str | None
    parent_id: str | None
    role: Role
    kind: str
    status: MessageStatus
    current_sequence: int
    final_sequence: int | None
    media_type: str
    finish_reason: str | None
    usage: Usage | None
    error: Problem | None
    metadata: JsonObject
    client_metadata: JsonObject
    stats: MessageStats | None
    created_at: Timestamp
    completed_at: Timestamp | None
    epoch: int | msgspec.UnsetType = msgspec.UNSET  # of a produced message (§7)
    content: str | msgspec.UnsetType = msgspec.UNSET
    content_sequence: int | msgspec.UnsetType = msgspec.UNSET


class MessagePage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of messages. `stream_cursor` is of the same snapshot: attach with it, miss nothing."""

    items: list[Message]
    next_cursor: str | None
    revision: int
    stream_cursor: str


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly the text of chunks `from_sequence` + 1 … `sequence` (§3.3)."""

    context_id: str
    message_id: str
    from_sequence: int
    sequence: int
    content: str
    head_sequence: int
    status: MessageStatus
    final: bool


class RangePull(msgspec.Struct, frozen=True, kw_only=True):
    """A pull bounded by `to_sequence`: only what can never change, so that it may be cached."""

    context_id: str
    message_id: str
    from_sequence: int
    sequence: int
    content: str


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk as it was written."""

    sequence: int
    content: str
    created_at: Timestamp


class ChunkPage(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks after a position, each by itself."""

    context_id: str
    message_id: str
    chunks: list[Chunk]
    sequence: int
    head_sequence: int
    status: MessageStatus
    final: bool


DisplayText = Annotated[str, msgspec.Meta(pattern=NO_NUL_PATTERN)]
FilePath = Annotated[str, msgspec.Meta(pattern=NO_NUL_PATTERN, min_length=1, max_length=4096)]


class _Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """What a send consists of; `type` says which."""


class TextPayload(_Payload, frozen=True, kw_only=True, tag="text"):
    """Plain text. `display` is what a frontend shows in its place, if that differs."""

    content: Content
    display: DisplayText | None = None


class FileReferencePayload(_Payload, frozen=True, kw_only=True, tag="file_reference"):
    """Files of the workspace, or lines of them, for the model to see: `dir/a.md`, `b.py:10-20`."""

    paths: Annotated[list[FilePath], msgspec.Meta(min_length=1, max_length=100)]
    display_text: DisplayText | None = None


class WorkflowPayload(_Payload, frozen=True, kw_only=True, tag="workflow"):
    """A workflow of the server, with the values of its parameters."""

    workflow: Id
    parameters: JsonObject = msgspec.field(default_factory=dict)
    display_text: DisplayText | None = None


Payload: TypeAlias = TextPayload | FileReferencePayload | WorkflowPayload
OnBusy: TypeAlias = Literal["enqueue", "reject", "interrupt"]


class SendRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts/{id}/messages` (§3.1)."""

    payload: Payload
    client_metadata: JsonObject = msgspec.field(default_factory=dict)
    message_id: Id | None = None
    role: Role = Role.USER
    branch: Id | None = None
    parent_id: Id | None = None
    on_busy: OnBusy | None = None
    respond: bool = True


class SendAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a send answers: the message is stored, and the turn runs or waits on its own."""

    context_id: str
    message_id: str
    turn_id: str | None
    state: str
    revision: int
    stream_cursor: str
    queued: bool
