"""Branches: names for leaves of the tree of messages, and what is brought from one to another (§9)."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from contextd.core.values import Id, Timestamp

MERGE_NAMED_MAX = 1000

# Why a message was not merged.
LeftOutReason: TypeAlias = Literal[
    "already_there", "not_on_source", "open", "queued", "retried", "tool_call"
]


class BranchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts/{id}/branches`. `from_message_id` null: an empty branch; absent: the active leaf."""

    name: Id
    from_message_id: Id | UnsetType | None = UNSET


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """A name for a leaf. The ids are null before the first message."""

    name: str
    active: bool
    from_message_id: str | None
    leaf_message_id: str | None
    created_at: Timestamp


class BranchPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of branches, oldest first."""

    items: list[Branch]
    next_cursor: str | None


class MergeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST …/branches/{branch}/merge`: without `message_ids`, all since the common ancestor."""

    source: Id
    message_ids: Annotated[list[Id], Meta(max_length=MERGE_NAMED_MAX)] | None = None


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was not merged, and why."""

    message_id: str
    reason: LeftOutReason


class MergeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`added`: the ids of the new messages in their order; each says in its metadata what it is of."""

    added: list[str]
    left_out: list[LeftOut]
