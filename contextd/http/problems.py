"""How refusals look on the wire: RFC 9457 problems, and the one map from codes to statuses (§1)."""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, SerializationException, ValidationException
from litestar.types import ExceptionHandlersMap, Send

from contextd.core.errors import (
    BranchActive,
    BranchNotFound,
    ContextBusy,
    ContextdError,
    ContextNotFound,
    FieldError,
    Forbidden,
    HeadTooLarge,
    IdTaken,
    IllegalTransition,
    InternalError,
    InvalidRequest,
    MessageClosed,
    MessageNotFound,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    QueueFull,
    SequenceConflict,
    SequenceGap,
    ShuttingDown,
    StaleProducer,
    ToolCallDecided,
    ToolCallNotFound,
    TurnNotFound,
    UnsupportedMediaType,
    WorkflowNotFound,
)
from contextd.core.values import ID_WORDS

log = structlog.get_logger(__name__)

T = TypeVar("T")

STATUSES: Mapping[type[ContextdError], int] = {
    InvalidRequest: 400,
    Forbidden: 403,
    ContextNotFound: 404,
    MessageNotFound: 404,
    BranchNotFound: 404,
    TurnNotFound: 404,
    WorkflowNotFound: 404,
    ToolCallNotFound: 404,
    NotFound: 404,
    MethodNotAllowed: 405,
    IdTaken: 409,
    IllegalTransition: 409,
    ContextBusy: 409,
    BranchActive: 409,
    ToolCallDecided: 409,
    SequenceGap: 409,
    SequenceConflict: 409,
    MessageClosed: 409,
    StaleProducer: 409,
    PayloadTooLarge: 413,
    UnsupportedMediaType: 415,
    QueueFull: 429,
    HeadTooLarge: 431,
    InternalError: 500,
    Overloaded: 503,
    ShuttingDown: 503,
}

RETRY_AFTER_S = {429: 5, 503: 1}
PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:contextd:problem:"


def problem(error: ContextdError) -> tuple[int, bytes, dict[str, str]]:
    """The status, the body and the headers of a refusal."""
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    body = {
        "type": TYPE_PREFIX + error.code,
        "title": error.title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        **error.facts,
    }
    headers = {}
    if status in RETRY_AFTER_S:
        headers["retry-after"] = str(RETRY_AFTER_S[status])
    return status, msgspec.json.encode(body), headers


def problem_response(
    error: ContextdError, headers: Mapping[str, str] | None = None
) -> Response[bytes]:
    """A refusal as Litestar sends it."""
    status, body, own = problem(error)
    return Response(
        body,
        status_code=status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers={**own, **(headers or {}), "cache-control": "no-store"},
    )


async def send_problem(
    send: Send,
    error: ContextdError,
    extra: Mapping[str, str] | None = None,
    *,
    last: bool = True,
) -> None:
    """A refusal where no framework stands between. `last` false: the caller ends the answer."""
    status, body, headers = problem(error)
    headers |= {
        "content-type": PROBLEM_MEDIA_TYPE,
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **(extra or {}),
    }
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": not last})


def raw_problem(error: ContextdError, fields: bytes) -> bytes:
    """A refusal as HTTP/1.1, where no application stands between; `fields`: more header lines."""
    status, body, headers = problem(error)
    headers |= {"content-type": PROBLEM_MEDIA_TYPE, "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return (first + lines).encode() + fields + b"\r\n" + body


def _on_refusal(_: Request[Any, Any, Any], error: ContextdError) -> Response[bytes]:
    return problem_response(error)


def _on_depth(_: Request[Any, Any, Any], __: RecursionError) -> Response[bytes]:
    """The decoder gives up on JSON that is nested a thousand deep."""
    return problem_response(InvalidRequest.of("body", "nested too deeply"))


def _on_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals, in our words."""
    headers = {}
    refusal: ContextdError
    match error.status_code:
        case 404:
            refusal = NotFound("There is nothing at this path.")
        case 405:
            refusal = MethodNotAllowed(f"{request.method} is not possible here.")
            headers["allow"] = (error.headers or {}).get("allow", "")
        case 413:
            refusal = PayloadTooLarge(request.app.state.request_bytes_max)
        case 415:
            refusal = UnsupportedMediaType("The body must be application/json.")
        case status if status >= 500:
            return _on_defect(request, error)
        case _:
            refusal = InvalidRequest(*_field_errors(error))
    return problem_response(refusal, headers)


def _on_defect(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """What nobody foresaw: the log gets everything, the client a code."""
    log.error("a request failed by a defect", path=request.scope["path"], exc_info=error)
    return problem_response(InternalError())


_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`")
_OTHER_NAMES = {
    "states": "state",
    "statuses": "status",
}  # `state` means something else in a Litestar signature
_PATTERNS = {
    "64}": f"must be {ID_WORDS}",
    "[^\\": "must not contain U+0000",
}
_AT = re.compile(r" - at `\$\.?([^`]*)`$")


def explain(message: str, fallback: str = "body") -> FieldError:
    """msgspec's sentence, with the field that it is about by itself."""
    place = _AT.search(message)
    where = (place.group(1) if place else "").removeprefix("data").removeprefix(".")
    text = _AT.sub("", message)
    for pattern in (_UNKNOWN_FIELD, _MISSING_FIELD):
        if named := pattern.search(text):
            named_field = named.group(1)
            if named_field != "data":  # the body itself, by Litestar's name for it
                where = f"{where}.{named_field}" if where else named_field
    name = _OTHER_NAMES.get(where.partition("[")[0], where)
    return FieldError(field=name or fallback, message=_plainly(text))


def decode_body(decode: Callable[[bytes], T], body: bytes) -> T:
    """What `decode`, a decoder of msgspec, makes of a body. Raises `InvalidRequest`."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest.of("body", "not valid JSON") from None
    except RecursionError:
        raise InvalidRequest.of("body", "nested too deeply") from None


def _plainly(message: str) -> str:
    """Patterns in words."""
    for pattern, words in _PATTERNS.items():
        if pattern in message:
            return words
    return message


def _field_errors(error: HTTPException) -> list[FieldError]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, msgspec.ValidationError):
            return [explain(str(cause))]
        if isinstance(cause, msgspec.DecodeError | SerializationException):
            return [FieldError(field="body", message="not valid JSON")]
        cause = cause.__cause__
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        return [
            FieldError(
                field=_field_name(str(entry.get("key") or "")),
                message=_plainly(str(entry.get("message", ""))),
            )
            for entry in error.extra
        ]
    return [FieldError(field="request", message=error.detail)]


def _field_name(key: str) -> str:
    """Litestar calls the body `data`."""
    name = key.removeprefix("data").removeprefix(".").partition("[")[0] or "body"
    return _OTHER_NAMES.get(name, name)


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    ContextdError: _on_refusal,
    HTTPException: _on_http,
    RecursionError: _on_depth,
    Exception: _on_defect,
}
