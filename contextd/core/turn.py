"""Turns: everything from one user message to idle again (§6), and the journal of steps (§5)."""

from enum import StrEnum

import msgspec

from contextd.core.message import Problem, Usage
from contextd.core.values import Id, JsonObject, Timestamp


class TurnStatus(StrEnum):
    """Where a turn is. `queued` waits for its start; the last three are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the conversation the model was not shown, for want of room; `tokens` as counted here."""

    turns: int
    messages: int
    tokens: int = 0


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. `phases` holds the milliseconds spent in each state so far.

    `finish_reason` is that of its last answer, also where that wrote nothing.
    """

    id: str
    context_id: str
    branch: str
    status: TurnStatus
    attempt: int
    retry_of: str | None
    started_at: Timestamp | None
    ended_at: Timestamp | None
    first_chunk_ms: int | None
    phases: dict[str, int]
    message_ids: list[str]
    finish_reason: str | None
    usage: Usage | None
    error: Problem | None
    left_out: LeftOut | msgspec.UnsetType = msgspec.UNSET


class TurnPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of turns, oldest first."""

    items: list[Turn]
    next_cursor: str | None


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the machine. `duration_ms` is the time that was spent in `from_state`."""

    revision: int
    turn_id: str | None
    trigger: str
    from_state: str
    to_state: str
    at: Timestamp
    duration_ms: int
    detail: JsonObject


class JournalPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the journal, oldest first."""

    items: list[JournalEntry]
    next_cursor: str | None


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts/{id}/cancel`; with `turn_id` only that turn is meant."""

    turn_id: Id | None = None


class CancelAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The state after the cancel, and which turn it ended (null: none, and nothing changed)."""

    state: str
    cancelled_turn_id: str | None


class RetryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts/{id}/retry`, and of one turn; `from_start` leaves out what was tried before."""

    from_start: bool = False


class RetryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The new turn that tries the failed one again."""

    turn_id: str
    state: str
    revision: int
