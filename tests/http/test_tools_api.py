"""§8 at the wire, where nobody has to decide: tools that run, and what comes of it."""

import json
from pathlib import Path

import pytest
from tooling import (
    BUILT_IN,
    CALL_STATUSES,
    ECHO_PATH,
    TOOL_CALL_FIELDS,
    Place,
    ToolApi,
    call,
    external,
    outcomes,
)
from wire import TIMESTAMP, UUID7, invalid, problem, script, until


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


# A call and its result


def test_a_context_has_all_tools_of_the_server_unless_it_names_some(api: ToolApi) -> None:
    """Built in and from Python; names, and definitions of external ones (§2, §8)."""
    shown = api.context(api.create())["tools"]
    assert shown[:3] == BUILT_IN
    assert {"echo", "note", "guarded"} <= set(shown)
    some = api.context(api.create(tools=["echo", external("ask")]))["tools"]
    assert some[0] == "echo"
    assert some[1] == {**external("ask"), "requires_approval": False, "read_only": False}
    assert api.context(api.create(tools=[]))["tools"] == []


def test_a_tool_runs_and_its_result_is_answered(api: ToolApi, context_id: str) -> None:
    """The path through the table, the call's thirteen fields, and the result as a message."""
    turn, (found,) = api.played(context_id, call("echo", text="hi"), {"text": "after"})
    assert turn["status"] == "completed"
    assert api.steps(context_id) == ECHO_PATH
    assert set(found) >= TOOL_CALL_FIELDS
    assert UUID7.fullmatch(found["id"])
    assert (found["context_id"], found["turn_id"]) == (context_id, turn["id"])
    assert (found["name"], found["arguments"]) == ("echo", {"text": "hi"})
    assert (found["status"], found["error"]) == ("succeeded", None)
    assert found["requires_approval"] is False
    assert found["decided_at"] is None
    assert found["duration_ms"] >= 0
    assert TIMESTAMP.fullmatch(found["created_at"])
    assert api.result(context_id, found) == "hi"
    assert [(m["role"], m["kind"], m["status"]) for m in api.messages(context_id)] == [
        ("user", "text", "completed"),
        ("assistant", "tool_call", "completed"),
        ("tool", "tool_result", "completed"),
        ("assistant", "text", "completed"),
    ]


def test_a_call_and_its_result_are_messages_that_name_each_other(
    api: ToolApi, context_id: str
) -> None:
    """`message_id` is the message that asks, `result_message_id` the one that answers."""
    turn, (found,) = api.played(context_id, call("echo", text="hi"), {"text": "after"})
    asking = api.message(context_id, found["message_id"])
    answering = api.message(context_id, found["result_message_id"])
    assert (asking["role"], asking["kind"]) == ("assistant", "tool_call")
    assert asking["metadata"]["name"] == "echo"
    assert (answering["role"], answering["kind"]) == ("tool", "tool_result")
    assert answering["metadata"]["tool_call_id"] == found["id"]
    assert answering["metadata"]["name"] == "echo"
    assert {asking["id"], answering["id"]} <= set(turn["message_ids"])
    assert asking["turn_id"] == answering["turn_id"] == turn["id"]
    assert answering["final_sequence"] == 1


def test_text_before_and_after_a_call_are_messages_of_their_own(
    api: ToolApi, context_id: str
) -> None:
    """In the order in which they were said, all in the one turn."""
    api.played(context_id, {"text": "let me see "}, call("echo", text="1"), {"text": "so"})
    contents = [(m["kind"], m["content"]) for m in api.messages(context_id, include="content")[1:]]
    assert contents == [
        ("text", "let me see "), ("tool_call", '{"text":"1"}'), ("tool_result", "1"), ("text", "so"),
    ]  # fmt: skip


