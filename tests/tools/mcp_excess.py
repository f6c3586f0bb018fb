"""An MCP server that says too much, over stdio or as an ASGI application; its mode says of what.

Without the SDK. `python mcp_excess.py MODE` speaks over stdio; `application(MODE)` over HTTP, with
answers as JSON, or as events where the mode ends in `_events`.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

BIG = 3_000_000
NOTIFICATION = {
    "jsonrpc": "2.0",
    "method": "notifications/message",
    "params": {"level": "info", "data": "their words"},
}


WRONG_TOOLS: list[Any] = [
    {"name": "string", "inputSchema": {"type": "string"}},
    {"name": "null", "inputSchema": None},
    {"name": "missing"},
    {"name": "untyped", "inputSchema": {}},
    {"name": "array_out", "inputSchema": {"type": "object"}, "outputSchema": {"type": "array"}},
    {"name": "number", "description": 7, "inputSchema": {"type": "object"}},
    {"name": 5, "inputSchema": {"type": "object"}},
    "no object",
]


def listed(mode: str) -> list[dict[str, Any]]:
    schema: dict[str, Any] = {"type": "object"}
    tools: list[dict[str, Any]] = [{"name": name, "inputSchema": schema} for name in ("t", "pid")]
    if mode.startswith("many_tools"):
        tools += [{"name": f"t{n}", "inputSchema": schema} for n in range(5_000)]
    if mode.startswith("wrong_tools"):
        tools = [*WRONG_TOOLS, *tools]
    if mode.startswith("misfit"):
        whole = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        tools[0]["outputSchema"] = whole
    if mode == "long_schema":
        tools += [{"name": "u", "inputSchema": {**schema, "title": "s" * 100_000}}]
    if mode == "long_description":
        tools += [{"name": "u", "description": "d" * 900_000, "inputSchema": schema}]
    return tools


def pieces(mode: str, message: dict[str, Any]) -> Iterator[str]:
    """What is said to one request, in pieces."""
    id_, method = message.get("id"), message.get("method")
    result: Any = {}
    if method == "initialize":
        version = message["params"]["protocolVersion"]
        info = {"name": "e", "version": "1"}
        capabilities = {"tools": {}}
        result = {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}
    elif method == "tools/list":
        result = {"tools": listed(mode)}
        if mode == "long_list":
            result["tools"][0]["description"] = "d" * BIG
        if mode == "endless_list":
            result["nextCursor"] = "again"
    elif method == "tools/call" and message["params"]["name"] == "pid":
        result = {"content": [{"type": "text", "text": str(os.getpid())}]}
    elif method == "tools/call":
        yield from called(mode, id_)
        return
    yield json.dumps({"jsonrpc": "2.0", "id": id_, "result": result}) + "\n"


def called(mode: str, id_: Any) -> Iterator[str]:
    start = f'{{"jsonrpc": "2.0", "id": {id_}, "result": '
    if mode.startswith("long"):
        yield start + '{"content": [{"type": "text", "text": "'
        for _ in range(30):
            yield "R" * (BIG // 30)
        yield '"}]}}\n'
    elif mode.startswith("endless"):
        for _ in range(400):
            yield "x" * 100_000
    elif mode.startswith("misfit"):
        misfit = {"nothing": 1} if mode.startswith("misfit_members") else None
        content = [{"type": "text", "text": "it ran"}]
        result = {"content": content, **({"structuredContent": misfit} if misfit else {})}
        yield start + json.dumps(result) + "}\n"
    elif mode.startswith("surrogate"):
        yield start + '{"content": [{"type": "text", "text": "\\ud800"}]}}\n'
    elif mode.startswith("deep"):
        yield start + '{"content": [], "structuredContent": {"a": ' + "[" * 50_000
        yield "]" * 50_000 + "}}}\n"
    elif mode.startswith("parts"):
        yield start + '{"content": [' + ",".join(["{}"] * 5_000) + "]}}\n"
    elif mode.startswith("objects"):
        yield start + '{"content": [], "structuredContent": {"a": ['
        yield ",".join(["[]"] * 200_000) + "]}}}\n"
    else:
        if mode.startswith("flood"):
            for _ in range(20_000):
                yield json.dumps(NOTIFICATION) + "\n"
        yield start + '{"content": [{"type": "text", "text": "fine"}]}}\n'


def application(mode: str) -> Any:
    """The same over HTTP."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = scope["type"] == "http"
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        if scope.get("method") != "POST" or b'"id"' not in body:
            await send({"type": "http.response.start", "status": 405 if not body else 202})
            await send({"type": "http.response.body"})
            return
        events = mode.endswith("_events")
        kind = b"text/event-stream" if events else b"application/json"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        await send(start)
        fresh = True
        for piece in pieces(mode, json.loads(body)):
            text = f"data: {piece}" if events and fresh else piece
            fresh = piece.endswith("\n")
            text += "\n" if events and fresh else ""
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body"})

    return run


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" in asked:
            for said in pieces(sys.argv[1], asked):
                sys.stdout.write(said)
            sys.stdout.flush()
