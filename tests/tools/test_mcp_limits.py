"""MCP servers that say too much (§8): it costs the call, never the loop, the memory or the others."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from mcp_excess import WRONG_TOOLS, application
from structlog.testing import capture_logs

from contextd.tools import Tool, ToolError
from contextd.tools.mcp import McpLimits, McpServer, McpServers
from contextd.tools.mcp_limits import EndlessLineError, Lines, TooLong, readable
from contextd.tools.mcp_result import MISFIT

HANG_S = 30
BYTES_MAX = 1_000_000
LIMITS = McpLimits(message_bytes_max=BYTES_MAX)
EXCESS = Path(__file__).with_name("mcp_excess.py")
TOO_LONG = f"a message of more than {BYTES_MAX} bytes (CONTEXTD_MCP_MESSAGE_BYTES_MAX)"

# What the model is told, by what the server says.
CALLS = {
    "long": f"sent {TOO_LONG}. The tool has run.",
    "deep": "cannot be read. The tool has run.",
    "parts": "an answer of more than 500 parts. The tool has run.",
    "objects": "a message of more than 10000 objects. The tool has run.",
}


class _Uvicorn(uvicorn.Server):
    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        self.ready = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @property
    def port(self) -> int:
        return int(self.servers[0].sockets[0].getsockname()[1])


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """The port on which the application answers."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # clients hang up on it
    server = _Uvicorn(app)
    task = asyncio.create_task(server._serve())
    await server.ready.wait()
    try:
        yield server.port
    finally:
        server.force_exit = server.should_exit = True
        await task


@asynccontextmanager
async def reached(mode: str, way: str) -> AsyncIterator[McpServers]:
    async with asyncio.timeout(HANG_S):
        if way == "stdio":
            server = McpServer(name="s", command=sys.executable, args=(str(EXCESS), mode))
            async with McpServers([server], start_wait_s=HANG_S, limits=LIMITS) as servers:
                yield servers
            return
        mode = f"{mode}_events" if way == "events" else mode
        async with listening(application(mode)) as port:
            server = McpServer(name="s", url=f"http://127.0.0.1:{port}/mcp")
            async with McpServers([server], start_wait_s=HANG_S, limits=LIMITS) as servers:
                yield servers


def named(servers: McpServers, name: str) -> Tool:
    return next(tool for tool in servers.tools if tool.name == f"s__{name}")


@pytest.mark.parametrize("way", ["stdio", "json", "events"])
@pytest.mark.parametrize("mode", CALLS)
async def test_an_answer_that_is_too_much_costs_its_call(mode: str, way: str) -> None:
    """The session goes on: the next call is answered by the same process."""
    async with reached(mode, way) as servers:
        before = await named(servers, "pid").run({})
        with pytest.raises(ToolError) as caught:
            await named(servers, "t").run({})
        if mode != "deep" or way == "stdio":  # over HTTP it is the SDK that says so
            assert CALLS[mode].removesuffix(" The tool has run.")[:-1] in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert await named(servers, "pid").run({}) == before


@pytest.mark.parametrize("way", ["stdio", "json", "events"])
async def test_what_has_no_end_is_broken_off(way: str) -> None:
    """It does not say which call it is for, so over stdio all are lost; the next finds a new session."""
    async with reached("endless", way) as servers:
        with pytest.raises(ToolError) as caught:
            await named(servers, "t").run({})
        assert TOO_LONG in str(caught.value)
        assert await named(servers, "pid").run({})


@pytest.mark.parametrize("way", ["stdio", "json", "events"])
async def test_a_list_of_very_many_tools_is_cut(way: str) -> None:
    """1,000 are offered, and the log says that there are more."""
    with capture_logs() as logs:
        async with reached("many_tools", way) as servers:
            assert len(servers.tools) == 1000
            assert servers.missing == []
    assert any(entry["event"] == "an MCP server's tools are left out" for entry in logs)


