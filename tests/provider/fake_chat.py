"""A small Chat Completions server that plays what it is told to, byte for byte: raw ASGI on loopback.

Tests queue `Play`s, one for each request; what was asked is in `requests`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn

DONE = b"data: [DONE]\n\n"


@dataclass
class Play:
    """One answer: status, headers, pieces of the body, and how it ends.

    `cut` drops the connection, `hang` sends nothing more, `repeat` sends the pieces again for ever.
    """

    body: list[bytes] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    then: Literal["end", "cut", "hang", "repeat"] = "end"


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class CutError(Exception):
    """Makes uvicorn drop the connection in the middle of an answer."""


class FakeChat:
    """The application. `asked` is set by a request, `left` when a client goes before the end."""

    def __init__(self) -> None:
        self.url = ""
        self.plays: list[Play] = []
        self.models: Play = problem(404, "no such route")
        self.requests: list[Asked] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    def play(self, *plays: Play) -> None:
        """Queues answers."""
        self.plays += plays

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all requests for an answer."""
        return [asked.body for asked in self.requests if asked.path.endswith("/chat/completions")]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append(Asked(scope["path"], headers, json.loads(body or b"{}")))
        self.asked.set()
        play = self.models if scope["path"].endswith("/models") else self.plays.pop(0)
        await self._answer(play, receive, send)

    async def _answer(self, play: Play, receive: Any, send: Any) -> None:
        headers = [(name.encode(), value.encode()) for name, value in play.headers.items()]
        await send({"type": "http.response.start", "status": play.status, "headers": headers})
        gone = asyncio.create_task(self._watch(receive))
        try:
            await self._pieces(play, gone, send)
        finally:
            gone.cancel()

    async def _pieces(self, play: Play, gone: asyncio.Task[None], send: Any) -> None:
        while True:
            for piece in play.body:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            if play.then != "repeat" or gone.done():
                break
        if play.then == "cut":
            raise CutError
        if play.then == "hang":
            await gone
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


def data(payload: object) -> bytes:
    """One event of the stream."""
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
    """One chunk as servers send it, with fields that nobody reads."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return data({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def called(
    index: int | None, id_: str | None, name: str | None, arguments: Any, finish: str | None = None
) -> bytes:
    """A chunk with one piece of a tool call."""
    function = {"name": name, "arguments": arguments}
    part = {"index": index, "id": id_, "type": "function", "function": function}
    return chunk(finish, tool_calls=[part])


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    """The chunk that comes last where `include_usage` was asked for."""
    total = prompt_tokens + completion_tokens
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return data({"id": "chatcmpl-1", "choices": [], "usage": {**counts, "total_tokens": total}})


def text(*contents: str) -> Play:
    """A whole plain answer."""
    return Play([*(chunk(content=content) for content in contents), chunk("stop"), DONE])


def problem(status: int, message: str, **headers: str) -> Play:
    """An error as most servers put it."""
    error = {"error": {"message": message, "type": "some_error", "code": None}}
    sent = {"content-type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return Play([json.dumps(error).encode()], status, sent)


def listing(*models: str) -> Play:
    """What `GET /models` answers."""
    listed = {"object": "list", "data": [{"id": model, "object": "model"} for model in models]}
    return Play([json.dumps(listed).encode()], 200, {"content-type": "application/json"})


class _Server(uvicorn.Server):
    """Runs in the test's event loop and leaves the process's signals alone."""

    def __init__(self, app: FakeChat) -> None:
        super().__init__(
            uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False)
        )
        self.ready = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@asynccontextmanager
async def serving(app: FakeChat) -> AsyncIterator[FakeChat]:
    """`app` on a free loopback port, which its `url` names."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # it is told to cut answers
    server = _Server(app)
    task = asyncio.create_task(server._serve())
    await server.ready.wait()
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield app
    finally:
        # `shutdown()` waits a tenth of a second for clients to end, for each test.
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.close()
        unfinished = [task, *server.server_state.tasks]
        for each in unfinished:
            each.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
