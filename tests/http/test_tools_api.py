"""§8 at the wire, where nobody has to decide: what a model may call, and what comes of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tooling import (
    BUILT_IN,
    CALL_STATUSES,
    TOOL_CALL_FIELDS,
    Chat,
    Place,
    ToolApi,
    call,
    external,
    outcomes,
    serving_tools,
)
from wire import TIMESTAMP, UUID7, Json, invalid, ok, problem, script, until

ECHO_PATH = [
    "receive_message", "request_llm", "first_chunk", "end_stream", "execute_tools",
    "collect_results", "request_llm", "first_chunk", "end_stream", "finish",
]  # fmt: skip
REFUSED_PATH = [step for step in ECHO_PATH if step != "execute_tools"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of the server's built-in tools."""
    folder: Path = tmp_path_factory.mktemp("workspace")
    (folder / "a.txt").write_text("alpha\nbeta\n")
    return folder


@pytest.fixture(scope="module")
def api(make_server: Any, workspace: Path, chat: Chat) -> Iterator[ToolApi]:
    """A server with tools, which also knows the model."""
    settings = {"openai_base_url": chat.url, "openai_api_key": "none", "model": "fake"}
    with serving_tools(make_server, workspace, **settings) as client:
        yield client


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create()


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


# What is refused before it runs


def test_an_unknown_tool_is_an_error_result(api: ToolApi, context_id: str) -> None:
    """All refused: `collect_results` from `processing_llm_response`, and the model hears of it."""
    turn, found = api.played(context_id, call("nothing_such", x=1), {"text": "sorry"})
    assert (turn["status"], turn["error"]) == ("completed", None)
    assert outcomes(found) == [("nothing_such", "failed", "unknown_tool")]
    assert "nothing_such" in api.result(context_id, found[0])
    assert api.steps(context_id) == REFUSED_PATH
    assert ("processing_llm_response", "processing_tool_results") in [
        (entry["from_state"], entry["to_state"]) for entry in api.journal(context_id)
    ]


def test_a_tool_that_the_context_does_not_name_is_unknown(api: ToolApi, place: Place) -> None:
    context_id = api.create(tools=["echo"])
    _, found = api.played(context_id, call("note", path=place.runs), call("echo", text="x"))
    assert outcomes(found) == [("note", "failed", "unknown_tool"), ("echo", "succeeded", None)]
    assert place.lines() == []


@pytest.mark.parametrize(
    "arguments", [{}, {"path": 1}, {"path": "/x", "more": 1}, {"path": None}, {"line": "x"}]
)
def test_invalid_arguments_are_an_error_result(
    api: ToolApi, context_id: str, arguments: Json
) -> None:
    """Missing, of a wrong type, or too many: nothing runs, the user sees no crash."""
    step = {"tool_call": {"name": "note", "arguments": arguments}}
    turn, found = api.played(context_id, step, {"text": "sorry"})
    assert turn["status"] == "completed"
    assert outcomes(found) == [("note", "failed", "invalid_arguments")]
    assert found[0]["arguments"] == arguments
    assert found[0]["duration_ms"] is None or found[0]["duration_ms"] >= 0
    assert api.result(context_id, found[0])
    assert api.steps(context_id) == REFUSED_PATH


def test_good_and_bad_calls_of_one_request(api: ToolApi, context_id: str, place: Place) -> None:
    """Each gets its own result, the good ones run."""
    _, found = api.played(
        context_id, call("note", path=place.runs), call("nope"), call("note"), {"text": "x"}
    )
    assert [one["status"] for one in found] == ["succeeded", "failed", "failed"]
    assert place.lines() == ["ran"]
    assert all(api.result(context_id, one) for one in found)


