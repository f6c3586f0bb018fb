"""Strict query parameters: unknown, repeated and out-of-range ones are named, never ignored (§1)."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import parse_qsl

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler

from contextd.core.errors import (
    ContextdError,
    ContextNotFound,
    FieldError,
    InvalidRequest,
    MessageNotFound,
    NotFound,
    TurnNotFound,
    UnsupportedMediaType,
)
from contextd.core.values import ID_PATTERN, SEQUENCE_MAX

_ID = re.compile(ID_PATTERN)
_DIGITS = re.compile("[0-9]{1,16}")
_MISSING: Mapping[str, type[Any]] = {
    "context_id": ContextNotFound,
    "message_id": MessageNotFound,
    "turn_id": TurnNotFound,
}
JSON_TYPES = frozenset({"application/json", "application/merge-patch+json"})
_NOT_QUERY = frozenset({"request", "data", "state"})
_REPEATABLE = frozenset({"state"})


def parse_query(raw: bytes, known: Collection[str]) -> dict[str, str]:
    """The parameters by name. Raises `InvalidRequest` naming each that is unknown or repeated."""
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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidRequest.of(name, f"must be a number from {least:g} to {most:g}")
    return value


def check_path(path_params: Mapping[str, Any]) -> None:
    """What is no id names nothing, so it need not be asked of the database."""
    for name, value in path_params.items():
        if not _ID.fullmatch(str(value)):
            raise missing(name, str(value))


def missing(name: str, value: str) -> ContextdError:
    """The 404 for a path parameter."""
    known = _MISSING.get(name)
    return NotFound("There is nothing at this path.") if known is None else known(value)


def check_request(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """A guard for every Litestar route: ids that can exist, and only declared parameters."""
    if not isinstance(handler, HTTPRouteHandler):
        return
    check_path(connection.path_params)
    _check_media_type(connection)
    raw = connection.scope["query_string"]
    if raw:
        parse_query(raw, _declared(handler) - connection.path_params.keys())


def _declared(handler: HTTPRouteHandler) -> set[str]:
    """The names of the handler's query parameters (and of its path's)."""
    fields = handler.parsed_fn_signature.parameters.values()
    given = _NOT_QUERY | handler.resolve_dependencies().keys()
    return {
        getattr(field.kwarg_definition, "name", None) or field.name
        for field in fields
        if field.name not in given
    }


def _check_media_type(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """A body that is not said to be JSON is not guessed at. Raises `UnsupportedMediaType`."""
    headers = connection.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    media_type = (headers.get("content-type") or "").partition(";")[0].strip().lower()
    if media_type not in JSON_TYPES:
        raise UnsupportedMediaType("The body must be application/json.")
