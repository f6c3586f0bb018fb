"""§6 and §8 at the wire when something goes wrong: tools that fail or hang, cancels, crashes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tooling import ASK, Place, ToolApi, ask, call, outcomes, serving_tools, start_with_tools
from wire import ENDLESS, Json, ok, problem, script, until

HARMLESS_TOOLS = ["hold", "hold_again", "block", "stubborn"]


@pytest.fixture(scope="module")
def api(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolApi]:
    """A server with tools and all the patience there is by default."""
    with serving_tools(make_server, tmp_path_factory.mktemp("workspace")) as client:
        yield client


@pytest.fixture(scope="module")
def hasty(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolApi]:
    """A server with little patience for tools, and small results."""
    settings = {"tool_timeout_s": 0.2, "tool_result_bytes_max": 1000}
    with serving_tools(make_server, tmp_path_factory.mktemp("workspace"), **settings) as client:
        yield client


@pytest.fixture(scope="module")
def brief(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolApi]:
    """A server that gives a turn one second of work."""
    settings = {"turn_timeout_s": 1}
    with serving_tools(make_server, tmp_path_factory.mktemp("workspace"), **settings) as client:
        yield client


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create()


# Tools that fail


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (call("fail", words="boom"), "tool_exception"),
        (call("fail", words=""), "tool_exception"),
        (call("fail", words="x" * 100_000), "tool_exception"),
        (call("leave"), "tool_exception"),
        (call("refuse", words="cannot"), "tool_error"),
        (call("unspeakable"), "invalid_result"),
    ],
)
def test_a_tool_that_fails_is_an_error_result(
    api: ToolApi, context_id: str, step: Json, error: str
) -> None:
    """The model is told, the others' results stay, the turn and the server go on."""
    turn, found = api.played(context_id, step, call("echo", text="fine"), {"text": "so"})
    assert (turn["status"], turn["error"]) == ("completed", None)
    assert outcomes(found) == [
        (step["tool_call"]["name"], "failed", error), ("echo", "succeeded", None),
    ]  # fmt: skip
    assert api.result(context_id, found[0])
    assert api.message(context_id, found[0]["result_message_id"])["status"] == "completed"
    assert found[0]["duration_ms"] >= 0


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (call("garbled"), "caf\ufffd \ufffd\ufffd\ufffd end"),
        (call("halved"), "half \ufffd end"),
        (call("answers", count=3), '{"numbers":[0,1,2],"none":null}'),
    ],
)
def test_a_result_that_is_no_plain_text(
    api: ToolApi, context_id: str, step: Json, text: str
) -> None:
    """Becomes text that can be stored; what cannot is replaced."""
    _, (found,) = api.played(context_id, step)
    assert found["status"] == "succeeded"
    assert api.result(context_id, found) == text


def test_a_result_of_nothing(api: ToolApi, context_id: str) -> None:
    """Is a result too."""
    _, (found,) = api.played(context_id, call("nothing"), {"text": "so"})
    assert found["status"] == "succeeded"
    assert api.message(context_id, found["result_message_id"])["status"] == "completed"


def test_a_giant_result_is_cut(api: ToolApi, hasty: ToolApi) -> None:
    """At the limit; the stored chunks are of a size that can be pulled."""
    for client, size, limit in ((api, 50_000_000, 256 * 1024), (hasty, 5000, 1000)):
        context_id = client.create()
        turn, (found,) = client.played(context_id, call("giant", size_bytes=size), {"text": "so"})
        assert (turn["status"], found["status"]) == ("completed", "succeeded")
        text = client.result(context_id, found)
        assert text.startswith("xxx")
        assert len(text.encode()) <= limit
        assert set(text[-20:]) != {"x"}, "nothing says that it was cut"


def test_a_tool_that_takes_too_long(hasty: ToolApi, place: Place) -> None:
    """`timed_out`, the model is told, the others' results stay, the tool was stopped."""
    context_id = hasty.create()
    turn, found = hasty.played(
        context_id, place.holding(), call("echo", text="fine"), {"text": "so"}
    )
    assert turn["status"] == "completed"
    assert [one["status"] for one in found] == ["timed_out", "succeeded"]
    assert found[0]["error"]
    assert hasty.result(context_id, found[0])
    assert place.lines() == ["began", "stopped"]


