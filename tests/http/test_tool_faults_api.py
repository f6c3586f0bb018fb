"""§6 and §8 at the wire when something goes wrong: tools that fail, cancels, a model that fails."""

import pytest
from tooling import Place, ToolApi, call, outcomes
from wire import ENDLESS, Json, ok, problem, script, until

HARMLESS_TOOLS = ["hold", "hold_again", "block", "stubborn"]


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


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


# Cancels and deletes while a tool runs


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
    """A new turn that goes on after them: no tool runs again, the failed turn's calls stay listed."""
    turn, _ = api.played(
        context_id, call("note", path=place.runs), {"text": "oh "}, {"error": "fatal"}
    )
    assert turn["status"] == "failed"
    assert place.lines() == ["ran"]
    again = ok(api.http.post(f"/contexts/{context_id}/retry"), 202)
    retried = api.ended(context_id, again["turn_id"])
    assert (retried["status"], retried["retry_of"]) == ("failed", turn["id"])
    assert place.lines() == ["ran"]
    (found,) = api.calls(context_id)
    assert (found["turn_id"], found["status"]) == (turn["id"], "succeeded")
