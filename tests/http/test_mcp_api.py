"""§8 at the wire: tools of an MCP server that contextd starts, over stdio."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import Server
from tooling import Chat, ToolApi, call, outcomes
from wire import Json, script, until

MCP_SERVER = Path(__file__).parents[1] / "tools" / "mcp_server.py"
STOP_S = 15.0


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of MCP servers: one that works, and one that cannot be started."""
    servers = {
        "tests": {"command": sys.executable, "args": [str(MCP_SERVER)]},
        "absent": {"command": str(MCP_SERVER.with_name("no-such-server"))},
    }
    path = tmp_path_factory.mktemp("mcp") / "servers.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


@pytest.fixture(scope="module")
def server(make_server: Any, listing: Path, model: Chat) -> Server:
    started: Server = make_server(mcp_servers=listing, **model.settings)
    return started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[ToolApi]:
    client = ToolApi(server.url)
    yield client
    client.close()


@pytest.fixture
def context_id(api: ToolApi) -> str:
    """A context whose policy lets all run that these tests do not ask a person about."""
    names = ["pid", "die", "hang", "wait_for_start", "wait_for_cancel", "refuse"]
    return api.create(approval_policy={"allow": [f"tests__{name}" for name in names]})


def mcp(name: str, /, **arguments: Any) -> Json:
    """A call of a tool of the MCP server."""
    return call(f"tests__{name}", **arguments)


def offered(chat: Chat) -> list[str]:
    """The tools of the newest request to the model."""
    return [one["function"]["name"] for one in chat.requests[-1]["tools"]]


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def pid_of_mcp(api: ToolApi, context_id: str) -> int:
    """Of the MCP server, as it says itself."""
    _, (found,) = api.played(context_id, mcp("pid"))
    assert outcomes([found]) == [("tests__pid", "succeeded", None)]
    return int(api.result(context_id, found))


def test_tools_are_offered_by_name(api: ToolApi, chat: Chat) -> None:
    """`server__tool`, to clients and to the model, with schema and description."""
    context_id = api.create(provider="openai")
    names = api.context(context_id)["tools"]
    assert {"tests__add", "tests__greet", "tests__weather"} <= set(names)
    assert all(name.startswith("tests__") for name in names)
    chat.replies.append("fine")
    api.run(context_id, "hello")
    assert offered(chat) == names
    (add,) = [
        one["function"]
        for one in chat.requests[-1]["tools"]
        if one["function"]["name"] == "tests__add"
    ]
    assert add["description"] == "Adds two numbers."
    assert set(add["parameters"]["properties"]) == {"a", "b"}
    assert add["parameters"]["required"] == ["a", "b"]


def test_a_model_calls_one(api: ToolApi, chat: Chat) -> None:
    """By the name that it was offered; the result goes back to it."""
    context_id = api.create(provider="openai", tools=["tests__add"])
    chat.replies += [[("tests__add", '{"a": 2, "b": 40}')], "It is 42."]
    _, turn = api.run(context_id, "how much?")
    assert turn["status"] == "completed"
    assert offered(chat) == ["tests__add"]
    assert [message["role"] for message in chat.requests[-1]["messages"]] == [
        "user", "assistant", "tool",
    ]  # fmt: skip
    assert chat.requests[-1]["messages"][-1]["content"] == "42"


def test_plan_mode(api: ToolApi, chat: Chat) -> None:
    """Offers and runs what is read-only, and nothing else."""
    context_id = api.create(mode="plan", provider="openai")
    chat.replies.append("fine")
    api.run(context_id, "hello")
    assert offered(chat) == ["tests__add"]
    context_id = api.create(mode="plan")
    turn, found = api.played(
        context_id, mcp("add", a=2, b=3), mcp("greet", name="Ada"), mcp("weather", city="Bonn")
    )
    assert turn["status"] == "completed"
    assert outcomes(found) == [
        ("tests__add", "succeeded", None),
        ("tests__greet", "failed", "plan_mode"),
        ("tests__weather", "failed", "plan_mode"),
    ]
    assert api.result(context_id, found[0]) == "5"


def test_hints_decide_who_waits(api: ToolApi) -> None:
    """Read-only and harmless tools run; one without hints waits for a person."""
    context_id = api.create()
    turn, found = api.played(context_id, mcp("add", a=2, b=3), mcp("greet", name="Ada"))
    assert turn["status"] == "completed"
    assert [api.result(context_id, one) for one in found] == ["5", "Hello, Ada!"]
    assert not any(one["requires_approval"] for one in found)
    turn_id, (waits,) = api.pending(context_id, mcp("weather", city="Bonn"), {"text": "done"})
    assert (waits["status"], waits["requires_approval"]) == ("pending", True)
    api.decide_all(context_id, "approve")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    ran = api.call_named(context_id, "tests__weather")
    assert ran["status"] == "succeeded"
    assert json.loads(api.result(context_id, ran)) == {"city": "Bonn", "degrees": 7.5}


