"""The three hot routes, beside Litestar: the pull, the stream and the append.

They are bare ASGI applications. Litestar has `@asgi` handlers for that, but in 2.25 it cannot route
one whose path has parameters (a KeyError on the method), so they are matched here, before it.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from contextd.core.errors import ContextdError, InternalError, MethodNotAllowed, NotFound
from contextd.http.problems import send_problem

log = structlog.get_logger(__name__)

_PATH = re.compile(
    "/contexts/(?P<context_id>[^/]+)/(?:stream|messages/(?P<message_id>[^/]+)/(content|chunks))"
)


class BareRoute(Protocol):
    """A route that reads its scope and writes its answer by itself."""

    methods: str  # that it answers
    allow: str  # that its path answers

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """Raises `ContextdError` before it has answered, or not at all."""
        ...


class BareRoutes:
    """Passes some paths to their routes and everything else to the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        content: BareRoute,
        stream: BareRoute,
        append: BareRoute,
        methods: Sequence[tuple[re.Pattern[str], str]],
    ) -> None:
        """`methods`: for each path of the whole server a pattern and what `Allow` says there."""
        self._app = app
        self._content = content
        self._stream = stream
        self._append = append
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or passes on."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS":
            await self._answer_options(scope, send)
            return
        found = _PATH.fullmatch(scope["path"])
        if found is None:
            await self._app(scope, receive, send)
            return
        context_id, message_id, what = found.groups()
        scope["path_params"] = {"context_id": context_id}
        if message_id is None:
            await _answer(self._stream, scope, receive, send)
            return
        scope["path_params"]["message_id"] = message_id
        if what == "content":
            await _answer(self._content, scope, receive, send)
        elif scope["method"] == "GET":
            await self._app(scope, receive, send)  # the chunks one by one
        else:
            await _answer(self._append, scope, receive, send)

    async def _answer_options(self, scope: HTTPScope, send: Send) -> None:
        """Litestar names only the method that it met first on a path."""
        for pattern, allow in self._methods:
            if pattern.fullmatch(scope["path"]):
                fields = [(b"allow", allow.encode())]
                await send({"type": "http.response.start", "status": 204, "headers": fields})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
        await send_problem(send, NotFound("There is nothing at this path."))


async def _answer(route: BareRoute, scope: HTTPScope, receive: Receive, send: Send) -> None:
    if scope["method"] not in route.methods:
        refusal = MethodNotAllowed(f"{scope['method']} is not possible here.")
        await send_problem(send, refusal, {"allow": route.allow})
        return
    started = False

    async def noting_send(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await route(scope, receive, noting_send)
    except ContextdError as error:
        if started:
            raise
        await send_problem(send, error)
    except Exception:
        log.exception("a request failed by a defect", path=scope["path"])
        if started:
            raise  # the server cuts the connection: the client must not take half for the whole
        await send_problem(send, InternalError())