@pytest.mark.parametrize("arguments", ["", "{", "[]", '"x"', "nul", '{"text": NaN}', "{}{}"])
def test_arguments_that_are_no_json_object(api: ToolApi, chat: Chat, arguments: str) -> None:
    """What a model wrote stays as it wrote it; the call fails, the turn goes on."""
    chat.replies = [[("echo", arguments)], "sorry"]
    context_id = api.create(provider="openai", tools=["echo"])
    _, turn = api.run(context_id, "go")
    (found,) = api.calls(context_id)
    assert turn["status"] == "completed", turn["error"]
    assert outcomes([found]) == [("echo", "failed", "invalid_arguments")]
    told = chat.requests[-1]["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "tool"]
    assert told[1]["tool_calls"][0]["id"] == told[2]["tool_call_id"]
    assert told[2]["content"] == api.result(context_id, found)


# The policy's limits


def test_the_limit_of_rounds(api: ToolApi) -> None:
    """`max_depth` rounds run; the calls of the next get error results and the turn completes."""
    context_id = api.create(approval_policy={"max_depth": 2})
    steps = [step for n in range(4) for step in (call("echo", text=str(n)), {"text": f"t{n}"})]
    turn, found = api.played(context_id, *steps)
    assert turn["status"] == "completed"
    assert outcomes(found) == [
        ("echo", "succeeded", None), ("echo", "succeeded", None), ("echo", "failed", "tool_limit"),
    ]  # fmt: skip
    assert api.result(context_id, found[2])
    last = [m for m in api.replies(context_id, turn["id"]) if m["role"] == "assistant"][-1]
    assert last["finish_reason"] == "tool_limit"
    journal = api.journal(context_id)
    assert (journal[-1]["trigger"], journal[-1]["from_state"]) == (
        "finish", "processing_tool_results",
    )  # fmt: skip
    assert api.steps(context_id).count("request_llm") == 3
    assert api.run(context_id, "and now")[1]["status"] == "completed"


def test_the_limit_of_calls_counts_the_whole_turn(api: ToolApi, place: Place) -> None:
    """The first `max_calls` run, the others get error results, and the turn ends there."""
    context_id = api.create(approval_policy={"max_calls": 3})
    noted = [call("note", path=place.runs, line=str(n)) for n in range(5)]
    turn, found = api.played(context_id, *noted[:2], {"text": "on"}, *noted[2:], {"text": "never"})
    assert [one["status"] for one in found] == ["succeeded"] * 3 + ["failed"] * 2
    assert {one["error"] for one in found[3:]} == {"tool_limit"}
    assert sorted(place.lines()) == ["0", "1", "2"]
    assert turn["status"] == "completed"
    assistant = [m for m in api.replies(context_id, turn["id"]) if m["role"] == "assistant"]
    assert assistant[-1]["finish_reason"] == "tool_limit"
    assert "tool_limit" not in [message["finish_reason"] for message in assistant[:-1]]
    api.run(context_id, script(noted[4]))
    assert len(place.lines()) == 4


def test_no_tools_at_all(api: ToolApi, place: Place) -> None:
    """Limits of 0: everything is refused."""
    for limit in ("max_depth", "max_calls"):
        context_id = api.create(approval_policy={limit: 0})
        turn, found = api.played(context_id, call("note", path=place.runs), {"text": "never"})
        assert outcomes(found) == [("note", "failed", "tool_limit")]
        assert turn["status"] == "completed"
        assert api.steps(context_id) == [
            "receive_message", "request_llm", "first_chunk", "end_stream", "collect_results",
            "finish",
        ]  # fmt: skip
    assert place.lines() == []


def test_the_default_limits(api: ToolApi, context_id: str) -> None:
    """5 rounds, 20 calls."""
    policy = {"mode": "auto", "allow": [], "max_depth": 5, "max_calls": 20}
    assert api.context(context_id)["approval_policy"] == policy
    steps = [step for n in range(6) for step in (call("echo", text=str(n)), {"text": f"t{n}"})]
    _, found = api.played(context_id, *steps)
    assert [one["status"] for one in found] == ["succeeded"] * 5 + ["failed"]
    _, found = api.played(context_id, *(call("echo", text=str(n)) for n in range(21)))
    assert [one["status"] for one in found] == ["succeeded"] * 20 + ["failed"]


# The mode `plan`


def test_plan_runs_read_only_tools_only(api: ToolApi, place: Place) -> None:
    context_id = api.create(mode="plan")
    _, found = api.played(
        context_id, call("echo", text="x"), call("note", path=place.runs),
        call("write_file", path="p.txt", content="x"), call("read_file", path="a.txt"),
    )  # fmt: skip
    assert [(one["name"], one["status"]) for one in found] == [
        ("echo", "succeeded"), ("note", "failed"), ("write_file", "failed"),
        ("read_file", "succeeded"),
    ]  # fmt: skip
    assert found[1]["error"] == found[2]["error"] == "plan_mode"
    assert place.lines() == []
    assert api.context(context_id)["pending_tool_calls"] == []


def test_plan_offers_read_only_tools_only(api: ToolApi, chat: Chat) -> None:
    """What a request offers follows the mode and the tools as they are at that request."""
    tools = ["echo", "note", external("look", read_only=True), external("act")]
    context_id = api.create(provider="openai", mode="plan", tools=tools)
    offered = []
    for patch in ({}, {"mode": "act"}, {"tools": ["note"]}, {"tools": []}):
        ok(api.http.patch(f"/contexts/{context_id}", json=patch))
        chat.replies = ["fine"]
        api.run(context_id, "go")
        offers = chat.requests[-1].get("tools") or []
        offered.append([offer["function"]["name"] for offer in offers])
    assert offered == [["echo", "look"], ["echo", "note", "look", "act"], ["note"], []]


def test_an_offer_has_the_tools_schema(api: ToolApi, chat: Chat) -> None:
    """Name, description, and parameters as JSON Schema."""
    context_id = api.create(provider="openai", tools=["echo", external("ask")])
    chat.replies = ["fine"]
    api.run(context_id, "go")
    echo, asking = [offer["function"] for offer in chat.requests[-1]["tools"]]
    assert echo["description"] == "Gives the text back."
    assert echo["parameters"]["required"] == ["text"]
    assert asking["parameters"] == external("ask")["parameters"]


def test_the_mode_is_read_at_each_round(api: ToolApi, place: Place) -> None:
    """A switch to plan while tools run holds for the next request."""
    context_id = api.create()
    turn_id, _ = api.waiting(
        context_id, place.holding(), {"text": "on"}, call("note", path=place.runs),
        state="executing_tools",
    )  # fmt: skip
    place.began()
    ok(api.http.patch(f"/contexts/{context_id}", json={"mode": "plan"}))
    place.open()
    api.ended(context_id, turn_id)
    assert outcomes(api.calls(context_id)) == [
        ("hold", "succeeded", None), ("note", "failed", "plan_mode"),
    ]  # fmt: skip
    assert place.lines() == ["began", "ended"]


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
    """More than there are threads: every call runs."""
    context_id = api.create(approval_policy={"max_calls": 200})
    turn, found = api.played(context_id, *(call("echo", text=str(n)) for n in range(200)))
    assert turn["status"] == "completed"
    assert [one["status"] for one in found] == ["succeeded"] * 200
    assert [api.result(context_id, one) for one in found[::50]] == ["0", "50", "100", "150"]


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


# What the model is shown


def test_the_model_sees_calls_and_results(api: ToolApi, chat: Chat) -> None:
    """One message of the assistant with all its calls, then a result for each."""
    chat.replies = [
        [("echo", '{"text":"1"}'), ("nope", "{}"), ("echo", '{"text":"2"}')],
        [("echo", '{"text":"3"}')],
        "done",
        "next",
    ]
    context_id = api.create(provider="openai")
    api.run(context_id, "go")
    told = chat.requests[-1]["messages"]
    roles = [message["role"] for message in told]
    assert roles == ["user", "assistant", "tool", "tool", "tool", "assistant", "tool"]
    asked = [one["id"] for one in told[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in told[2:5]] == asked
    assert len(set(asked)) == 3
    assert [told[2]["content"], told[4]["content"], told[6]["content"]] == ["1", "2", "3"]
    assert "nope" in told[3]["content"]
    api.run(context_id, "again")
    told = chat.requests[-1]["messages"]
    assert [message["role"] for message in told] == [*roles, "assistant", "user"]


def test_a_message_stored_meanwhile_does_not_part_call_and_result(
    api: ToolApi, chat: Chat, place: Place
) -> None:
    """`respond: false` works in every state (§3.1); the history stays well-formed (§8)."""
    arguments = place.holding()["tool_call"]["arguments"]
    chat.replies = [[("hold", json.dumps(arguments))], "done"]
    context_id = api.create(provider="openai")
    turn_id = api.send(context_id, "go")["turn_id"]
    place.began()
    api.send(context_id, "by the way", respond=False)
    place.open()
    assert api.ended(context_id, turn_id)["status"] == "completed"
    told = [(message["role"], message["content"]) for message in chat.requests[-1]["messages"]]
    asked = [role for role, _ in told].index("assistant")
    assert told[asked + 1] == ("tool", "released")
    assert ("user", "by the way") in told


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
