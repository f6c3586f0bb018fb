"""Calls of tools: what the model asked for, who decided, how it ended (§8)."""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from contextd.core.values import NO_NUL_PATTERN, Document, Id, JsonObject, Timestamp


class ToolCallStatus(StrEnum):
    """`pending` waits for a person, `approved` for its turn to run or, if external, for its result."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call. `arguments` is null where the model's were no JSON object."""

    id: str
    context_id: str
    turn_id: str
    message_id: str
    name: str
    arguments: JsonObject | None
    status: ToolCallStatus
    requires_approval: bool
    external: bool
    result_message_id: str | None
    error: str | None
    duration_ms: int | None
    created_at: Timestamp
    decided_at: Timestamp | None


class ToolCallPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of calls, oldest first."""

    items: list[ToolCall]
    next_cursor: str | None


class ToolDecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person says to one call.

    `arguments` replace the model's where it is approved; where it is denied the model is told the
    `reason`. Neither has an effect with the other decision.
    """

    tool_call_id: Id
    decision: Literal["approve", "deny"]
    reason: Document | None = None
    arguments: JsonObject | None = None


class DecisionsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts/{id}/tool-calls/decisions`: all of them, or none."""

    decisions: Annotated[list[ToolDecision], Meta(min_length=1, max_length=1000)]


class ToolStateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the context after a decision or a result."""

    state: str


class ToolResultRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST …/tool-calls/{tool_call_id}/result`, by whoever runs an external tool."""

    content: Annotated[str, Meta(pattern=NO_NUL_PATTERN)]
    is_error: bool = False


TOOL_CALL = "tool_call"  # kinds of messages
TOOL_RESULT = "tool_result"
OUTCOME_UNKNOWN = "outcome_unknown"  # the error of a call that a crash interrupted
