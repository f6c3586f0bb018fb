"""Contexts: one conversation each, and how it is configured (§2)."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from contextd.core.message import OnBusy, Usage
from contextd.core.values import Document, Id, JsonObject, Label, Timestamp

Mode: TypeAlias = Literal["act", "plan"]

MAIN_BRANCH = "main"


class ApprovalPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which tool calls wait for a person, and how far a turn may go (§8)."""

    mode: Literal["manual", "auto"] = "auto"
    allow: list[Label] = msgspec.field(default_factory=list)
    max_depth: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    max_calls: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 20


class ExternalTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that is executed by whoever posts its result (§8)."""

    name: Id
    description: Document
    parameters: JsonObject
    external: Literal[True]
    requires_approval: bool = False
    read_only: bool = False


Tool: TypeAlias = Id | ExternalTool
Tools: TypeAlias = Annotated[list[Tool], msgspec.Meta(max_length=256)]


class ContextRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /contexts`: everything is optional."""

    id: Id | None = None
    title: Label | None = None
    mode: Mode = "act"
    system_prompt: Document | None = None
    provider: Label | None = None
    model: Label | None = None
    tools: Tools | None = None  # all that the server has
    approval_policy: ApprovalPolicy = msgspec.field(default_factory=ApprovalPolicy)
    on_busy: OnBusy = "enqueue"
    metadata: JsonObject = msgspec.field(default_factory=dict)


class ApprovalPolicyPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of a merge patch; null puts a member back to its default."""

    mode: Literal["manual", "auto"] | UnsetType | None = UNSET
    allow: list[Label] | UnsetType | None = UNSET
    max_depth: Annotated[int, msgspec.Meta(ge=0, le=100)] | UnsetType | None = UNSET
    max_calls: Annotated[int, msgspec.Meta(ge=0, le=1000)] | UnsetType | None = UNSET


class ContextPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PATCH /contexts/{id}`: a JSON merge patch; null puts a member back to its default."""

    title: Label | UnsetType | None = UNSET
    mode: Mode | UnsetType | None = UNSET
    system_prompt: Document | UnsetType | None = UNSET
    provider: Label | UnsetType | None = UNSET
    model: Label | UnsetType | None = UNSET
    tools: Tools | UnsetType | None = UNSET
    approval_policy: ApprovalPolicyPatch | UnsetType | None = UNSET
    on_busy: OnBusy | UnsetType | None = UNSET
    metadata: JsonObject | UnsetType | None = UNSET
    active_branch: Id | UnsetType = UNSET


class OpenMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message that still grows, as the Context names it."""

    message_id: str
    role: str
    kind: str
    current_sequence: int


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as it is now. `stream_cursor` attaches a stream to just this snapshot (§4.1)."""

    id: str
    title: str | None
    state: str
    state_detail: JsonObject
    revision: int
    record_revision: int
    stream_cursor: str
    mode: Mode
    active_branch: str
    system_prompt: str | None
    provider: str
    model: str | None
    tools: list[Tool]
    approval_policy: ApprovalPolicy
    on_busy: OnBusy
    metadata: JsonObject
    message_count: int
    open_messages: list[OpenMessage]
    pending_tool_calls: list[str]
    queued_messages: int
    can_send: bool
    created_at: Timestamp
    updated_at: Timestamp
    usage: Usage | UnsetType = UNSET


class ContextPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of contexts, newest activity first."""

    items: list[Context]
    next_cursor: str | None
