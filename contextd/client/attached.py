"""A context's signals over as many connections as it takes (§4)."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import msgspec
from httpx_sse import EventSource, ServerSentEvent, aconnect_sse

from contextd.client.errors import ApiError, pause_s, reason_of
from contextd.client.events import Disconnected
from contextd.client.wire import Wire, path_of
from contextd.core import signal

HEARTBEATS_MISSED = 2.5  # after so many the connection counts as dead

_SIGNALS: msgspec.json.Decoder[signal.Signal] = msgspec.json.Decoder(signal.Signal)


async def attached(
    wire: Wire, context_id: str, cursor: str | None, *, throttle_ms: int, heartbeat_s: float
) -> AsyncGenerator[signal.Signal | Disconnected]:
    """The signals from `cursor` on, as `Client.signals` promises them."""
    failures = 0
    while True:
        asked_s = 0.0
        try:
            async with _stream(wire, context_id, cursor, throttle_ms, heartbeat_s) as frames:
                reason = "the server ended the stream"
                async for frame in frames.aiter_sse():
                    cursor = frame.id or cursor
                    asked_s = asked_s if frame.retry is None else frame.retry / 1000
                    if (told := _decode(frame)) is not None:
                        failures = 0
                        yield told
                        if (
                            isinstance(told, signal.StateChanged)
                            and told.new_state == signal.DELETED_STATE
                        ):
                            return
        except httpx.TransportError as error:
            reason = reason_of(error)
        except ApiError as error:
            if not error.passing:
                raise
            reason, asked_s = str(error), error.retry_after_s
        failures += 1
        wait_s = pause_s(failures, asked_s)
        yield Disconnected(reason=reason, retry_s=round(wait_s, 3))
        await asyncio.sleep(wait_s)


@asynccontextmanager
async def _stream(
    wire: Wire, context_id: str, cursor: str | None, throttle_ms: int, heartbeat_s: float
) -> AsyncGenerator[EventSource]:
    params = {"heartbeat": f"{heartbeat_s:g}", "throttle_ms": throttle_ms}
    headers = {"Last-Event-ID": cursor} if cursor else {}
    timeout = httpx.Timeout(wire.timeout_s, read=HEARTBEATS_MISSED * heartbeat_s)
    path = path_of(context_id, "stream")
    async with aconnect_sse(
        wire.http, "GET", path, params=params, headers=headers, timeout=timeout
    ) as frames:
        if frames.response.status_code != 200:
            await frames.response.aread()
            raise ApiError.of(frames.response)
        yield frames


def _decode(frame: ServerSentEvent) -> signal.Signal | None:
    """The signal in a frame; none in a bare `retry:`, or in what a newer server may send."""
    try:
        return _SIGNALS.decode(frame.data)
    except msgspec.DecodeError:
        return None
