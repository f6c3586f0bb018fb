"""Calls of tools that wait: who says so, who shows them, and `contextd decide`, at a real server."""

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cli_parts import Ran, Screen
from serving import Server

from contextd.client import StateChange, SyncClient
from contextd.core.tool_call import ToolCall

Contextd = Callable[..., Ran]
Command = tuple[list[str], dict[str, str]]
WAIT_S = 60  # a hang, not a measure

WEATHER = {
    "name": "weather",
    "description": "Says what the weather is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "external": True,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose `write_file` waits for a person."""
    folder = tmp_path_factory.mktemp("decide")
    (folder / "notes").mkdir()
    settings = {"scripted_rate": 0, "workspace": folder / "notes"}
    with Server(folder / "contextd.db", settings=settings) as running:
        yield running


@pytest.fixture
def url(server: Server) -> str:
    return server.url


@pytest.fixture
def client(server: Server) -> Iterator[SyncClient]:
    with SyncClient(server.url) as client:
        yield client


def write(path: str, content: str = "Tea") -> dict[str, Any]:
    """A step of a script: a call that waits for a person."""
    return {"tool_call": {"name": "write_file", "arguments": {"path": path, "content": content}}}


def script(*steps: dict[str, Any]) -> str:
    return json.dumps({"script": [*steps, {"text": "done"}]})


def reach(client: SyncClient, context_id: str, state: str) -> None:
    for event in client.follow(context_id):
        if isinstance(event, StateChange) and event.state == state:
            return


def waiting(client: SyncClient, *paths: str) -> tuple[str, list[ToolCall]]:
    """A context with calls that wait to write these files."""
    context_id = client.create_context().id
    client.send(context_id, script(*map(write, paths)))
    reach(client, context_id, "awaiting_tool_approval")
    return context_id, list(client.tool_calls(context_id))


def ended(client: SyncClient, context_id: str) -> list[ToolCall]:
    reach(client, context_id, "idle")
    return list(client.tool_calls(context_id))


def text_of(client: SyncClient, call: ToolCall) -> str:
    return client.pull(call.context_id, str(call.result_message_id)).content


class Running:
    """`contextd *arguments` with its outputs in pipes; gone when the test ends."""

    def __init__(self, command: Command, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*command[0], *arguments],
            env=command[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog = threading.Timer(WAIT_S, self.process.kill)
        self._watchdog.start()

    def complaint(self) -> str:
        """The next line on standard error; "" when there is none any more."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self) -> tuple[int, str, str]:
        """The exit code, and what else it printed."""
        out, err = self.process.communicate(timeout=WAIT_S)
        self._watchdog.cancel()
        return self.process.returncode, out, err


@pytest.fixture
def start(command: Command) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*arguments: str) -> Running:
        started.append(Running(command, *arguments))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.end()


# Who waits for what


def test_send_into_a_pipe_says_what_it_waits_for(
    start: Callable[..., Running], contextd: Contextd, client: SyncClient, url: str
) -> None:
    """On standard error, with the way to decide; the pipe gets the answer's text as ever."""
    context_id = client.create_context().id
    sending = start("send", context_id, script({"text": "I ask. "}, write("a.md")))
    said = sending.complaint()
    (call,) = client.tool_calls(context_id)
    assert said == (
        "contextd: waits for a decision on "
        f'write_file {{"path":"a.md","content":"Tea"}}, call {call.id}\n'
    )
    assert sending.complaint() == (
        f"contextd: decide with: contextd decide {context_id} approve --call {call.id} --url {url}"
        " (or deny)\n"
    )
    assert contextd("decide", context_id, "approve").code == 0
    assert sending.end() == (0, "I ask. \ndone", "")


def path_in(line: str) -> str | None:
    """The file in a line that names a call; none in one that says how to decide."""
    found = re.search(r'waits for a decision on .*"path":"(\w+)"', line)
    return found and found[1]


def test_each_call_is_named_once(
    start: Callable[..., Running], contextd: Contextd, client: SyncClient
) -> None:
    """Also while others are decided, and in the next reply of the same turn."""
    context_id = client.create_context().id
    sending = start("send", context_id, script(write("a"), write("b"), {"text": "x"}, write("c")))
    assert [path_in(sending.complaint()) for _ in range(3)] == ["a", "b", None]
    first, _ = client.tool_calls(context_id)
    contextd("decide", context_id, "deny", "--call", first.id)
    contextd("decide", context_id, "approve")
    assert [path_in(sending.complaint()) for _ in range(2)] == ["c", None]
    contextd("decide", context_id, "approve")
    assert sending.end()[::2] == (0, "")


def test_long_arguments_are_cut_in_a_line_that_says_who_waits(
    start: Callable[..., Running], contextd: Contextd, client: SyncClient
) -> None:
    """The id is still there, and `show` has all of them."""
    context_id = client.create_context().id
    sending = start("send", context_id, script(write("a.md", "y" * 5000)))
    said = sending.complaint()
    (call,) = client.tool_calls(context_id)
    assert len(said) < 400
    assert said.endswith(f"y…, call {call.id}\n")
    assert "y" * 5000 in contextd("show", context_id).out.decode().splitlines()[-1]
    client.cancel(context_id)
    assert sending.end()[0] == 1


def test_send_says_whose_result_it_waits_for(
    start: Callable[..., Running], client: SyncClient
) -> None:
    """An external tool's, which somebody has to run."""
    context_id = client.create_context(tools=[WEATHER]).id
    step = {"tool_call": {"name": "weather", "arguments": {"city": "Bonn"}}}
    sending = start("send", context_id, script(step))
    said = sending.complaint()
    (call,) = client.tool_calls(context_id)
    line = f'waits for the result of weather {{"city":"Bonn"}}, call {call.id}'
    assert said == f"contextd: {line}\n"
    client.post_result(context_id, call.id, "Rain.")
    assert sending.end() == (0, "done", "")


def test_a_screen_names_tools_above_calls_and_results(
    on_screen: Callable[..., Screen], contextd: Contextd, client: SyncClient
) -> None:
    """A word on who waits begins a line of its own."""
    context_id = client.create_context().id
    plain = {"NO_COLOR": "1", "TERM": "dumb"}
    screen = on_screen("send", context_id, script(write("a.md")), **plain)
    screen.read_until(b"(or deny)")
    contextd("decide", context_id, "deny", "--reason", "No tea.")
    seen = screen.read_to_end().replace("\r\n", "\n")
    assert '── call of write_file\n{"path":"a.md","content":"Tea"}\ncontextd: waits for' in seen
    assert "── result of write_file (denied)\n" in seen
    assert "No tea." in seen
    assert seen.endswith("\ndone\n")


def test_tail_says_who_waits(
    start: Callable[..., Running], contextd: Contextd, client: SyncClient
) -> None:
    """Of calls that waited before it came, too; its output has the tools' names."""
    context_id, (call,) = waiting(client, "a.md")
    plain, lines = start("tail", context_id), start("tail", context_id, "--json")
    for tail in (plain, lines):
        assert f"call {call.id}" in tail.complaint()
        assert "contextd decide" in tail.complaint()
    contextd("decide", context_id, "approve")
    result = str(ended(client, context_id)[0].result_message_id)
    client.delete_context(context_id)
    code, out, err = plain.end()
    assert (code, err) == (0, "")
    assert f'── call of write_file {call.message_id}\n{{"path":"a.md","content":"Tea"}}\n' in out
    assert f"── result of write_file {result}\n" in out
    code, out, err = lines.end()
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["state"] == "deleted"


def test_show_lists_the_calls_that_wait(contextd: Contextd, client: SyncClient) -> None:
    """At the end, with name, arguments and id; as JSON whole."""
    context_id, calls = waiting(client, "a.md", "b.md")
    lines = contextd("show", context_id).out.decode().splitlines()
    assert lines[-2:] == [
        f'· waits for a decision: write_file {{"path":"{name}","content":"Tea"}}, call {call.id}'
        for name, call in zip(("a.md", "b.md"), calls, strict=True)
    ]
    assert f"── call of write_file {calls[0].message_id}" in lines
    shown = json.loads(contextd("show", context_id, "--json").out)
    assert [call["id"] for call in shown["pending_tool_calls"]] == [call.id for call in calls]
    contextd("decide", context_id, "deny")
    denied = ended(client, context_id)[0]
    out = contextd("show", context_id).out.decode()
    assert f"── result of write_file (denied) {denied.result_message_id}\n" in out
    assert "waits for a decision" not in out


def test_a_call_without_a_name_can_be_shown(contextd: Contextd, client: SyncClient) -> None:
    """A producer may write messages of these kinds with any metadata, or none."""
    context_id = client.create_context().id
    for message_id, metadata in (("m", {}), ("n", {"name": "a\n── b", "error": ["x", 1]})):
        produced = client.produce(
            context_id, message_id=message_id, kind="tool_result", metadata=metadata
        )
        with produced as message:
            message.write("text")
    lines = contextd("show", context_id).out.decode().splitlines()
    assert lines[-4:] == [
        "── result of a tool m",
        "text",
        "── result of a ── b (['x', 1]) n",
        "text",
    ]


# Decisions


def test_all_that_wait_are_approved(contextd: Contextd, client: SyncClient) -> None:
    """Each is named, and the state after."""
    context_id, calls = waiting(client, "a.md", "b.md")
    ran = contextd("decide", context_id, "approve")
    *named, last = ran.out.decode().splitlines()
    assert (ran.code, ran.err) == (0, "")
    assert named == [
        f'approved write_file {{"path":"{name}","content":"Tea"}}, call {call.id}'
        for name, call in zip(("a.md", "b.md"), calls, strict=True)
    ]
    assert last == "the context is executing_tools"
    assert [call.status for call in ended(client, context_id)] == ["succeeded", "succeeded"]


def test_only_the_named_are_decided(contextd: Contextd, client: SyncClient) -> None:
    """--call may be repeated; the others go on waiting."""
    context_id, (a, b, c) = waiting(client, "a.md", "b.md", "c.md")
    ran = contextd("decide", context_id, "deny", "--call", a.id, "--call", c.id, "--reason", "No.")
    assert ran.out.decode() == (
        f"denied call {a.id}\ndenied call {c.id}\nthe context is awaiting_tool_approval\n"
    )
    assert client.get_context(context_id).pending_tool_calls == [b.id]
    contextd("decide", context_id, "approve", "--call", b.id)
    calls = ended(client, context_id)
    assert [call.status for call in calls] == ["denied", "succeeded", "denied"]
    assert "No." in text_of(client, calls[0])


def test_arguments_are_put_in_place_of_the_models(contextd: Contextd, client: SyncClient) -> None:
    """Of the one call that is meant."""
    context_id, _ = waiting(client, "a.md")
    other = {"path": "other.md", "content": "é"}
    ran = contextd("decide", context_id, "approve", "--arguments", json.dumps(other))
    assert ran.code == 0
    (call,) = ended(client, context_id)
    assert (call.status, call.arguments) == ("succeeded", other)


def test_decide_json_is_one_document(contextd: Contextd, client: SyncClient) -> None:
    """What was decided, and the state."""
    context_id, (call,) = waiting(client, "a.md")
    ran = contextd("decide", context_id, "deny", "--reason", "No.", "--json")
    said = {"tool_call_id": call.id, "decision": "deny", "reason": "No.", "arguments": None}
    answer = json.loads(ran.out)
    assert answer["decisions"] == [said]
    assert answer["state"]


def test_deciding_again_is_harmless_and_otherwise_refused(
    contextd: Contextd, client: SyncClient
) -> None:
    """One line on standard error, and nothing on standard output."""
    context_id, (call, _) = waiting(client, "a.md", "b.md")
    for _ in range(2):
        assert contextd("decide", context_id, "approve", "--call", call.id).code == 0
    ran = contextd("decide", context_id, "deny", "--call", call.id)
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.endswith(" (tool_call_decided)\n")
    assert ran.err.count("\n") == 1


def test_nothing_to_decide_is_an_error(contextd: Contextd, client: SyncClient) -> None:
    """As are a call and a context that are not there."""
    context_id = client.create_context().id
    ran = contextd("decide", context_id, "approve")
    assert (ran.code, ran.out, ran.err) == (1, b"", "contextd: no call waits for a decision\n")
    ran = contextd("decide", context_id, "approve", "--call", "unknown")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.endswith(" (tool_call_not_found)\n")
    ran = contextd("decide", "nowhere", "approve")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.endswith(" (context_not_found)\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["perhaps"], "'perhaps' is not one of"),
        (["approve", "--arguments", "[1]"], "--arguments is not a JSON object."),
        (["approve", "--arguments", "{"], "--arguments is not a JSON object."),
        (["deny", "--arguments", "{}"], "--arguments goes with approve"),
        (["approve", "--reason", "x"], "--reason goes with deny"),
        (["approve", "--arguments", "{}"], "--arguments is for one call, and 2 are meant."),
    ],
)
def test_what_makes_no_sense_is_bad_usage(
    contextd: Contextd, client: SyncClient, arguments: list[str], complaint: str
) -> None:
    """Exit code 2, one line, and nothing is decided."""
    context_id, calls = waiting(client, "a.md", "b.md")
    ran = contextd("decide", context_id, *arguments)
    assert (ran.code, ran.out) == (2, b"")
    assert complaint in ran.err
    assert ran.err.count("\n") == 1
    assert list(client.tool_calls(context_id, statuses=["pending"])) == calls
