"""Strict query parameters: unknown, repeated and out-of-range ones are named, never ignored (§1)."""

import math
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, get_args
from urllib.parse import parse_qsl

import msgspec
from litestar.connection import ASGIConnection, Request
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.utils.scope.state import ScopeState

from contextd.core.context import ContextPatch, ContextRequest
from contextd.core.errors import (
    BranchNotFound,
    ContextdError,
    ContextNotFound,
    FieldError,
    InvalidRequest,
    MessageNotFound,
    NotFound,
    ToolCallNotFound,
    TurnNotFound,
    UnsupportedMediaType,
    WorkflowNotFound,
)
from contextd.core.message import SendRequest
from contextd.core.tool_call import DecisionsRequest, ToolResultRequest
from contextd.core.values import ID_PATTERN, ID_WORDS, SEQUENCE_MAX
from contextd.http.body import read_body
from contextd.http.problems import decode_body

_ID = re.compile(ID_PATTERN)
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")
_DIGITS = re.compile("0|[1-9][0-9]{0,15}")
_MISSING: Mapping[str, type[Any]] = {
    "context_id": ContextNotFound,
    "message_id": MessageNotFound,
    "turn_id": TurnNotFound,
    "branch": BranchNotFound,
    "tool_call_id": ToolCallNotFound,
    "workflow": WorkflowNotFound,
}
# Bodies with a text of any length; all others are small.
LONG_TEXT = (SendRequest, ToolResultRequest, DecisionsRequest, ContextRequest, ContextPatch)
PARAMETERS_MAX = 256
JSON_TYPES = frozenset({"application/json", "application/merge-patch+json"})
_NOT_QUERY = frozenset({"request", "data", "state"})
_WHOLE_NUMBERS = frozenset({"limit", "from_sequence", "since_revision"})
_TEXTS = {
    "cursor": ("[0-9.]+", "not a cursor of this list"),
    "branch": (ID_PATTERN, f"must be {ID_WORDS}"),
    "include": ("content", "must be 'content'"),
}
_REPEATABLE = frozenset({"state", "status"})


def parse_query(raw: bytes, known: Collection[str]) -> dict[str, str]:
    """The parameters by name. Raises `InvalidRequest` naming each that is unknown or repeated."""
    if raw.count(b"&") >= PARAMETERS_MAX:
        raise InvalidRequest.of("query", f"must have at most {PARAMETERS_MAX} parameters")
    values: dict[str, str] = {}
    errors = []
    for name, value in parse_qsl(raw.decode("latin-1"), keep_blank_values=True):
        if name not in known:
            errors.append(FieldError(field=name, message="unknown query parameter"))
        elif name in values and name not in _REPEATABLE:
            errors.append(FieldError(field=name, message="given more than once"))
        values[name] = value
    if errors:
        raise InvalidRequest(*errors)
    return values


def whole_number(
    values: Mapping[str, str], name: str, *, default: int, least: int = 0, most: int = SEQUENCE_MAX
) -> int:
    """A parameter that is a whole number from `least` to `most`."""
    text = values.get(name)
    if text is None:
        return default
    number = int(text) if _DIGITS.fullmatch(text) else -1
    if not least <= number <= most:
        raise InvalidRequest.of(name, f"must be a whole number from {least} to {most}")
    return number


def number(
    values: Mapping[str, str], name: str, *, default: float, least: float, most: float
) -> float:
    """A parameter that is a number from `least` to `most`."""
    text = values.get(name)
    if text is None:
        return default
    value = float(text) if _DECIMAL.fullmatch(text) else math.nan
    if not least <= value <= most:
        raise InvalidRequest.of(name, f"must be a number from {least:g} to {most:g}")
    return value


def check_path(path_params: Mapping[str, Any]) -> None:
    """What is no id names nothing, so it need not be asked of the database."""
    for name, value in path_params.items():
        if not _ID.fullmatch(str(value)):
            raise missing(name, str(value))


def _check_new_id(path_params: Mapping[str, Any]) -> None:
    """The id of something that is to be made is not missing when it is wrong, but wrong."""
    if not _ID.fullmatch(str(path_params["message_id"])):
        raise InvalidRequest.of("message_id", f"must be {ID_WORDS}")


def missing(name: str, value: str) -> ContextdError:
    """The 404 for a path parameter."""
    known = _MISSING.get(name)
    return NotFound("There is nothing at this path.") if known is None else known(value)


async def check_request(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """A guard for every Litestar route: ids that can exist, declared parameters, exact types.

    Litestar by itself lets unknown parameters pass, reads `5.0` as 5, and in a body "false" as false.
    """
    if not isinstance(handler, HTTPRouteHandler):
        return
    if handler.http_methods == {"PUT"}:
        _check_new_id(connection.path_params)
    check_path(connection.path_params)
    raw = connection.scope["query_string"]
    if raw:
        values = parse_query(raw, _declared(handler) - connection.path_params.keys())
        for name in _WHOLE_NUMBERS & values.keys():
            whole_number(values, name, default=0)
        for name in _TEXTS.keys() & values.keys():
            pattern, words = _TEXTS[name]
            if not re.fullmatch(pattern, values[name]):
                raise InvalidRequest.of(name, words)
    if isinstance(connection, Request):
        await _check_body(connection, handler)


async def _check_body(request: Request[Any, Any, Any], handler: HTTPRouteHandler) -> None:
    """Raises `UnsupportedMediaType`, `PayloadTooLarge` or `InvalidRequest`."""
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    media_type = (headers.get("content-type") or "").partition(";")[0].strip().lower()
    if media_type not in JSON_TYPES:
        raise UnsupportedMediaType("The body must be application/json.")
    field = handler.parsed_data_field
    annotation = NoFields if field is None else field.annotation
    long_text = any(kind in LONG_TEXT for kind in (annotation, *get_args(annotation)))
    state = request.app.state
    limits = state.long_body if long_text else state.short_body
    body = await read_body(request.scope, request.receive, limits)
    if body is None:
        raise InvalidRequest.of("body", "the connection broke off")
    # Litestar finds it here, and reads and decodes nothing again.
    found = ScopeState.from_scope(request.scope)
    found.body, found.json = body, decode_body(_decoder(annotation).decode, body)


class NoFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a route that has none: nothing in it is ignored."""


@cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def _declared(handler: HTTPRouteHandler) -> set[str]:
    """The names of the handler's query parameters (and of its path's)."""
    fields = handler.parsed_fn_signature.parameters.values()
    given = _NOT_QUERY | handler.resolve_dependencies().keys()
    return {
        getattr(field.kwarg_definition, "name", None) or field.name
        for field in fields
        if field.name not in given
    }