def test_several_rounds(api: ToolApi, context_id: str) -> None:
    """Each request to the model is one round, with its own results; usage adds up over them."""
    used = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    turn, found = api.played(
        context_id,
        call("echo", text="1"), used, {"text": "mid"},
        call("echo", text="2"), call("echo", text="3"), {"text": "end"}, used,
    )  # fmt: skip
    assert [api.result(context_id, one) for one in found] == ["1", "2", "3"]
    assert turn["usage"] == {"prompt_tokens": 6, "completion_tokens": 4}
    assert api.steps(context_id).count("request_llm") == 3
    assert turn["attempt"] == 1
    assert {"executing_tools", "processing_tool_results"} <= set(turn["phases"])
    last = api.messages(context_id)[-1]
    assert (last["kind"], last["finish_reason"]) == ("text", "stop")


def test_calls_are_listed_filtered_and_paged(api: ToolApi, context_id: str) -> None:
    """Oldest first, by status; a page holds what was asked for."""
    api.played(context_id, *(call("echo", text=str(n)) for n in range(5)), call("nothing_such"))
    found = api.calls(context_id)
    assert [one["name"] for one in found] == ["echo"] * 5 + ["nothing_such"]
    for limit in (1, 2, 6):
        assert api.calls(context_id, limit=limit) == found
    assert api.calls(context_id, status="failed") == found[5:]
    assert api.calls(context_id, status="succeeded") == found[:5]
    for status in set(CALL_STATUSES) - {"failed", "succeeded"}:
        assert api.calls(context_id, status=status) == []
    assert api.calls(api.create()) == []


def test_a_bad_list_of_calls_is_400(api: ToolApi, context_id: str) -> None:
    path = f"/contexts/{context_id}/tool-calls"
    for name, value in (("status", "done"), ("limit", "0"), ("cursor", "x"), ("turn", "x")):
        invalid(api.http.get(path, params={name: value}), name)
    missing = api.http.get("/contexts/nothing/tool-calls")
    assert problem(missing, 404, "context_not_found")["context_id"] == "nothing"


# Running


def test_calls_of_a_request_run_at_the_same_time(
    api: ToolApi, context_id: str, tmp_path: Path
) -> None:
    """Each waits for the others, so one after the other would never end."""
    names = ["a", "b", "c", "d"]
    steps = [call("meet", folder=str(tmp_path), name=name, others=names) for name in names]
    _, found = api.played(context_id, *steps, {"text": "all"})
    assert outcomes(found) == [("meet", "succeeded", None)] * 4


def test_a_running_call_is_seen(api: ToolApi, context_id: str, place: Place) -> None:
    """`running` while it runs; no result yet; the others' are there as they come."""
    turn_id, _ = api.waiting(
        context_id, place.holding(), call("echo", text="quick"), state="executing_tools"
    )
    until(lambda: api.call_named(context_id, "echo")["status"] == "succeeded")
    assert place.lines() == ["began"]
    found = api.call_named(context_id, "hold")
    assert (found["status"], found["result_message_id"]) == ("running", None)
    assert (found["duration_ms"], found["error"]) == (None, None)
    assert [one["name"] for one in api.calls(context_id, status="running")] == ["hold"]
    assert api.context(context_id)["state"] == "executing_tools"
    place.open()
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.result(context_id, api.call_named(context_id, "hold")) == "released"


def test_many_calls_in_one_request(api: ToolApi) -> None:
    """More than run at a time, and than a context has threads: every call runs."""
    context_id = api.create(approval_policy={"max_calls": 50})
    turn, found = api.played(context_id, *(call("echo", text=str(n)) for n in range(50)))
    assert turn["status"] == "completed"
    assert [one["status"] for one in found] == ["succeeded"] * 50
    assert [api.result(context_id, one) for one in found[::20]] == ["0", "20", "40"]


# The workspace's tools


