"""MCP servers that do not behave: late, silent, deaf, stubborn. And what is left of them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from contextd.tools import Tool, ToolError
from contextd.tools.mcp import McpLimits, McpServer, McpServers

HANG_S = 30
LOGGED = McpLimits(log_stderr=True)

# A server without the SDK, which is quick to start and can be wrong. Its first argument says how.
SMALL = """
import json, os, sys, time

mode = sys.argv[1]
first = True
waiting = None  # the call that is answered when another one is cancelled
cancelled = False


def answer(message, **result):
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)


def tool(name):
    return {"name": name, "inputSchema": {"type": "object"}}


if mode == "late" and not os.path.exists(sys.argv[2]):
    sys.exit("not yet")
for line in sys.stdin:
    message = json.loads(line)
    method = message.get("method")
    if mode == "silent":
        continue
    if mode == "picky" and first and method != "initialize":
        sys.exit("initialize comes first")
    first = False
    if method == "initialize":
        version = "1900-01-01" if mode == "ancient" else "2025-06-18"
        server = {"name": "small", "version": "1"}
        answer(message, protocolVersion=version, capabilities={"tools": {}}, serverInfo=server)
    elif method == "tools/list":
        if mode == "endless":
            page = int(message.get("params", {}).get("cursor", 0))
            answer(message, tools=[tool(f"t{page}")], nextCursor=str(page + 1))
        elif mode == "patient":
            answer(message, tools=[tool("hang"), tool("wait_for_cancel")])
        elif mode == "twice":
            answer(message, tools=[tool("pid"), tool("pid")])
        else:
            answer(message, tools=[tool("pid")])
        if mode == "deaf":
            while True:
                time.sleep(60)
        if mode == "short":
            sys.exit("enough")
    elif method == "tools/call" and mode == "wrong":
        answer(message, content="no list")
    elif method == "tools/call" and mode == "garbage":
        print("what is in an arguments' place", flush=True)
        answer(message, content=[{"type": "text", "text": "after garbage"}])
    elif method == "tools/call" and mode == "patient":
        if message["params"]["name"] == "wait_for_cancel":
            waiting = message
    elif method == "tools/call" and mode == "loud":
        print(message["params"]["arguments"]["text"], file=sys.stderr, flush=True)
        answer(message, content=[])
    elif method == "tools/call":
        answer(message, content=[{"type": "text", "text": str(os.getpid())}])
    elif method == "notifications/cancelled":
        cancelled = True
    elif "id" in message:
        error = {"code": -32601, "message": "Method not found"}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}), flush=True)
    if waiting and cancelled:
        answer(waiting, content=[{"type": "text", "text": "cancelled"}])
        waiting = None
while mode == "stubborn":
    time.sleep(60)
"""

# A process that holds such a server and is killed. On uvloop, as `contextd serve` is.
OWNER = """
import asyncio, json, sys
import uvloop
from contextd.tools.mcp import McpLimits, McpServer, McpServers


async def main():
    server = McpServer(name="s", command=sys.executable, args=tuple(json.loads(sys.argv[1])))
    async with McpServers([server]) as servers:
        print(await servers.tools[0].run({}), flush=True)
        await asyncio.Event().wait()


