"""`GET …/content`: the pull (§3.3). The hottest route: the live tail is answered without an await.

It is a bare ASGI handler, because that is what the pull of a few new chunks costs; the same reason
keeps it to one pass over the headers and no Request object.
"""

from typing import Any

import msgspec
from litestar.types import HTTPScope, Receive, Send

from contextd.core.errors import InvalidRequest
from contextd.core.message import Pull, RangePull
from contextd.core.values import SEQUENCE_MAX
from contextd.http.accept import best_type
from contextd.http.leaving import unless_gone
from contextd.http.query import check_path, number, parse_query, whole_number
from contextd.service import Content
from contextd.service.content import is_final
from contextd.store.reader import ContentSlice

PARAMETERS = frozenset({"from_sequence", "to_sequence", "wait"})
WAIT_S_MAX = 30
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain"

_FOR_EVER = (b"cache-control", b"public, max-age=31536000, immutable")
_ASK_AGAIN = (b"cache-control", b"no-cache")
_VARY = (b"vary", b"Accept, Origin, Authorization")
_TYPES = {
    JSON_TYPE: (b"content-type", b"application/json"),
    TEXT_TYPE: (b"content-type", b"text/plain; charset=utf-8"),
}
_encode = msgspec.json.Encoder().encode


class PullContent:
    """Answers GET and HEAD of `/contexts/{context_id}/messages/{message_id}/content`."""

    methods = "GET, HEAD"
    allow = "GET, HEAD"

    def __init__(self, content: Content) -> None:
        self._content = content

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """`scope["path_params"]` holds the two ids. Raises `ContextdError` before it answers."""
        path = scope["path_params"]
        context_id, message_id = path["context_id"], path["message_id"]
        content = self._content
        start, end, wait_s = _range(scope["query_string"])
        found = None if wait_s else content.live(context_id, message_id, start, end)
        if found is None:
            check_path(path)
            if wait_s:
                waiting = content.wait(context_id, message_id, start=start, end=end, wait_s=wait_s)
                found = await unless_gone(receive, waiting)
                if found is None:
                    return
            else:
                found = await content.pull(context_id, message_id, start=start, end=end)
        await _answer(scope, send, content.database_id, start, end, bool(wait_s), found)


def _range(raw: bytes) -> tuple[int, int | None, float]:
    """from_sequence, to_sequence and wait. Raises `InvalidRequest`."""
    if not raw:
        return 0, None, 0.0
    name, _, digits = raw.partition(b"=")
    if name == b"from_sequence" and digits.isdigit() and digits[0] != 48 and len(digits) < 16:
        return int(digits), None, 0.0  # what nearly every pull looks like
    values = parse_query(raw, PARAMETERS)
    start = whole_number(values, "from_sequence", default=0)
    end = whole_number(values, "to_sequence", default=SEQUENCE_MAX)
    if end < start:
        raise InvalidRequest.of("to_sequence", "must not be below from_sequence")
    wait_s = number(values, "wait", default=0.0, least=0, most=WAIT_S_MAX)
    return start, end if "to_sequence" in values else None, wait_s


async def _answer(
    scope: HTTPScope,
    send: Send,
    database_id: str,
    start: int,
    end: int | None,
    waited: bool,
    found: ContentSlice,
) -> None:
    accept = if_none_match = None
    for name, value in scope["headers"]:
        if name == b"accept":
            accept = value if accept is None else accept + b"," + value
        elif name == b"if-none-match":
            if_none_match = value if if_none_match is None else if_none_match + b"," + value
    media_type = _negotiate(accept)
    final = is_final(found.status, found.sequence, found.head)
    reached = end is not None and found.sequence == end <= found.head
    etag = _etag(database_id, start, end, media_type, found)
    fields: list[tuple[bytes, bytes]] = [
        (b"etag", etag),
        _FOR_EVER if reached or (final and end is None) else _ASK_AGAIN,
        _VARY,
    ]
    if if_none_match is not None and not waited and _matches(if_none_match, etag):
        await send({"type": "http.response.start", "status": 304, "headers": fields})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    fields.append(_TYPES[media_type])
    if media_type == JSON_TYPE:
        body = _body(scope["path_params"], start, end, final, found)
    else:
        body = found.content.encode()
        fields += _positions(end, final, found)
    fields.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    if scope["method"] == "HEAD":
        body = b""
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _negotiate(accept: bytes | None) -> str:
    if accept is None or accept in (b"*/*", b"application/json"):
        return JSON_TYPE
    return best_type(accept.decode("latin-1"), (JSON_TYPE, TEXT_TYPE))


def _etag(
    database_id: str, start: int, end: int | None, media_type: str, found: ContentSlice
) -> bytes:
    """Strong, from what decides the bytes: which message, which range, and how far it has got.

    A bounded answer does not depend on the head, so that its tag stays good while the message grows.
    """
    position = f"{found.message_key}.{start}-{found.sequence}"
    if end is None:
        position += f".{found.head}.{found.status[:2]}"
    return f'"{database_id}.{position}.{media_type[0]}"'.encode()


def _matches(if_none_match: bytes, etag: bytes) -> bool:
    tags = (tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b","))
    return any(tag in (etag, b"*") for tag in tags)


def _body(
    path: dict[str, Any], start: int, end: int | None, final: bool, found: ContentSlice
) -> bytes:
    if end is not None:
        return _encode(
            RangePull(
                context_id=path["context_id"],
                message_id=path["message_id"],
                from_sequence=start,
                sequence=found.sequence,
                content=found.content,
            )
        )
    return _encode(
        Pull(
            context_id=path["context_id"],
            message_id=path["message_id"],
            from_sequence=start,
            sequence=found.sequence,
            content=found.content,
            head_sequence=found.head,
            status=found.status,  # type: ignore[arg-type]
            final=final,
        )
    )


def _positions(end: int | None, final: bool, found: ContentSlice) -> list[tuple[bytes, bytes]]:
    fields = [(b"contextd-sequence", b"%d" % found.sequence)]
    if end is None:
        fields += [
            (b"contextd-head-sequence", b"%d" % found.head),
            (b"contextd-status", found.status.encode()),
            (b"contextd-final", b"true" if final else b"false"),
        ]
    return fields