def test_a_denied_call_does_not_run(api: ToolApi) -> None:
    """The server is not asked: it would be dead."""
    context_id = api.create()
    before = pid_of_mcp(api, api.create(approval_policy={"allow": ["tests__pid"]}))
    turn_id, _ = api.pending(context_id, mcp("die"), {"text": "done"})
    api.decide_all(context_id, "deny")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert outcomes(api.calls(context_id)) == [("tests__die", "denied", "denied")]
    assert pid_of_mcp(api, api.create(approval_policy={"allow": ["tests__pid"]})) == before


def test_wrong_arguments_do_not_reach_it(api: ToolApi, context_id: str) -> None:
    """They are checked against its schema first."""
    _, found = api.played(context_id, mcp("add", a="two", b=3), mcp("add", a=1), {"text": "sorry"})
    assert outcomes(found) == [("tests__add", "failed", "invalid_arguments")] * 2
    assert "a" in api.result(context_id, found[0])


def test_its_own_error_is_the_result(api: ToolApi, context_id: str) -> None:
    turn, (found,) = api.played(context_id, mcp("refuse", why="not on Sundays"))
    assert turn["status"] == "completed"
    assert outcomes([found]) == [("tests__refuse", "failed", "tool_error")]
    assert "not on Sundays" in api.result(context_id, found)


def test_it_dies_in_mid_call(api: ToolApi, context_id: str, chat: Chat) -> None:
    """An error result that the model reads, whatever else ran; the next call has a new server."""
    before = pid_of_mcp(api, context_id)
    context_id = api.create(
        provider="openai", approval_policy={"allow": ["tests__die", "tests__pid"]}
    )
    chat.replies += [[("tests__die", "{}")], [("tests__pid", "{}")], "done"]
    _, turn = api.run(context_id, "go")
    assert turn["status"] == "completed"
    died, alive = api.calls(context_id)
    assert outcomes([died]) == [("tests__die", "failed", "tool_error")]
    assert chat.requests[-2]["messages"][-1]["content"] == api.result(context_id, died)
    assert outcomes([alive]) == [("tests__pid", "succeeded", None)]
    assert int(api.result(context_id, alive)) != before
    assert not psutil.pid_exists(before)
    assert "tests__add" in api.context(context_id)["tools"]


def test_it_is_killed_in_mid_call(api: ToolApi, server: Server, context_id: str) -> None:
    """From outside, while a call runs and does nothing."""
    pid = pid_of_mcp(api, context_id)
    assert pid in [child.pid for child in children(server)]
    turn_id = api.send(context_id, script(mcp("hang"), {"text": "done"}))["turn_id"]
    other = api.create(approval_policy={"allow": ["tests__wait_for_start"]})
    api.played(other, mcp("wait_for_start"))
    os.kill(pid, signal.SIGKILL)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.call_named(context_id, "tests__hang")["status"] == "failed"

    def is_back() -> bool:
        _, (found,) = api.played(other, mcp("add", a=1, b=1))
        return bool(found["status"] == "succeeded")

    until(is_back, "the server's return")
    assert pid not in [child.pid for child in children(server)]


def test_a_cancel_reaches_it(api: ToolApi, context_id: str) -> None:
    """The turn ends at once, and the tool is told."""
    turn_id = api.send(context_id, script(mcp("hang"), {"text": "done"}))["turn_id"]
    other = api.create(
        approval_policy={"allow": ["tests__wait_for_start", "tests__wait_for_cancel"]}
    )
    api.played(other, mcp("wait_for_start"))
    assert api.cancel(context_id)["cancelled_turn_id"] == turn_id
    assert outcomes(api.calls(context_id)) == [("tests__hang", "cancelled", "cancelled")]
    _, (told,) = api.played(other, mcp("wait_for_cancel"))
    assert api.result(other, told) == "cancelled"


def test_a_stop_leaves_no_child(make_server: Any, listing: Path) -> None:
    """Also while a call of the MCP server runs; the exit is clean."""
    started: Server = make_server(mcp_servers=listing)
    api = ToolApi(started.url)
    allow = {"allow": ["tests__hang", "tests__wait_for_start"]}
    context_id = api.create(approval_policy=allow)
    api.send(context_id, script(mcp("hang"), {"text": "done"}))
    api.played(api.create(approval_policy=allow), mcp("wait_for_start"))
    left = children(started)
    assert left
    assert started.stop() == 0
    _, alive = psutil.wait_procs(left, timeout=STOP_S)
    assert alive == []
    api.close()
