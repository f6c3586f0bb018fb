"""The four signals, and no other (§4). None has a field for text: the type system says so."""

from typing import TypeAlias

import msgspec

from contextd.core.values import Timestamp


class StateChanged(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="state_changed"
):
    """The context changed; `new_state` is its state at `revision` (`deleted` when it is gone)."""

    context_id: str
    new_state: str
    revision: int
    record_revision: int
    timestamp: Timestamp


class ContentDelta(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="content_delta"
):
    """The message has chunks up to `current_sequence`."""

    context_id: str
    message_id: str
    current_sequence: int
    role: str
    kind: str
    timestamp: Timestamp


class MessageCompleted(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message_completed"
):
    """The message is closed at `final_sequence`, and `status` says how."""

    context_id: str
    message_id: str
    final_sequence: int
    role: str
    kind: str
    status: str
    revision: int
    timestamp: Timestamp


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="heartbeat"):
    """Nothing happened, and the connection lives."""

    timestamp: Timestamp


Signal: TypeAlias = StateChanged | ContentDelta | MessageCompleted | Heartbeat

DELETED_STATE = "deleted"