@pytest.mark.parametrize("way", ["stdio", "json", "events"])
async def test_a_tool_of_wrong_form_costs_that_tool(way: str) -> None:
    """The others are there, and the log names each that is not."""
    with capture_logs() as logs:
        async with reached("wrong_tools", way) as servers:
            assert [tool.name for tool in servers.tools] == ["s__t", "s__pid"]
            assert await named(servers, "t").run({}) == "fine"
    told = [entry["tool"] for entry in logs if "of wrong form" in entry["event"]]
    wrong = [tool["name"] if isinstance(tool, dict) else "" for tool in WRONG_TOOLS]
    assert told == [
        name if isinstance(name, str) and name else "(without a name)" for name in wrong
    ]


@pytest.mark.parametrize("mode", ["misfit", "misfit_members"])
async def test_content_that_misses_its_own_schema_is_shown_with_a_word(mode: str) -> None:
    """The tool has run, so the model should see what came of it."""
    async with reached(mode, "stdio") as servers:
        text = await named(servers, "t").run({})
    assert text.startswith("it ran")
    assert text.endswith(MISFIT)


@pytest.mark.parametrize("way", ["stdio", "json"])
async def test_half_a_surrogate_pair_is_an_answer_of_wrong_form_at_once(way: str) -> None:
    """Nobody waits for the call's time to run out, and the session goes on."""
    async with reached("surrogate", way) as servers:
        before = await named(servers, "pid").run({})
        with pytest.raises(ToolError) as caught:
            await named(servers, "t").run({})
        assert "did not answer" not in str(caught.value)
        assert await named(servers, "pid").run({}) == before


@pytest.mark.parametrize("mode", ["long_schema", "long_description", "endless_list", "long_list"])
async def test_lists_are_bounded(mode: str) -> None:
    """In each tool, in the message, and in its pages."""
    with capture_logs() as logs:
        async with reached(mode, "stdio") as servers:
            names = {tool.name for tool in servers.tools}
            longest = max((len(tool.description) for tool in servers.tools), default=0)
    assert longest <= 10_000
    assert ("s__u" in names) == (mode == "long_description")
    if mode == "long_list":
        assert names == set()
        assert TOO_LONG in str(logs)


async def test_a_flood_of_notifications_is_passed_over() -> None:
    """Nobody waits for them, and nothing of them is logged."""
    with capture_logs() as logs:
        for way in ("stdio", "events"):
            async with reached("flood", way) as servers:
                assert await named(servers, "t").run({}) == "fine"
    assert "their words" not in str(logs)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_another_server_is_refused(status: int) -> None:
    """The key in the headers, and what a call says, do not go there."""
    asked: list[Any] = []

    async def other(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope)

    async with listening(other) as port:
        place = f"http://127.0.0.1:{port}/mcp".encode()

        async def moved(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"location", place)]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body"})

        async with listening(moved) as first:
            server = McpServer(
                name="s",
                url=f"http://127.0.0.1:{first}/mcp",
                headers={"Authorization": "Bearer s3cret"},
            )
            with capture_logs() as logs:
                async with McpServers([server], start_wait_s=HANG_S) as servers:
                    assert servers.missing == ["s"]
    assert asked == []
    assert "Redirect to" in str(logs)


def test_lines_hold_no_more_than_the_limit() -> None:
    """However they are cut into pieces; what comes after a long line is read again."""
    lines = Lines(10)
    assert list(lines.take(b"one\ntw")) == [b"one"]
    assert list(lines.take(b"o\n\n")) == [b"two", b""]
    assert list(lines.take(b"x" * 11)) == [TooLong(None)]
    assert list(lines.take(b"x" * 20)) == []
    assert list(lines.take(b"x\nnext\n")) == [b"next"]
    assert list(lines.take(b'{"id": 7, "result": {\nlast\n')) == [TooLong(7), b"last"]
    assert list(lines.take(b'{"method": "a", "id": 7}\n')) == [TooLong(None)]
    assert list(lines.take(b"x" * 150)) == [TooLong(None)]
    with pytest.raises(EndlessLineError):
        list(lines.take(b"x" * 11))


def test_a_text_may_hold_any_number_of_braces() -> None:
    """What is counted is what stands outside of texts, also behind quotes and backslashes."""
    text = r"{[\"{[," * 100_000 + r"\\"
    message = b'{"id":1,"result":{"content":[{"type":"text","text":"%s"}]}}' % text.encode()
    assert readable(message) is message
