"""What a follower is told (§4.4). In JSON each names its `type`."""

from typing import TypeAlias

import msgspec


class Text(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """More of a message: exactly the text of chunks `from_sequence` + 1 … `sequence`."""

    message_id: str
    role: str
    kind: str
    from_sequence: int
    sequence: int
    content: str


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="closed"):
    """The message is closed, and all its text has been told."""

    message_id: str
    role: str
    kind: str
    status: str
    final_sequence: int


class Restarted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="restarted"):
    """The server has less than was told: forget this message's text, it comes again from 0."""

    message_id: str


class StateChange(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="state"):
    """The context's state; text signalled before it has been told. `deleted` is the end."""

    state: str
    revision: int


class Current(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="current"):
    """Attached, and everything that was there at that moment has been told."""


class Disconnected(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="disconnected"):
    """The stream broke off. It is attached again after `retry_s`; nothing is lost."""

    reason: str
    retry_s: float


Event: TypeAlias = Text | Closed | Restarted | StateChange | Current | Disconnected
