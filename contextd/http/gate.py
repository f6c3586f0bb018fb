"""Who is answered at all (§11): only known host names, and browsers only from known origins.

It speaks CORS too, because Litestar's middleware replaces the `Vary` of the answers that it touches, and
answers that are cached for ever must keep theirs (§3.3).

Without auth this is what stands between a web page that somebody visits and the server on their
machine: a page can make a browser send requests here, but it cannot forge `Host` or `Origin`. It runs
before everything else, for HTTP and for WebSocket handshakes alike.

For the same reason it refuses what two programs on the way could read differently: headers that come
twice though there is one value, and paths that name the same thing in more than one way.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from contextd.core.errors import (
    ContextdError,
    Forbidden,
    InvalidRequest,
    NotFound,
    ShuttingDown,
)
from contextd.http.problems import send_problem

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
LOOPBACK_ORIGIN = r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?"
EXPOSED = (
    b"Contextd-Sequence, Contextd-Head-Sequence, Contextd-Status, Contextd-Final, "
    b"ETag, Retry-After, Location"
)
SINGLE = frozenset(
    (
        b"host",
        b"origin",
        b"content-type",
        b"content-length",
        b"authorization",
        b"last-event-id",
        b"access-control-request-method",
        b"contextd-connection-id",
    )
)
ORIGINS_LOGGED_MAX = 100
ORIGIN_CHARS_LOGGED = 200
_PORT = re.compile(rb":\d{1,5}$")
# Empty segments, `.` and `..`, U+0000, and what was not UTF-8.
_ODD_PATH = re.compile("//|/\\.{1,2}(?:/|\\Z)|[\0\ufffd]")

log = structlog.get_logger(__name__)


def origin_pattern(origins: Sequence[str]) -> str:
    """A pattern for whole origins: those of the setting, or loopback ones without it."""
    return "|".join(re.escape(origin) for origin in origins) if origins else LOOPBACK_ORIGIN


class Gate:
    """Wraps the application. `allowed_hosts` without ports; `*` answers to every name."""

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: Sequence[str], cors_origins: Sequence[str]
    ) -> None:
        self._app = app
        self._any_host = "*" in allowed_hosts
        self._hosts = {name.lower().encode() for name in (*LOOPBACK_NAMES, *allowed_hosts)}
        self._any_origin = "*" in cors_origins
        self._origin = re.compile(origin_pattern(cors_origins).encode())
        self._origins_logged: set[bytes] = set()
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass; answers the rest with a problem."""
        refusal = self._refusal(scope)
        if refusal is None:
            await self._pass(scope, receive, send)
        elif scope["type"] == ScopeType.HTTP:
            await send_problem(send, refusal)
        else:
            await send({"type": "websocket.close", "code": 4403, "reason": refusal.code})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = _header(scope, b"origin")
        try:
            if origin is None or scope["type"] != ScopeType.HTTP:
                await self._app(scope, receive, send)
            elif _is_preflight(scope):
                await _allow(send, origin, _header(scope, b"access-control-request-headers"))
            else:
                await self._app(scope, receive, _sharing(send, origin))
        except asyncio.CancelledError:
            if not self.closing:
                raise
            await _say_too_late(send)

    def _refusal(self, scope: Scope) -> ContextdError | None:
        if self.closing:
            return ShuttingDown()
        single: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in SINGLE:
                if name in single:
                    return InvalidRequest.of(name.decode(), "the header came twice")
                single[name] = value
        if not self._any_host and not self._known_host(single.get(b"host")):
            return Forbidden("This server does not answer to that host name.")
        origin = single.get(b"origin")
        if origin is not None and not self._any_origin and not self._origin.fullmatch(origin):
            self._log_refused(origin)
            return Forbidden("This server does not answer to pages of that origin.")
        return _odd_path(scope)

    def _log_refused(self, origin: bytes) -> None:
        """Once for each origin: whose page it is may have to be allowed, or to be looked for."""
        logged = self._origins_logged
        if origin not in logged and len(logged) < ORIGINS_LOGGED_MAX:
            logged.add(origin)
            shown = origin[:ORIGIN_CHARS_LOGGED].decode("latin-1")
            log.warning("pages of an origin were refused; cors_origins allows it", origin=shown)
            if len(logged) == ORIGINS_LOGGED_MAX:
                log.warning("further origins that are refused are not logged")

    def _known_host(self, host: bytes | None) -> bool:
        if host is None:
            return False
        return host in self._hosts or _PORT.sub(b"", host).lower() in self._hosts


def _odd_path(scope: Scope) -> ContextdError | None:
    """The 404 for a path that servers on the way may read as another one."""
    raw, path = scope["raw_path"], scope["path"]
    hidden_slash = b"%" in raw and b"%2f" in raw.lower()
    if hidden_slash or (path.endswith("/") and path != "/") or _ODD_PATH.search(path):
        return NotFound("There is nothing at this path.")
    return None


async def _say_too_late(send: Send) -> None:
    """The server stops, and the request had not come to an end in its time (§4.2)."""
    with suppress(RuntimeError):  # half of another answer was sent: the connection breaks off
        await send_problem(send, ShuttingDown())


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == wanted), None)


def _is_preflight(scope: HTTPScope) -> bool:
    asked = _header(scope, b"access-control-request-method")
    return scope["method"] == "OPTIONS" and asked is not None


async def _allow(send: Send, origin: bytes, wanted_headers: bytes | None) -> None:
    """Answers a preflight of an origin that may ask: any method of ours, any header."""
    fields = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE"),
        (b"access-control-allow-headers", wanted_headers or b"Content-Type"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Origin, Access-Control-Request-Headers"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": fields})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _sharing(send: Send, origin: bytes) -> Send:
    """A `send` that lets pages of `origin` read the answer."""

    async def sharing_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            fields = list(message["headers"])
            fields.append((b"access-control-allow-origin", origin))
            fields.append((b"access-control-expose-headers", EXPOSED))
            if not any(name == b"vary" and b"Origin" in value for name, value in fields):
                fields.append((b"vary", b"Origin"))
            message["headers"] = fields
        await send(message)

    return sharing_send
