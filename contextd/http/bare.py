"""The two hot routes, beside Litestar: the pull and the stream.

They are bare ASGI applications. Litestar has `@asgi` handlers for that, but in 2.25 it cannot route
one whose path has parameters (a KeyError on the method), so they are matched here, before it.
"""

import re
from typing import Protocol

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from contextd.core.errors import ContextdError, InternalError, MethodNotAllowed
from contextd.http.problems import send_problem

log = structlog.get_logger(__name__)

_PATH = re.compile(
    "/contexts/(?P<context_id>[^/]+)/(?:stream|messages/(?P<message_id>[^/]+)/content)"
)


class BareRoute(Protocol):
    """A route that reads its scope and writes its answer by itself."""

    methods: str

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """Raises `ContextdError` before it has answered, or not at all."""
        ...


class BareRoutes:
    """Passes two paths to their routes and everything else to the application."""

    def __init__(self, app: ASGIApp, *, content: BareRoute, stream: BareRoute) -> None:
        self._app = app
        self._content = content
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or passes on."""
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == ScopeType.HTTP else None
        if found is None or scope["type"] != ScopeType.HTTP or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        context_id, message_id = found.groups()
        if message_id is None:
            scope["path_params"] = {"context_id": context_id}
            await _answer(self._stream, scope, receive, send)
        else:
            scope["path_params"] = {"context_id": context_id, "message_id": message_id}
            await _answer(self._content, scope, receive, send)


async def _answer(route: BareRoute, scope: HTTPScope, receive: Receive, send: Send) -> None:
    if scope["method"] not in route.methods:
        refusal = MethodNotAllowed(f"{scope['method']} is not possible here.")
        await send_problem(send, refusal, {"allow": route.methods})
        return
    started = False

    async def noting_send(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await route(scope, receive, noting_send)
    except ContextdError as error:
        await send_problem(send, error)
    except Exception:
        log.exception("a request failed by a defect", path=scope["path"])
        if started:
            raise  # the server cuts the connection: the client must not take half for the whole
        await send_problem(send, InternalError())
