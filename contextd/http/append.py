"""`POST …/chunks`: a producer's chunks, as one JSON batch or as lines of a long-lived body (§7).

A bare ASGI handler: a chunk a request is what simple producers do, and a framework would cost more
than the chunk.
"""

from collections.abc import Sequence

import msgspec
from litestar.types import HTTPScope, Receive, Send

from contextd.core.errors import (
    InvalidRequest,
    PayloadTooLarge,
    TooManyChunks,
    UnsupportedMediaType,
)
from contextd.core.producing import AppendAnswer, AppendRequest, ChunkInput
from contextd.http.body import BodyLimits, read_body
from contextd.http.line_body import LINES_TYPE, LineBodies
from contextd.http.lines import NUL_ESCAPE
from contextd.http.problems import decode_body
from contextd.http.query import check_path, parse_query
from contextd.service import Producers
from contextd.settings import Settings
from contextd.store.appends import utf8_bytes

JSON_TYPE = "application/json"

_decode = msgspec.json.Decoder(AppendRequest).decode
_encode = msgspec.json.Encoder().encode


class AppendChunks:
    """Answers POST of `/contexts/{context_id}/messages/{message_id}/chunks`."""

    methods = "POST"
    allow = "GET, POST"

    def __init__(self, producers: Producers, settings: Settings) -> None:
        self._producers = producers
        self._limits = BodyLimits.of(settings, long_text=True)
        self._chunk_bytes_max = settings.chunk_bytes_max
        self._chunks_max = settings.batch_chunks_max
        self._bodies = LineBodies(producers, settings)

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """`scope["path_params"]` holds the two ids. Raises `ContextdError` before it answers."""
        if scope["query_string"]:
            parse_query(scope["query_string"], frozenset())
        check_path(scope["path_params"])
        media_type = _media_type(scope)
        if media_type == LINES_TYPE:
            answer = await self._bodies.store(scope, receive, send)
            if answer is not None:
                await send_answer(send, answer)
            return
        if media_type != JSON_TYPE:
            raise UnsupportedMediaType(f"The body must be {JSON_TYPE} or {LINES_TYPE}.")
        body = await read_body(scope, receive, self._limits)
        if body is not None:  # else the producer has gone
            await send_answer(send, await self._append(scope, body))

    async def _append(self, scope: HTTPScope, body: bytes) -> AppendAnswer:
        request = decode_request(body)
        given = request.chunks
        if given is None:
            given = [ChunkInput(content=request.content or "", sequence=request.sequence)]
        if len(given) > self._chunks_max:
            raise TooManyChunks(self._chunks_max)
        texts = [chunk.content for chunk in given]
        sizes = [utf8_bytes(text) for text in texts]
        if max(sizes) > self._chunk_bytes_max:
            raise PayloadTooLarge(self._chunk_bytes_max, "a chunk")
        live = await self._producers.find(**scope["path_params"])
        appended = await self._producers.append(
            live,
            epoch=request.epoch,
            texts=texts,
            sizes=sizes,
            sequences=[chunk.sequence for chunk in given],
        )
        return AppendAnswer(
            message_id=live.message_id,
            sequence=appended.head,
            accepted=len(appended.texts),
            duplicates=appended.duplicates,
        )


def decode_request(body: bytes) -> AppendRequest:
    """The batch. Raises `InvalidRequest` naming what is wrong."""
    request = decode_body(_decode, body)
    if request.chunks is None:
        if request.content is None:
            raise InvalidRequest.of("chunks", "give either chunks or content")
    elif request.content is not None or request.sequence is not None:
        field = "content" if request.content is not None else "sequence"
        raise InvalidRequest.of(field, "give either chunks or content")
    if NUL_ESCAPE in body:
        _refuse_nul(request.chunks, request.content)
    return request


def _refuse_nul(chunks: Sequence[ChunkInput] | None, content: str | None) -> None:
    if content is not None and "\0" in content:
        raise InvalidRequest.of("content", "must not contain U+0000")
    for index, chunk in enumerate(chunks or ()):
        if "\0" in chunk.content:
            raise InvalidRequest.of(f"chunks[{index}].content", "must not contain U+0000")


def _media_type(scope: HTTPScope) -> str:
    """Raises `UnsupportedMediaType` for a body that would have to be unpacked first."""
    media_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            media_type = value
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("The body must not be compressed.")
    return media_type.partition(b";")[0].strip().lower().decode("latin-1")


async def send_answer(send: Send, answer: AppendAnswer) -> None:
    """200, with where the message stands."""
    body = _encode(answer)
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})
