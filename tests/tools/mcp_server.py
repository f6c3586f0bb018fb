"""A real MCP server for tests, written with the official SDK. Over stdio, or over HTTP with `--http`.

Over HTTP it prints its port. `--handshake`: it knows nothing newer than `initialize`, as older servers
do. `--token T`: over HTTP it answers only to that bearer token.
"""

import argparse
import asyncio
import os
import socket
import sys
from typing import Any, Self

import anyio
import mcp_types
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import ToolAnnotations
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

server = MCPServer("tests", log_level="ERROR")
started = asyncio.Event()
cancelled = asyncio.Event()

READ_ONLY = ToolAnnotations(read_only_hint=True)
HARMLESS = ToolAnnotations(destructive_hint=False, idempotent_hint=True)
PIXEL = "iVBORw0KGgo="  # 8 bytes


class Weather(BaseModel):
    city: str
    degrees: float


@server.tool(annotations=READ_ONLY)
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool(annotations=HARMLESS)
def greet(name: str) -> str:
    return f"Hello, {name}!"


@server.tool()
def weather(city: str) -> Weather:
    return Weather(city=city, degrees=7.5)


@server.tool(annotations=ToolAnnotations(destructive_hint=True))
def show() -> list[Any]:
    resource = mcp_types.TextResourceContents(
        uri="notes://1", text="remember", mime_type="text/plain"
    )
    blob = mcp_types.BlobResourceContents(uri="data://2", blob=PIXEL, mime_type="image/png")
    return [
        "look",
        mcp_types.ImageContent(data=PIXEL, mime_type="image/png"),
        mcp_types.AudioContent(data=PIXEL, mime_type="audio/wav"),
        mcp_types.ResourceLink(name="manual", uri="https://example.test/manual"),
        mcp_types.EmbeddedResource(resource=resource),
        mcp_types.EmbeddedResource(resource=blob),
    ]


@server.tool()
def refuse(why: str) -> str:
    raise ToolError(why)


@server.tool()
def pid() -> int:
    return os.getpid()


@server.tool()
def environment() -> list[str]:
    return sorted(os.environ)


@server.tool()
def complain(text: str) -> str:
    print(text, file=sys.stderr, flush=True)
    return "complained"


@server.tool()
async def hang() -> str:
    """Ends only when it is cancelled."""
    started.set()
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()
    return "never"


@server.tool()
async def wait_for_start() -> str:
    """Answers when `hang` runs."""
    await started.wait()
    started.clear()
    return "started"


@server.tool()
async def wait_for_cancel() -> str:
    """Answers when `hang` was cancelled."""
    await cancelled.wait()
    cancelled.clear()
    return "cancelled"


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
async def grow(name: str, ctx: Context) -> str:
    """Adds a tool, and says so in the way of old and of new servers."""
    server.add_tool(greet, name=name)
    await ctx.notify_tools_changed()
    await ctx.session.send_tool_list_changed()
    return "grown"


server.add_tool(greet, name="odd.name/with spaces")
server.add_tool(greet, name="n" * 80)


class OnlyHandshake:
    """Messages from the client, without the question that older servers do not know."""

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        self.incoming = incoming
        self.outgoing = outgoing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.incoming, name)

    async def __aenter__(self) -> Self:
        await self.incoming.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.incoming.__aexit__(*error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while True:
            item = await anext(self.incoming)
            if getattr(item.message, "method", None) != "server/discover":
                return item
            error = mcp_types.ErrorData(code=mcp_types.METHOD_NOT_FOUND, message="Method not found")
            answer = mcp_types.JSONRPCError(jsonrpc="2.0", id=item.message.id, error=error)
            await self.outgoing.send(SessionMessage(answer))


async def serve_old_stdio() -> None:
    core = server._lowlevel_server
    async with stdio_server() as (incoming, outgoing):
        await core.run(
            OnlyHandshake(incoming, outgoing), outgoing, core.create_initialization_options()
        )


class Guarded:
    """An application that answers only to a token, and as an older one would."""

    def __init__(self, app: Any, token: str | None, *, handshake: bool) -> None:
        self.app = app
        self.token = token
        self.handshake = handshake

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.token and headers.get(b"authorization") != f"Bearer {self.token}".encode():
            await PlainTextResponse("no", 401)(scope, receive, send)
        elif self.handshake and headers.get(b"mcp-method") == b"server/discover":
            await PlainTextResponse("unknown", 400)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def serve_http(token: str | None, port: int, *, handshake: bool) -> None:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen()  # whoever connects from now on waits until uvicorn is up
    print(listening.getsockname()[1], flush=True)
    app = Guarded(server.streamable_http_app(), token, handshake=handshake)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--handshake", action="store_true")
    parser.add_argument("--token")
    options = parser.parse_args()
    if options.http:
        serve_http(options.token, options.port, handshake=options.handshake)
    elif options.handshake:
        anyio.run(serve_old_stdio)
    else:
        server.run("stdio")