@pytest.mark.parametrize("name", ["block", "stubborn"])
def test_a_tool_that_cannot_be_stopped_is_left_behind(
    hasty: ToolApi, place: Place, name: str
) -> None:
    """`timed_out` all the same; what it answers later is nobody's."""
    context_id = hasty.create()
    turn, (found,) = hasty.played(context_id, place.holding(name), {"text": "so"})
    assert (turn["status"], found["status"]) == ("completed", "timed_out")
    result = hasty.result(context_id, found)
    place.open()
    assert hasty.played(context_id, call("echo", text="x"))[0]["status"] == "completed"
    assert hasty.calls(context_id)[0] == found
    assert hasty.result(context_id, found) == result


# Cancels, deletes, limits while a tool runs


@pytest.mark.parametrize("name", HARMLESS_TOOLS)
def test_a_cancel_while_a_tool_runs(api: ToolApi, context_id: str, place: Place, name: str) -> None:
    """idle at once; the call cancelled, what was said kept; the tool is stopped or left behind."""
    turn_id, _ = api.waiting(
        context_id, {"text": "let me see "}, call("echo", text="quick"), place.holding(name),
        state="executing_tools",
    )  # fmt: skip
    place.began()
    until(lambda: api.call_named(context_id, "echo")["status"] == "succeeded")
    assert api.cancel(context_id) == {"state": "idle", "cancelled_turn_id": turn_id}
    assert [one["status"] for one in api.calls(context_id)] == ["succeeded", "cancelled"]
    settled, messages = api.context(context_id), api.messages(context_id, include="content")
    assert [message["kind"] for message in messages[1:3]] == ["text", "tool_call"]
    assert messages[1]["content"] == "let me see "
    assert settled["open_messages"] == []
    if name in ("hold", "hold_again"):
        until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")
    place.open()
    if name == "block":
        until(lambda: place.lines() == ["began", "ended"], "the end of the thread")
    assert api.turn(context_id, turn_id)["status"] == "cancelled"
    assert api.context(context_id) == settled
    assert api.messages(context_id, include="content") == messages
    assert api.played(context_id, call("echo", text="on"))[0]["status"] == "completed"


def test_a_cancel_starts_what_was_queued(api: ToolApi, context_id: str, place: Place) -> None:
    """Although the tool of the cancelled turn cannot be stopped."""
    turn_id, _ = api.waiting(context_id, place.holding("block"), state="executing_tools")
    place.began()
    queued = api.send(context_id, script(call("echo", text="next")))
    cancelled = api.cancel(context_id)
    assert cancelled["cancelled_turn_id"] == turn_id
    assert api.ended(context_id, queued["turn_id"])["status"] == "completed"
    assert [one["status"] for one in api.calls(context_id)] == ["cancelled", "succeeded"]


def test_an_interrupt_while_a_tool_runs(api: ToolApi, context_id: str, place: Place) -> None:
    turn_id, _ = api.waiting(context_id, place.holding(), state="executing_tools")
    place.began()
    answer = api.send(context_id, "now", on_busy="interrupt")
    assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    assert api.turn(context_id, turn_id)["status"] == "cancelled"
    until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")


@pytest.mark.parametrize("name", HARMLESS_TOOLS)
def test_a_delete_while_a_tool_runs(api: ToolApi, context_id: str, place: Place, name: str) -> None:
    """Everything is gone, and what the tool does later is nobody's."""
    api.waiting(context_id, place.holding(name), state="executing_tools")
    place.began()
    with api.stream(context_id) as stream:
        stream.current()
        assert api.http.delete(f"/contexts/{context_id}").status_code == 204
        assert stream.until_state("deleted")
    place.open()
    problem(api.http.get(f"/contexts/{context_id}/tool-calls"), 404, "context_not_found")
    problem(api.http.get(f"/contexts/{context_id}"), 404, "context_not_found")
    other = api.create()
    assert api.played(other, call("echo", text="x"))[0]["status"] == "completed"


def test_a_cancel_in_a_later_round(api: ToolApi, context_id: str, place: Place) -> None:
    """While the model answers the results: rounds before stay as they are."""
    turn_id = api.send(
        context_id, script(call("echo", text="1"), {"text": "half "}, {"delay_ms": 600_000})
    )["turn_id"]
    until(lambda: any(m["kind"] == "text" for m in api.context(context_id)["open_messages"]))
    assert api.cancel(context_id)["cancelled_turn_id"] == turn_id
    (found,) = api.calls(context_id)
    assert found["status"] == "succeeded"
    last = api.messages(context_id, include="content")[-1]
    assert (last["status"], last["content"]) == ("cancelled", "half ")


