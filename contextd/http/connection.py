"""One connection of the server: what bounds it before any route is asked.

uvicorn's protocol by itself takes heads of any size and age, parses everything that a client sends ahead,
turns trailers into headers, and waits for ever for whoever stops sending or reading. Here heads, the
framing of bodies, and what is sent ahead are bounded in bytes; heads, bodies and idle connections in
time; connections in number. Routes bound the sizes of their bodies themselves (`body.py`).

A large piece of input is parsed in parts, because one piece can hold ten thousand small requests. Times
are not timers, which each request would pay for: a connection says until when it may wait, and `sweep`
looks at all of them twice a second.
"""

import asyncio
import math
from collections.abc import Iterable
from typing import Any, Literal

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from contextd.core.errors import ContextdError, HeadTooLarge, InvalidRequest, Overloaded
from contextd.http.problems import raw_problem
from contextd.settings import Settings

SWEEP_S = 0.5
LINGER_S = 1.0  # in which a client can read why its connection closes
PART_BYTES = 8 * 1024  # parsed at once
AHEAD_BYTES_MAX = 64 * 1024  # sent ahead of an answer; beyond it the client is not read on


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one connection may take, and how many there may be."""

    head_bytes_max: int
    head_s: float
    body_s: float
    keep_alive_s: float
    slow_reader_s: float
    connections_max: int

    @classmethod
    def of(cls, settings: Settings, *, connections_max: int) -> "Limits":
        """As the operator set them; `connections_max`: what the process can really hold."""
        return cls(
            head_bytes_max=settings.head_bytes_max,
            head_s=settings.head_timeout_s,
            body_s=settings.body_timeout_s,
            keep_alive_s=settings.keep_alive_s,
            slow_reader_s=settings.slow_reader_s,
            connections_max=connections_max,
        )


class Connection(HttpToolsProtocol):
    """uvicorn's protocol within `Limits`. Routes find it in their scope as `contextd.connection`."""

    def __init__(self, *, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self.deadline = math.inf  # for what the client has to send; a time of the loop
        self.write_deadline = math.inf  # for it to take some of what it was sent
        self._limits = limits
        self._within: Literal["nothing", "head", "body"] = "nothing"
        self._moved = False  # whether the part led to anything: a request, a head's end, a body
        self._unmoved_bytes = 0  # since anything was led to
        self._ahead = b""  # input that waits for an answer to what was before it
        self._refusal: ContextdError | None = None  # to be said when all before it is answered
        self._deaf = False  # input is thrown away
        self._unsent_bytes = 0
        self._active: RequestResponseCycle | None = None  # which is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses one connection too many."""
        super().connection_made(transport)
        self.deadline = self.loop.time() + self._limits.head_s
        if len(self.connections) > self._limits.connections_max:
            self._deaf = True
            transport.write(
                _closing(Overloaded("More connections are open than the server takes."))
            )
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the request that is being answered, which need not be the last that came."""
        self.pipeline.clear()
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what came, unless something before it is to be answered first."""
        if self._deaf:
            return
        if self.pipeline:
            self._ahead += data
            if len(self._ahead) > AHEAD_BYTES_MAX:
                self.flow.pause_reading()
        elif len(data) <= PART_BYTES:
            self._parse(data)
        else:
            self._parse_in_parts(data)

    def on_message_begin(self) -> None:
        """A request begins: its head has its time."""
        super().on_message_begin()
        self.scope["contextd.transport"] = self.transport  # type: ignore[typeddict-unknown-key]
        self.scope["contextd.connection"] = self  # type: ignore[typeddict-unknown-key]
        self._within, self._moved = "head", True
        self.deadline = self.loop.time() + self._limits.head_s

    def on_headers_complete(self) -> None:
        """Hands the request on; what the parser calls headers from here on are trailers."""
        limit = self._limits.head_bytes_max
        if self._unmoved_bytes + 2 * PART_BYTES > limit and self._head_bytes() > limit:
            raise HeadTooLarge(limit)
        super().on_headers_complete()
        self.headers = []
        self._within, self._moved = "body", True
        self.deadline = self.loop.time() + self._limits.body_s

    def on_body(self, body: bytes) -> None:
        """A piece of the request's body."""
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole: now it is the server's turn."""
        super().on_message_complete()
        self._within = "nothing"
        self.deadline = math.inf

    def on_response_complete(self) -> None:
        """Goes on with what was sent ahead, or waits for the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._refusal is not None:
            self._say(self._refusal)
            return
        elif self._within == "nothing":
            self.deadline = self.loop.time() + self._limits.keep_alive_s
        else:  # the rest of a body that was answered early
            self.deadline = min(self.deadline, self.loop.time() + self._limits.head_s)
        if self._ahead and not self.pipeline:
            ahead, self._ahead = self._ahead, b""
            self.data_received(ahead)

    def keep_open(self) -> None:
        """The body of the present request may take any time: its route bounds it."""
        if self._within == "body":
            self.deadline = math.inf

    def pause_writing(self) -> None:
        """The client takes its answer slowly: it has to take some of it from time to time."""
        super().pause_writing()
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self.write_deadline = self.loop.time() + self._limits.slow_reader_s

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self.write_deadline = math.inf

    def expire(self, now: float) -> None:
        """A deadline has passed."""
        if self.write_deadline < now:
            self._look_at_reader(now)
        elif self.flow.write_paused:  # idle only because it still reads the answer
            self.deadline = now + self._limits.keep_alive_s
        elif self._is_answering() and self._within == "head":
            self._stop_listening()  # the answer to an earlier request goes on, and is the last
            self.cycle.keep_alive = False
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """The server stops: nothing new is read, and what is under way is the last."""
        self._ahead = b""
        super().shutdown()

    def cut_off(self) -> None:
        """The server has no more time: ends the connection, unless its request has no answer yet."""
        active = self._active
        if active is None or active.response_complete or active.response_started:
            if active is not None:
                active.disconnected = True  # at once: its task is about to be cancelled
            self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def _parse_in_parts(self, data: bytes) -> None:
        for start in range(0, len(data), PART_BYTES):
            if self.pipeline:
                self._ahead = data[start:]
                return
            self._parse(data[start : start + PART_BYTES])
            if self._deaf:
                return

    def _parse(self, part: bytes) -> None:
        self._moved = False
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            self._ignore_upgrade()
        except httptools.HttpParserError as error:
            reason = error.__context__
            ours = isinstance(reason, ContextdError)
            self._refuse(reason if ours else InvalidRequest.of("request", "not HTTP/1.1"))  # type: ignore[arg-type]
        else:
            self._unmoved_bytes = 0 if self._moved else self._unmoved_bytes + len(part)
            if self._unmoved_bytes > self._limits.head_bytes_max:
                self._refuse(HeadTooLarge(self._limits.head_bytes_max))

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _ignore_upgrade(self) -> None:
        """The request is answered as any other; in which protocol the rest is, nobody knows."""
        self._deaf = True
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self.transport.close()

    def _stop_listening(self) -> None:
        self._deaf, self._ahead, self.deadline = True, b"", math.inf
        self.flow.pause_reading()

    def _refuse(self, error: ContextdError) -> None:
        """Says why the connection closes, once what was asked before is answered."""
        self._stop_listening()
        cycle = self.cycle
        if not self._is_answering():
            self._say(error)
        elif self._within != "body":
            self._refusal = error
        elif self.pipeline:
            self.pipeline.popleft()  # the request itself is bad, and was not begun with
            self._refusal = error
        elif cycle.response_started:
            self.transport.abort()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._say(error)

    def _say(self, error: ContextdError) -> None:
        """The last answer. A connection closed with input unread would be reset, and the answer lost."""
        if self.transport.is_closing():
            return
        self._deaf = True
        self.transport.write(_closing(error))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.deadline = self.loop.time() + LINGER_S

    def _look_at_reader(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent_bytes:
            self.transport.abort()
        self._unsent_bytes = unsent
        self.write_deadline = now + self._limits.slow_reader_s


async def sweep(connections: Iterable[Connection]) -> None:
    """Background task: ends the connections that are late."""
    now = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(SWEEP_S)
        at = now()
        for connection in [c for c in connections if c.deadline < at or c.write_deadline < at]:
            connection.expire(at)


def _closing(error: ContextdError) -> bytes:
    """A whole answer, as bytes, after which the connection closes."""
    return raw_problem(error, b"connection: close\r\n")
