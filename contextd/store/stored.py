"""Stored JSON as the types that it was written from.

An older version, another program or a broken disk may have left a value that is none. It must cost
nobody more than that one value: whoever reads gets what stands in for it, and the log says once which
row it is, without what is in it.
"""

from typing import Any, TypeVar

import msgspec
import structlog

from contextd.core.context import ApprovalPolicy, Tool
from contextd.core.message import Usage
from contextd.store.tables import AnyRow, Unreadable

T = TypeVar("T")

TOLD_MAX = 10_000  # values whose rows have been named in the log; then they are told anew

# Of a policy that cannot be read: nothing runs without a person.
STRICTEST_POLICY = ApprovalPolicy(mode="manual")

log = structlog.get_logger(__name__)
_told: set[tuple[str, object]] = set()


def stored(row: AnyRow, name: str, form: Any, otherwise: Any = None) -> Any:
    """The row's column as a `form`, or `otherwise` where it is null or cannot be read."""
    value = getattr(row, name)
    if value is None:
        return otherwise
    if not isinstance(value, Unreadable):
        try:
            return msgspec.convert(value, form)
        except (msgspec.ValidationError, RecursionError):
            pass
    _tell(row, name)
    return otherwise


def stored_object(row: AnyRow, name: str) -> dict[str, Any]:
    """The row's column as a JSON object; an empty one where it cannot be read."""
    value = getattr(row, name)
    if isinstance(value, dict) and not isinstance(value, Unreadable):
        return value  # as it is: most lists have several in each row
    _tell(row, name)
    return {}


def stored_usage(row: AnyRow) -> Usage | None:
    """What the row says of tokens, each number as far as it can be read."""
    if row.usage is None:
        return None
    usage = None if isinstance(row.usage, Unreadable) else Usage.read(row.usage)
    if usage is None or msgspec.to_builtins(usage) != row.usage:
        _tell(row, "usage")
    return usage


def stored_phases(row: AnyRow) -> dict[str, int]:
    """The milliseconds that the turn spent in each state."""
    phases: dict[str, int] = stored(row, "phases", dict[str, int], {})
    return phases


def stored_policy(row: AnyRow) -> ApprovalPolicy:
    """The context's approval policy; the strictest where it cannot be read."""
    policy: ApprovalPolicy = stored(row, "approval_policy", ApprovalPolicy, STRICTEST_POLICY)
    return policy


def stored_tools(row: AnyRow) -> str | list[Any]:
    """The context's `tools`: names and declarations, without those that cannot be read."""
    if isinstance(row.tools, str):
        return row.tools
    try:
        good = msgspec.convert(row.tools, list[Tool])
    except (msgspec.ValidationError, RecursionError):
        _tell(row, "tools")
        found = row.tools if isinstance(row.tools, list) else ()
        good = [tool for one in found for tool in _as_tool(one)]
    tools: list[Any] = msgspec.to_builtins(good)
    return tools


def _as_tool(value: Any) -> list[Tool]:
    try:
        return [msgspec.convert(value, Tool)]
    except (msgspec.ValidationError, RecursionError):
        return []


def _tell(row: AnyRow, name: str) -> None:
    """Once for each value: a list that is read every second would fill the log."""
    id_ = getattr(row, "id", None) or row.revision
    if (name, id_) in _told:
        return
    if len(_told) >= TOLD_MAX:
        _told.clear()
    _told.add((name, id_))
    log.error("a stored value cannot be read; it is left out", column=name, row=id_)
