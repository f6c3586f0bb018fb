"""`GET /contexts/{id}/stream`: signals as server-sent events (§4).

One coroutine per stream writes; it waits in `Reader.take`, and each wake-up is one `send` of bytes that
were encoded once for all readers. A second, tiny task waits for the connection to go.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Literal, cast

import msgspec
from litestar.types import HTTPScope, Receive, Send

from contextd.core.errors import InvalidRequest
from contextd.http.leaving import until_gone
from contextd.http.query import check_path, number, parse_query, whole_number
from contextd.service import Streams
from contextd.settings import Settings
from contextd.signals.reader import Reader

PARAMETERS = frozenset({"throttle_ms", "heartbeat", "framing", "last_event_id"})
# A reader that stops reading must not be able to hide megabytes of it in kernel buffers.
SEND_BUFFER_BYTES = 16 * 1024

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a reader wants its signals."""

    throttle_s: float
    heartbeat_s: float
    framing: Literal["unnamed", "named"]
    cursor: str | None


class StreamSignals:
    """Answers GET of `/contexts/{context_id}/stream` until the reader goes or the stream ends."""

    methods = "GET"
    allow = "GET"

    def __init__(self, streams: Streams, settings: Settings) -> None:
        self._streams = streams
        self._settings = settings

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """`scope["path_params"]` holds the id. Raises `ContextdError` before it answers."""
        check_path(scope["path_params"])
        options = _options(scope, self._settings)
        context_id = scope["path_params"]["context_id"]
        reader = self._streams.subscribe(
            context_id,
            throttle_s=options.throttle_s,
            heartbeat_s=options.heartbeat_s,
            named=options.framing == "named",
        )
        try:
            async with aclosing(self._streams.attach(reader, context_id, options.cursor)) as blocks:
                # An unknown context is a 404, before the stream starts.
                first = await anext(blocks, b"")
                await _run(scope, receive, send, reader, first, blocks)
        finally:
            reader.close()


async def _run(
    scope: HTTPScope,
    receive: Receive,
    send: Send,
    reader: Reader,
    first: bytes,
    blocks: AsyncIterator[bytes],
) -> None:
    _limit_buffers(scope)
    task = asyncio.current_task()
    transport = _transport(scope)

    def cut_off() -> None:
        """The reader takes nothing: what is buffered for it is thrown away with its connection."""
        if transport is not None:
            transport.abort()
        elif task is not None:
            task.cancel()

    reader.on_stuck = cut_off
    gone = asyncio.create_task(_close_when_gone(receive, reader))
    try:
        await _serve(send, reader, first, blocks)
    except RuntimeError:
        # How the server's loop says that the connection went while it was written to.
        if transport is None or not transport.is_closing():
            raise
    finally:
        gone.cancel()


async def _serve(send: Send, reader: Reader, first: bytes, blocks: AsyncIterator[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await _write(send, reader, first)
    async for block in blocks:
        await _write(send, reader, block)
    while (news := await reader.take()) is not None:
        await _write(send, reader, news)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(send: Send, reader: Reader, block: bytes) -> None:
    if block:
        await send({"type": "http.response.body", "body": block, "more_body": True})
        reader.sent()


async def _close_when_gone(receive: Receive, reader: Reader) -> None:
    await until_gone(receive)
    reader.close()


def _transport(scope: HTTPScope) -> asyncio.Transport | None:
    """What the server's protocol left in the scope; None under another server."""
    return cast("asyncio.Transport | None", scope.get("contextd.transport"))


def _limit_buffers(scope: HTTPScope) -> None:
    transport = _transport(scope)
    if transport is None or transport.is_closing():
        return
    transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def _options(scope: HTTPScope, settings: Settings) -> StreamOptions:
    """Raises `InvalidRequest` naming the parameter that is wrong."""
    values = parse_query(scope["query_string"], PARAMETERS)
    framing = values.get("framing", "unnamed")
    if framing not in ("unnamed", "named"):
        raise InvalidRequest.of("framing", "must be 'named' or 'unnamed'")
    cursor = values.get("last_event_id")
    for name, value in scope["headers"]:
        if name == b"last-event-id":
            cursor = value.decode("latin-1")
    throttle_ms = whole_number(values, "throttle_ms", default=settings.throttle_ms, most=1000)
    return StreamOptions(
        throttle_s=throttle_ms / 1000,
        heartbeat_s=number(values, "heartbeat", default=settings.heartbeat_s, least=5, most=60),
        framing=framing,  # type: ignore[arg-type]
        cursor=cursor,
    )
