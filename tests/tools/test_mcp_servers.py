"""Tools of real MCP servers, written with the official SDK, over stdio and HTTP, of both eras."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from contextd.tools import Tool, ToolError
from contextd.tools.mcp import McpServer, McpServers

SCRIPT = str(Path(__file__).with_name("mcp_server.py"))
HANG_S = 30

# A server that tells of changes only to who asks for them, and one that knows nothing but `initialize`.
NAMES = ["stdio", "old-stdio", "http", "old-http"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Watched:
    """Open servers, and a way to wait until their tools are as expected."""

    guarded_port: int  # where a token is asked for

    def __init__(self, servers: list[McpServer], **options: float) -> None:
        self._news = asyncio.Event()
        self.servers = McpServers(servers, changed=lambda _: self._news.set(), **options)

    def tool(self, name: str) -> Tool:
        return next(tool for tool in self.servers.tools if tool.name == name)

    async def call(self, tool: str, /, **arguments: object) -> object:
        return await self.tool(tool).run(arguments)

    async def until(self, expected: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(HANG_S):
            while not expected([tool.name for tool in self.servers.tools]):
                self._news.clear()
                await self._news.wait()


@contextmanager
def http_servers(*servers: list[str]) -> Iterator[list[tuple[subprocess.Popen[str], int]]]:
    """Server processes with these options, and the ports they listen on."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--http", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for options in servers
    ]
    try:
        yield [(process, int(process.stdout.readline())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def stdio(name: str, *options: str, **entry: object) -> McpServer:
    return McpServer(name=name, command=sys.executable, args=(SCRIPT, *options), **entry)


def http(name: str, port: int, **entry: object) -> McpServer:
    return McpServer(name=name, url=f"http://127.0.0.1:{port}/mcp", **entry)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def open_servers() -> AsyncIterator[Watched]:
    """One of each kind, for all tests that leave them as they were."""
    with http_servers(["--token", "s3cret"], ["--handshake"]) as [(_, port), (_, old_port)]:
        watched = Watched(
            [
                stdio("stdio", env={"LISTED": "1"}),
                stdio("old-stdio", "--handshake", env={"LISTED": "1"}),
                http("http", port, headers={"Authorization": "Bearer s3cret"}),
                http("old-http", old_port),
            ],
            start_wait_s=HANG_S,
        )
        watched.guarded_port = port
        async with watched.servers:
            yield watched


async def test_all_servers_list_their_tools(open_servers: Watched) -> None:
    """Under names that every model's server takes."""
    assert open_servers.servers.missing == []
    names = [tool.name for tool in open_servers.servers.tools]
    assert len(names) == len(set(names))
    for server in NAMES:
        assert f"{server}__add" in names
        odd = [name for name in names if name.startswith(f"{server}__odd_name_with_spaces-")]
        assert len(odd) == 1
        assert await open_servers.call(odd[0], name="you") == "Hello, you!"
        [long] = [name for name in names if name.startswith(f"{server}__nnn")]
        assert len(long) == 64
        assert await open_servers.call(long, name="you") == "Hello, you!"


@pytest.mark.parametrize("server", NAMES)
async def test_a_tool_is_offered_as_the_server_describes_it(
    open_servers: Watched, server: str
) -> None:
    """With its schema and its hints."""
    add = open_servers.tool(f"{server}__add")
    assert add.description == "Adds two numbers."
    assert add.parameters["required"] == ["a", "b"]
    assert (add.read_only, add.idempotent, add.requires_approval) == (True, True, False)
    greet = open_servers.tool(f"{server}__greet")
    assert (greet.read_only, greet.idempotent, greet.requires_approval) == (False, True, False)
    assert open_servers.tool(f"{server}__pid").requires_approval
    assert open_servers.tool(f"{server}__show").requires_approval


@pytest.mark.parametrize("server", NAMES)
async def test_calls(open_servers: Watched, server: str) -> None:
    """Text, structured content, and what is neither."""
    assert await open_servers.call(f"{server}__add", a=1, b=2) == "3"
    weather = await open_servers.call(f"{server}__weather", city="Rome")
    assert weather == '{\n  "city": "Rome",\n  "degrees": 7.5\n}'
    assert await open_servers.call(f"{server}__show") == (
        "look\n"
        "[image, image/png, 8 bytes: not shown]\n"
        "[audio, audio/wav, 8 bytes: not shown]\n"
        "[link to manual: https://example.test/manual]\n"
        "[resource notes://1]\nremember\n"
        "[resource data://2, image/png, 8 bytes: not shown]"
    )


@pytest.mark.parametrize("server", NAMES)
async def test_errors_of_tools_go_back_in_their_own_words(
    open_servers: Watched, server: str
) -> None:
    """Also those about the arguments, and about a tool that is gone."""
    with pytest.raises(ToolError, match=r"because of the rain$"):
        await open_servers.call(f"{server}__refuse", why="because of the rain")
    with pytest.raises(ToolError, match="valid integer"):
        await open_servers.call(f"{server}__add", a="x", b=1)
    connection = open_servers.tool(f"{server}__add").run.func.__self__  # type: ignore[attr-defined]
    with pytest.raises(ToolError, match="gone"):
        await connection.call("gone", {})


@pytest.mark.parametrize("server", NAMES)
async def test_calls_run_side_by_side(open_servers: Watched, server: str) -> None:
    """A slow tool holds up no other, and a cancelled one is gone at once for its caller."""
    hanging = asyncio.create_task(open_servers.call(f"{server}__hang"))
    assert await open_servers.call(f"{server}__wait_for_start") == "started"
    assert await open_servers.call(f"{server}__add", a=1, b=1) == "2"
    hanging.cancel()
    await a_few_rounds()
    assert hanging.cancelled()
    assert await open_servers.call(f"{server}__wait_for_cancel") == "cancelled"


@pytest.mark.parametrize("server", NAMES)
async def test_a_changed_list_is_read_again(open_servers: Watched, server: str) -> None:
    """When the server says so, in the way of its era."""
    assert await open_servers.call(f"{server}__grow", name="grown") == "grown"
    await open_servers.until(lambda names: f"{server}__grown" in names)
    assert await open_servers.call(f"{server}__grown", name="you") == "Hello, you!"


@pytest.mark.parametrize("server", ["stdio", "old-stdio"])
async def test_a_child_gets_no_more_of_the_environment_than_is_listed(
    open_servers: Watched, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the few variables that every program needs."""
    names = str(await open_servers.call(f"{server}__environment")).split()
    assert "LISTED" in names
    assert set(names) <= {
        "LISTED", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE"
    }  # fmt: skip


async def test_a_server_that_dies_in_mid_call_is_used_again() -> None:
    """The call ends and says that it may have run; the next one starts the server anew."""
    before = open_files()
    async with asyncio.timeout(HANG_S):
        watched = Watched([stdio("s")], start_wait_s=HANG_S)
        async with watched.servers:
            first = int(str(await watched.call("s__pid")))
            hanging = asyncio.create_task(watched.call("s__hang"))
            await watched.call("s__wait_for_start")
            psutil.Process(first).kill()
            with pytest.raises(ToolError, match="may have had an effect"):
                await hanging
            second = int(str(await watched.call("s__pid")))
            assert second != first
            assert not psutil.pid_exists(first)
    assert not psutil.pid_exists(second)
    with pytest.raises(ToolError, match="has not been called"):
        await watched.call("s__pid")
    assert open_files() <= before


async def test_servers_that_are_started_again_elsewhere_are_used_again() -> None:
    """Over HTTP: a lost call ends; a server that has forgotten the session is asked for another."""
    async with asyncio.timeout(HANG_S):
        with http_servers([], ["--handshake"]) as processes:
            ports = [port for _, port in processes]
            watched = Watched([http("new", ports[0]), http("old", ports[1])], start_wait_s=HANG_S)
            await watched.servers.open()
            calls = [asyncio.create_task(watched.call(f"{era}__hang")) for era in ("new", "old")]
            for era, (process, _) in zip(("new", "old"), processes, strict=True):
                await watched.call(f"{era}__wait_for_start")
                process.kill()
                process.wait()
            again = [["--port", str(ports[0])], ["--port", str(ports[1]), "--handshake"]]
            with http_servers(*again):
                for call in calls:
                    with pytest.raises(ToolError, match="may have had an effect"):
                        await call
                assert await watched.call("new__add", a=1, b=2) == "3"
                assert await watched.call("old__add", a=1, b=2) == "3"
                await watched.servers.close()


async def test_a_server_over_http_may_refuse_us(open_servers: Watched) -> None:
    """Its tools are missing, and the log says why but not with which token we came."""
    headers = {"Authorization": "Bearer wr0ng-token"}
    secrets = frozenset({"wr0ng-token"})
    server = http("s", open_servers.guarded_port, headers=headers, secrets=secrets)
    with capture_logs() as logs:
        async with McpServers([server], start_wait_s=HANG_S) as servers:
            assert servers.tools == []
            assert servers.missing == ["s"]
    failed = next(entry for entry in logs if entry["event"] == "an MCP server cannot be reached")
    assert failed["reason"].startswith("HTTP 401: ")
    assert "wr0ng" not in str(logs)


async def a_few_rounds() -> None:
    """Lets the loop run what is ready, without waiting for anything outside."""
    for _ in range(10):
        await asyncio.sleep(0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
