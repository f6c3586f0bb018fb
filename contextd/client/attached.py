"""A context's signals over as many connections as it takes (§4)."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

import httpx
import msgspec
from httpx_sse import EventSource, ServerSentEvent, aconnect_sse

from contextd.client.errors import UNEXPECTED, ApiError, ClientError, Tries, UnreachableError
from contextd.client.events import Disconnected
from contextd.client.wire import Wire, path_of
from contextd.core import signal
from contextd.core.values import Timestamp

HEARTBEATS_MISSED = 2.5  # after so many the connection counts as dead
STREAM_TYPE = "text/event-stream"

_SIGNALS: msgspec.json.Decoder[signal.Signal] = msgspec.json.Decoder(signal.Signal)


async def attached(
    wire: Wire, context_id: str, cursor: str | None, *, throttle_ms: int, heartbeat_s: float
) -> AsyncGenerator[signal.Signal | Disconnected]:
    """The signals from `cursor` on, as `Client.signals` promises them."""
    following = _Following(wire, context_id, cursor, throttle_ms, heartbeat_s)
    tries = Tries()
    while True:
        try:
            async with aclosing(following.attach()) as signals:
                async for told in signals:
                    tries.succeeded()
                    yield told
                    if _is_the_end(told):
                        return
            lost: ClientError = _EndedError(following.retry_s)
        except ClientError as error:
            if (end := following.end_in(error)) is not None:
                yield end
                return
            lost = error
        wait_s = tries.pause_s(lost)
        reason = lost.reason if isinstance(lost, UnreachableError) else str(lost)
        yield Disconnected(reason=reason, retry_s=round(wait_s, 3))
        await asyncio.sleep(wait_s)


class _EndedError(ClientError):
    """The server ended the stream, and said when to come back."""

    passing = True

    def __init__(self, retry_s: float) -> None:
        super().__init__("the server ended the stream")
        self.retry_after_s = retry_s


class _Following:
    """What lasts from one connection to the next. `retry_s`: as the newest one was told."""

    def __init__(
        self,
        wire: Wire,
        context_id: str,
        cursor: str | None,
        throttle_ms: int,
        heartbeat_s: float,
    ) -> None:
        self.retry_s = 0.0
        self._wire = wire
        self._context_id = context_id
        self._cursor = cursor
        self._params = {"heartbeat": f"{heartbeat_s:g}", "throttle_ms": throttle_ms}
        self._timeout = httpx.Timeout(wire.timeout_s, read=HEARTBEATS_MISSED * heartbeat_s)
        self._was_there = False
        self._revision = 0
        self._record_revision = 0

    async def attach(self) -> AsyncGenerator[signal.Signal]:
        """The signals of one connection, to its clean end. Raises `ClientError`."""
        self.retry_s = 0.0
        try:
            async with self._stream() as source, aclosing(source.aiter_sse()) as frames:
                async for frame in frames:
                    if (told := self._take(frame)) is not None:
                        yield told
        except httpx.RequestError as error:
            lost = UnreachableError.of(self._wire.base_url, error)
            lost.retry_after_s = self.retry_s
            raise lost from error

    def end_in(self, error: ClientError) -> signal.StateChanged | None:
        """The deletion, which happened while this was cut off: the context was there and is not."""
        gone = isinstance(error, ApiError) and error.code == "context_not_found"
        if not (gone and self._was_there):
            return None
        return signal.StateChanged(
            context_id=self._context_id,
            new_state=signal.DELETED_STATE,
            revision=self._revision + 1,
            record_revision=self._record_revision + 1,
            timestamp=_now(),
        )

    @asynccontextmanager
    async def _stream(self) -> AsyncGenerator[EventSource]:
        headers = {"Last-Event-ID": self._cursor} if self._cursor else {}
        path = path_of(self._context_id, "stream")
        async with aconnect_sse(
            self._wire.http,
            "GET",
            path,
            params=self._params,
            headers=headers,
            timeout=self._timeout,
        ) as source:
            if source.response.status_code != 200:
                await source.response.aread()
                raise ApiError.of(source.response)
            if STREAM_TYPE not in source.response.headers.get("content-type", ""):
                raise ApiError(200, UNEXPECTED, "The answer is no stream of events.", {})
            self._was_there = True
            yield source

    def _take(self, frame: ServerSentEvent) -> signal.Signal | None:
        """The signal in a frame; none in a bare `retry:`, or in what a newer server may send."""
        self._cursor = frame.id or self._cursor
        if frame.retry is not None:
            self.retry_s = frame.retry / 1000
        try:
            told = _SIGNALS.decode(frame.data)
        except msgspec.DecodeError:
            return None
        if isinstance(told, signal.StateChanged | signal.MessageCompleted):
            self._revision = max(self._revision, told.revision)
        if isinstance(told, signal.StateChanged):
            self._record_revision = told.record_revision
        return told


def _is_the_end(told: signal.Signal) -> bool:
    return isinstance(told, signal.StateChanged) and told.new_state == signal.DELETED_STATE


def _now() -> Timestamp:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