def test_a_cancel_while_arguments_come(api: ToolApi, context_id: str) -> None:
    """The message of the call is closed at its head; no call came of it."""
    api.send(context_id, script({"rate": 20}, call("echo", text="word " * 400)))
    opened = api.opened(context_id)
    assert opened["kind"] == "tool_call"
    api.cancel(context_id)
    message = api.message(context_id, opened["message_id"])
    assert message["status"] == "cancelled"
    assert message["final_sequence"] >= 1
    assert api.calls(context_id) == []
    assert api.run(context_id, "on")[1]["status"] == "completed"


def test_the_turns_limit_while_a_tool_runs(brief: ToolApi, place: Place) -> None:
    """`fail` from `executing_tools`: the call is cancelled, the tool stopped; a retry starts anew."""
    context_id = brief.create()
    turn_id, _ = brief.waiting(
        context_id, call("echo", text="x"), place.holding(), {"text": "done"},
        state="executing_tools",
    )  # fmt: skip
    turn = brief.ended(context_id, turn_id)
    assert (turn["status"], turn["error"]["type"]) == ("failed", "turn_timeout")
    last = brief.journal(context_id)[-1]
    assert (last["trigger"], last["from_state"]) == ("fail", "executing_tools")
    assert [one["status"] for one in brief.calls(context_id)] == ["succeeded", "cancelled"]
    until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")
    assert brief.replies(context_id, turn_id)
    place.open()
    again = ok(brief.http.post(f"/contexts/{context_id}/retry"), 202)
    assert brief.ended(context_id, again["turn_id"])["status"] == "completed"
    assert [one["status"] for one in brief.calls(context_id)[2:]] == ["succeeded", "succeeded"]
    assert brief.turn(context_id, again["turn_id"])["retry_of"] == turn_id


# The model fails in between


def test_a_broken_attempt_leaves_no_calls(api: ToolApi, context_id: str, place: Place) -> None:
    """Calls are written with `end_stream` only: what broke before is superseded, and runs once."""
    turn, found = api.played(
        context_id, call("note", path=place.runs), {"error": "transient", "times": 1},
        {"text": "done"},
    )  # fmt: skip
    assert turn["status"] == "completed"
    assert turn["attempt"] == 2
    assert outcomes(found) == [("note", "succeeded", None)]
    assert place.lines() == ["ran"]


def test_a_transient_error_in_a_later_round(api: ToolApi, context_id: str, place: Place) -> None:
    """The tools of the rounds before are not run again; results stay."""
    turn, found = api.played(
        context_id, call("note", path=place.runs, line="1"), {"text": "half "},
        {"error": "transient", "times": 1}, {"text": "whole"},
    )  # fmt: skip
    assert (turn["status"], turn["attempt"]) == ("completed", 2)
    assert place.lines() == ["1"]
    assert len(found) == 1
    kinds = [(m["kind"], m["status"]) for m in api.messages(context_id)[1:]]
    assert kinds == [
        ("tool_call", "completed"), ("tool_result", "completed"), ("text", "completed"),
    ]  # fmt: skip
    triggers = api.steps(context_id)
    assert triggers.count("fail_transiently") == 1
    assert triggers.count("execute_tools") == 1


def test_a_retry_after_tools(api: ToolApi, context_id: str, place: Place) -> None:
    """A new turn from the message on: the tools run again, the failed turn's calls stay listed."""
    turn, _ = api.played(
        context_id, call("note", path=place.runs), {"text": "oh "}, {"error": "fatal"}
    )
    assert turn["status"] == "failed"
    assert place.lines() == ["ran"]
    again = ok(api.http.post(f"/contexts/{context_id}/retry"), 202)
    retried = api.ended(context_id, again["turn_id"])
    assert (retried["status"], retried["retry_of"]) == ("failed", turn["id"])
    assert place.lines() == ["ran", "ran"]
    found = api.calls(context_id)
    assert [one["turn_id"] for one in found] == [turn["id"], retried["id"]]
    assert [one["status"] for one in found] == ["succeeded", "succeeded"]


# Crashes


