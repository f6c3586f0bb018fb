"""What a transaction did, to be told once it is durable: levels for readers, turns for their owner."""

import msgspec

from contextd.core.message import MessageStatus


class OpenedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it was inserted, with the chunks that it began with."""

    key: int
    id: str
    role: str
    kind: str
    texts: list[str]
    ends: list[int]
    status: MessageStatus
    produced: bool


class ClosedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message at its end."""

    key: int
    id: str
    role: str
    kind: str
    status: MessageStatus
    final: int


class Notice(msgspec.Struct, kw_only=True):
    """One change as readers hear of it: its revision, and the levels after it."""

    revision: int
    record_revision: int
    state: str
    opened: list[OpenedMessage] = []
    closed: list[ClosedMessage] = []


class StartedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that runs, and by which fence its owner writes."""

    context_id: str
    id: str
    key: int
    fence: int