uvloop.run(main())
"""


def small(mode: str, *arguments: str, name: str = "s", **entry: Any) -> McpServer:
    arguments = ("-c", SMALL, mode, *arguments)
    return McpServer(name=name, command=sys.executable, args=arguments, **entry)


def only(servers: McpServers) -> Tool:
    [tool] = servers.tools
    return tool


_others: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def others() -> None:
    """Processes that earlier tests of this worker still have, such as servers that are shared."""
    _others[:] = psutil.Process().children()


def mine() -> list[psutil.Process]:
    """The processes that the test has started."""
    return [child for child in psutil.Process().children() if child not in _others]


async def test_a_silent_server_does_not_hold_up_the_others() -> None:
    """After the bound its tools are missing, and the log says whose."""
    silent, good = small("silent", name="silent"), small("good", name="good")
    with capture_logs() as logs:
        async with asyncio.timeout(HANG_S):
            async with McpServers([silent, good], start_wait_s=2) as servers:
                assert [tool.name for tool in servers.tools] == ["good__pid"]
                assert servers.missing == ["silent"]
                children = mine()
    assert {
        "event": "MCP servers are missing",
        "servers": ["silent"],
        "log_level": "warning",
    } in logs
    assert len(children) == 2
    assert not any(child.is_running() for child in children)


async def test_a_late_server_is_found_when_it_answers(tmp_path: Path) -> None:
    """It is tried again by itself, with pauses."""
    sign, listed = tmp_path / "sign", asyncio.Event()
    server = small("late", str(sign))
    async with asyncio.timeout(HANG_S):
        async with McpServers([server], changed=lambda _: listed.set()) as servers:
            assert servers.missing == ["s"]
            sign.touch()
            await listed.wait()
            assert servers.missing == []
            assert await only(servers).run({})


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (McpServer(name="s", command="/none/such"), "it cannot be started: No such file"),
        (
            McpServer(name="s", command="/", args=("x",)),
            "it cannot be started: Permission denied: /.",
        ),
        (McpServer(name="s", command=sys.executable, cwd="/none"), "it cannot be st"),
        (McpServer(name="s", url="http://127.0.0.1:1/mcp"), "it cannot be reached: ConnectError."),
        (McpServer(name="s", command="true"), "it closed the connection."),
        (small("ancient"), "RuntimeError."),
    ],
    ids=["none", "no program", "no folder", "no port", "ends", "ancient"],
)
async def test_a_server_that_cannot_be_reached_is_reported(server: McpServer, reason: str) -> None:
    """At once, with the reason; it is no error of ours."""
    with capture_logs() as logs:
        async with McpServers([server], start_wait_s=HANG_S) as servers:
            assert servers.tools == []
            assert servers.missing == ["s"]
    first = next(entry for entry in logs if entry["event"] == "an MCP server cannot be reached")
    assert first["reason"].startswith(reason)


async def test_an_old_server_that_quits_at_a_newer_question_is_reached() -> None:
    """Every other try begins as servers have known it from the start."""
    listed = asyncio.Event()
    async with asyncio.timeout(HANG_S):
        async with McpServers([small("picky")], changed=lambda _: listed.set()) as servers:
            await listed.wait()
            assert await only(servers).run({})


async def test_a_server_that_ends_again_and_again_is_not_started_for_every_call() -> None:
    """The pause grows; a call in it is refused at once and has not been made."""
    async with asyncio.timeout(HANG_S):
        async with McpServers([small("short")], start_wait_s=HANG_S) as servers:
            with capture_logs() as logs:
                words = ""
                while "tried again in" not in words:
                    with pytest.raises(ToolError) as caught:
                        await only(servers).run({})
                    words = str(caught.value)
            assert words.endswith("The tool has not been called.")
    assert sum(entry["event"] == "an MCP server is lost" for entry in logs) <= 4


async def test_a_deaf_server_does_not_hold_up_a_cancel() -> None:
    """Though it cannot be told, since it does not read. On close it is ended all the same."""
    async with asyncio.timeout(HANG_S):
        async with McpServers([small("deaf")], start_wait_s=HANG_S) as servers:
            calls = [asyncio.create_task(only(servers).run({"x": "x" * 1_000_000})) for _ in "ab"]
            for _ in range(10):
                await asyncio.sleep(0)
            [child] = mine()
            for call in calls:
                call.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert all(call.cancelled() for call in calls)
        assert not child.is_running()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_close_ends_a_stubborn_server_and_calls_that_run() -> None:
    """In parallel, however many there are, and nothing is left behind."""
    async with asyncio.timeout(HANG_S):
        servers = McpServers(
            [small("stubborn", name="a"), small("stubborn", name="b"), small("deaf", name="c")],
            start_wait_s=HANG_S,
        )
        await servers.open()
        children = mine()
        tool = servers.tools[-1]
        call = asyncio.create_task(tool.run({}))
        await asyncio.sleep(0)
        await servers.close()
        with pytest.raises(ToolError, match=r"ended before|stopping"):
            await call
        with pytest.raises(ToolError, match=r"contextd is stopping\. The tool has not been called"):
            await tool.run({})
        await servers.close()
    assert len(children) == 3
    assert not any(child.is_running() for child in children)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_open_that_is_cancelled_leaves_nothing() -> None:
    """Neither a task nor a process."""
    servers = McpServers([small("silent")], start_wait_s=HANG_S)
    opening = asyncio.create_task(servers.open())
    while not mine():
        await asyncio.sleep(0)
    children = mine()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await asyncio.to_thread(psutil.wait_procs, children, timeout=HANG_S)
    assert not any(child.is_running() for child in children)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_child_ends_when_its_owner_is_killed() -> None:
    """It sees the end of its input."""
    arguments = json.dumps(small("good").args)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        said = next(line for line in owner.stdout if line.strip().isdigit())
        child = psutil.Process(int(said))
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()
    child.wait(timeout=HANG_S)


async def test_answers_of_wrong_form_are_errors_of_the_tool() -> None:
    """And say that it has run."""
    async with McpServers([small("wrong")], start_wait_s=HANG_S) as servers:
        with pytest.raises(ToolError, match=r"wrong form\. The tool has run\."):
            await only(servers).run({})


async def test_garbage_between_answers_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """Nor is it logged, since it may be anything."""
    async with McpServers([small("garbage")], start_wait_s=HANG_S) as servers:
        assert await only(servers).run({}) == "after garbage"
    assert "place" not in caplog.text


async def test_an_endless_list_has_an_end() -> None:
    """So many pages are read, and no more."""
    async with McpServers([small("endless")], start_wait_s=HANG_S) as servers:
        assert [tool.name for tool in servers.tools] == [f"s__t{page}" for page in range(100)]


async def test_of_two_tools_with_one_name_the_first_counts() -> None:
    """And the log says that something is left out."""
    with capture_logs() as logs:
        async with McpServers([small("twice")], start_wait_s=HANG_S) as servers:
            assert only(servers).name == "s__pid"
    assert any(entry["event"] == "an MCP server's tools are left out" for entry in logs)


async def test_a_call_may_have_a_bound_of_its_own() -> None:
    """Then the server is told, and the error says that the tool may have run."""
    async with McpServers([small("patient", timeout_s=0.2)], start_wait_s=HANG_S) as servers:
        hang, wait_for_cancel = servers.tools
        with pytest.raises(ToolError, match=r"within 0\.2 s and was cancelled\. It may have had"):
            await hang.run({})
        assert await wait_for_cancel.run({}) == "cancelled"


async def test_the_list_of_an_entry_bounds_what_is_offered() -> None:
    """And names that the server does not have are reported."""
    server = small("patient", tools=("hang", "hnag"), requires_approval=("hang",))
    with capture_logs() as logs:
        async with McpServers([server], start_wait_s=HANG_S) as servers:
            assert only(servers).name == "s__hang"
            assert only(servers).requires_approval
    [warning] = [entry for entry in logs if "does not have" in entry["event"]]
    assert warning["missing"] == ["hnag"]


async def test_what_a_child_complains_of_is_logged() -> None:
    """Where it was asked for: line by line, without secrets, and cut."""
    server = small("loud", secrets=frozenset({"s3cret"}))
    with capture_logs() as logs:
        async with McpServers([server], start_wait_s=HANG_S, limits=LOGGED) as servers:
            text = f"my key is s3cret\n\n{'x' * 100_000}\nand\nmore"
            assert await only(servers).run({"text": text}) == ""
    said = [entry for entry in logs if entry["event"] == "an MCP server says"]
    assert [entry["line"] for entry in said] == ["my key is ***", "x" * 1000, "and", "more"]
    assert {(entry["log_level"], entry["server"]) for entry in said} == {("info", "s")}


async def test_a_child_that_complains_without_end_does_not_fill_the_log() -> None:
    """So many lines a second, and then how many were left out."""
    with capture_logs() as logs:
        async with McpServers([small("loud")], start_wait_s=HANG_S, limits=LOGGED) as servers:
            await only(servers).run({"text": "line\n" * 100_000})
    said = sum(entry["event"] == "an MCP server says" for entry in logs)
    assert 0 < said < 10_000


async def test_what_a_child_complains_of_is_read_and_not_logged() -> None:
    """It may quote what people have said, so somebody has to ask for it. A full pipe would stop it."""
    with capture_logs() as logs:
        async with McpServers([small("loud")], start_wait_s=HANG_S) as servers:
            assert await only(servers).run({"text": "their words\n" * 100_000}) == ""
    assert "their words" not in str(logs)
