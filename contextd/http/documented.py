"""What routes share in the OpenAPI document: parameters, and the problems that they answer."""

from typing import Annotated

import msgspec
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from contextd.core.values import SEQUENCE_MAX
from contextd.http.problems import PROBLEM_MEDIA_TYPE
from contextd.service.wire import CURSOR_PATTERNS

PAGE_MAX = 1000

Limit = Annotated[int, QueryParameter(ge=1, le=PAGE_MAX, description="Items of a page")]
_CURSOR = "`next_cursor` of the page before"

# Optional strings default to "": for None Litestar would take the text `null`. What a string must look
# like is checked by the guard, because Litestar would hold the default against a pattern too.
Cursor = Annotated[
    str,
    QueryParameter(description=_CURSOR, schema_extra={"pattern": CURSOR_PATTERNS[1]}),
]
PlaceCursor = Annotated[
    str,
    QueryParameter(description=_CURSOR, schema_extra={"pattern": CURSOR_PATTERNS[2]}),
]
Position = Annotated[
    int,
    QueryParameter(
        ge=0, le=SEQUENCE_MAX, description="What the reader holds; what follows is answered"
    ),
]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal (RFC 9457). `code` is stable; its facts stand beside it."""

    type: str
    title: str
    status: int
    detail: str
    code: str


_DESCRIPTIONS = {
    400: "invalid_request",
    403: "forbidden",
    404: "Not found: no such context, message, branch, turn or path",
    405: "method_not_allowed",
    409: "A conflict with what is there; `code` says which",
    413: "payload_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    503: "overloaded or shutting_down",
}


def also(status: int, type_: type, description: str) -> dict[int, ResponseSpec]:
    """Another good answer of an operation, for its `responses`."""
    return {status: ResponseSpec(type_, description=description, generate_examples=False)}


def refuses(*statuses: int) -> dict[int, ResponseSpec]:
    """The problems of an operation, for its `responses`.

    Any can meet an unknown parameter, a host that is not served, and a server that stops.
    """
    return {
        status: ResponseSpec(
            Problem,
            description=_DESCRIPTIONS[status],
            media_type=PROBLEM_MEDIA_TYPE,
            generate_examples=False,
        )
        for status in sorted({*statuses, 400, 403, 503})
    }


def tagged(tag: str, *handlers: HTTPRouteHandler) -> tuple[HTTPRouteHandler, ...]:
    """Handlers as one chapter of the document. (A `Router` each could not share their paths.)"""
    for handler in handlers:
        handler.tags = [tag]
    return handlers