def test_a_crash_while_tools_run(tmp_path: Path, place: Place) -> None:
    """Only what is declared idempotent runs again; the rest ends `outcome_unknown` (§8)."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    other = Place(tmp_path / "other")
    other.folder.mkdir()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    context_id = api.create(tools=["echo", "hold", "hold_again", ASK])
    turn_id, _ = api.waiting(
        context_id, call("echo", text="before"), place.holding("hold"),
        other.holding("hold_again"), ask(), {"text": "done"}, state="executing_tools",
    )  # fmt: skip
    place.began()
    other.began()
    until(lambda: api.call_named(context_id, "echo")["status"] == "succeeded")
    api.answer(context_id, api.call_named(context_id, "ask")["id"], "before the crash")
    server.kill()
    api.close()
    before = len(other.lines())
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        until(lambda: len(other.lines()) > before, "the second run")
        until(lambda: api.call_named(context_id, "hold")["status"] == "failed")
        assert api.context(context_id)["state"] == "executing_tools"
        other.open()
        turn = api.ended(context_id, turn_id)
        assert (turn["status"], turn["attempt"]) == ("completed", 1)
        found = api.calls(context_id)
        assert outcomes(found) == [
            ("echo", "succeeded", None), ("hold", "failed", "outcome_unknown"),
            ("hold_again", "succeeded", None), ("ask", "succeeded", None),
        ]  # fmt: skip
        assert [api.result(context_id, one) for one in found[::2]] == ["before", "released"]
        assert "outcome_unknown" in api.result(context_id, found[1])
        assert place.lines() == ["began"]
        assert other.lines() == ["began", "began", "ended"]
        recovered = [e for e in api.journal(context_id) if e["trigger"] == "recover"]
        assert [(e["from_state"], e["to_state"]) for e in recovered] == [
            ("executing_tools", "executing_tools")
        ]
        api.close()
    finally:
        server.kill()


def test_a_crash_in_a_later_round(tmp_path: Path, place: Place) -> None:
    """The model is asked again for the answer to the results, which costs an attempt; no tool runs."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    context_id = api.create()
    steps = [call("note", path=place.runs), {"text": "half "}, {"delay_ms": 500}, {"text": "more"}]
    turn_id = api.send(context_id, script(*steps))["turn_id"]
    until(lambda: any(m["kind"] == "text" for m in api.context(context_id)["open_messages"]))
    server.kill()
    api.close()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        turn = api.ended(context_id, turn_id)
        assert (turn["status"], turn["attempt"]) == ("completed", 2)
        assert place.lines() == ["ran"]
        contents = [m["content"] for m in api.messages(context_id, include="content")[2:]]
        assert contents == ["noted", "half more"]
        api.close()
    finally:
        server.kill()


def test_a_clean_stop_while_a_tool_runs(tmp_path: Path, place: Place) -> None:
    """The server stops in time although a tool hangs; the turn goes on at the next start."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    held, blocked = api.create(), api.create()
    other = Place(tmp_path / "other")
    other.folder.mkdir()
    turn_ids = [
        api.waiting(held, place.holding("hold_again"), state="executing_tools")[0],
        api.waiting(blocked, other.holding("block"), state="executing_tools")[0],
    ]
    place.began()
    other.began()
    assert server.stop() == 0
    api.close()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        place.began(2)
        place.open()
        assert api.ended(held, turn_ids[0])["status"] == "completed"
        assert api.ended(blocked, turn_ids[1])["status"] == "completed"
        assert outcomes(api.calls(held)) == [("hold_again", "succeeded", None)]
        assert outcomes(api.calls(blocked)) == [("block", "failed", "outcome_unknown")]
        assert other.lines() == ["began"]
        api.close()
    finally:
        server.kill()


def test_a_cancel_by_another_process(tmp_path: Path, place: Place) -> None:
    """One transaction by whoever got the request; the process that runs the tool finds out (§6)."""
    settings = {"scripted_rate": 0, "poll_s": 0.05, "lease_s": 1}

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={**settings, **more}).start()

    first, second = start_with_tools(make), start_with_tools(make)
    one, two = ToolApi(first.url), ToolApi(second.url)
    try:
        context_id = one.create()
        turn_id, _ = one.waiting(context_id, place.holding(), state="executing_tools")
        place.began()
        assert two.cancel(context_id) == {"state": "idle", "cancelled_turn_id": turn_id}
        until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")
        assert two.calls(context_id)[0]["status"] == "cancelled"
        assert one.run(context_id, "on")[1]["status"] == "completed"
        assert one.steps(context_id).count("cancel") == 1
    finally:
        one.close()
        two.close()
        first.kill()
        second.kill()


def test_other_contexts_go_on_while_tools_hang(api: ToolApi, place: Place) -> None:
    """Threads that block and tasks that wait hold up nobody else."""
    hanging = []
    for name in ("hold", "block"):
        context_id = api.create()
        api.waiting(context_id, *[place.holding(name)] * 10, state="executing_tools")
        hanging.append(context_id)
    place.began(20)
    other = api.create()
    assert api.played(other, call("echo", text="x"))[0]["status"] == "completed"
    api.send(other, ENDLESS)
    api.opened(other)
    api.cancel(other)
    place.open()
    for context_id in hanging:
        api.in_state(context_id, "idle")
        assert {one["status"] for one in api.calls(context_id)} == {"succeeded"}