def test_the_built_in_tools(api: ToolApi, workspace: Path) -> None:
    """Read, list and, where the policy allows it, write."""
    context_id = api.create(approval_policy={"allow": ["write_file"]})
    _, found = api.played(
        context_id, call("write_file", path="new/b.txt", content="gamma"), {"text": "then"},
        call("read_file", path="new/b.txt"), call("read_file", path="a.txt"),
        call("list_directory", path="."),
    )  # fmt: skip
    assert [one["status"] for one in found] == ["succeeded"] * 4
    assert (workspace / "new" / "b.txt").read_text() == "gamma"
    assert "gamma" in api.result(context_id, found[1])
    assert "alpha\nbeta" in api.result(context_id, found[2])
    listed = api.result(context_id, found[3])
    assert "a.txt" in listed
    assert "new/" in listed


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "link/secret", "..", "missing"]
)
def test_paths_cannot_leave_the_workspace(api: ToolApi, workspace: Path, path: str) -> None:
    """Neither to read nor to write; the model is told, and the turn goes on."""
    (workspace.parent / "secret").write_text("secret")
    (workspace / "link").unlink(missing_ok=True)
    (workspace / "link").symlink_to(workspace.parent)
    context_id = api.create(approval_policy={"allow": ["write_file"]})
    steps = [call("read_file", path=path), call("list_directory", path=path)]
    if path != "missing":
        steps.append(call("write_file", path=path, content="gone"))
    turn, found = api.played(context_id, *steps, {"text": "sorry"})
    assert turn["status"] == "completed"
    assert {one["status"] for one in found} == {"failed"}
    assert not any("secret\n" in api.result(context_id, one) for one in found)
    assert (workspace.parent / "secret").read_text() == "secret"


# Signals and revisions


def test_arguments_are_signalled_and_pulled_while_they_come(api: ToolApi, context_id: str) -> None:
    """A call is a message like any other: deltas, then its completion, of kind `tool_call`."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        text = "word " * 20
        answer = api.send(
            context_id, script({"rate": 100}, call("echo", text=text), {"rate": 0}, {"text": "end"})
        )
        seen = stream.until_state("idle", after=answer["revision"])
    found = api.call_named(context_id, "echo")
    deltas = [frame for frame in seen if frame.get("message_id") == found["message_id"]]
    assert [frame.type for frame in deltas][-1] == "message_completed"
    assert {(frame["role"], frame["kind"]) for frame in deltas} == {("assistant", "tool_call")}
    positions = [f["current_sequence"] for f in deltas if f.type == "content_delta"]
    assert positions == sorted(set(positions))
    assert len(positions) > 1
    results = [frame for frame in seen if frame.get("message_id") == found["result_message_id"]]
    assert {(frame["role"], frame["kind"]) for frame in results} == {("tool", "tool_result")}
    assert results[-1].type == "message_completed"
    part = api.pull(context_id, found["message_id"], to_sequence=1)["content"]
    whole = api.text(context_id, found["message_id"])
    assert whole.startswith(part)
    assert part != whole
    assert json.loads(whole) == {"text": text}


def test_no_signal_carries_an_argument_or_a_result(api: ToolApi, context_id: str) -> None:
    """Signals are small facts (§4)."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        answer = api.send(context_id, script(call("echo", text="sesame"), {"text": "sesame"}))
        seen = stream.until_state("idle", after=answer["revision"])
    assert not [frame for frame in seen if "sesame" in repr(frame)]


def test_an_attach_during_tools_names_calls_and_results(
    api: ToolApi, context_id: str, place: Place
) -> None:
    """The assistant's and tools' messages of the turn are told (§4.1)."""
    turn_id, _ = api.waiting(
        context_id, call("echo", text="quick"), place.holding(), state="executing_tools"
    )
    until(lambda: api.call_named(context_id, "echo")["status"] == "succeeded")
    frames = api.attach(context_id)
    kinds = [frame["kind"] for frame in frames if frame.type == "message_completed"]
    assert sorted(kinds) == ["tool_call", "tool_call", "tool_result"]
    states = [frame for frame in frames if frame.type == "state_changed"]
    assert states[-1]["new_state"] == "executing_tools"
    place.open()
    api.ended(context_id, turn_id)


def test_each_change_is_one_revision(api: ToolApi, context_id: str, place: Place) -> None:
    """The journal's revisions rise; a call that starts or ends moves the record (§1)."""
    turn_id, _ = api.waiting(context_id, place.holding(), state="executing_tools")
    place.began()
    before = api.context(context_id)
    assert before["record_revision"] == before["revision"]
    place.open()
    api.ended(context_id, turn_id)
    after = api.context(context_id)
    assert after["record_revision"] > before["record_revision"]
    revisions = [entry["revision"] for entry in api.journal(context_id)]
    assert revisions == sorted(set(revisions))
