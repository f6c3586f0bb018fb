"""§8 at the wire: tools that others execute, who post the results."""

import pytest
from tooling import ASK, Place, ToolApi, ask, call, external, outcomes
from wire import Json, invalid, ok, problem, until

PATH = [
    "receive_message", "request_llm", "first_chunk", "end_stream", "execute_tools",
    "await_results", "collect_results", "request_llm", "first_chunk", "end_stream", "finish",
]  # fmt: skip


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create(tools=[ASK, "hold", "echo", "guarded"])


# A result


def test_a_result_is_posted(api: ToolApi, context_id: str) -> None:
    """Through `awaiting_tool_results`, and on with what was posted."""
    turn_id, (found,) = api.asked(context_id, ask("why"), {"text": "thanks"})
    assert found["name"] == "ask"
    assert found["arguments"] == {"question": "why"}
    assert found["requires_approval"] is False
    assert found["result_message_id"] is None
    assert found["status"] in ("approved", "running")
    assert api.context(context_id)["pending_tool_calls"] == []
    assert api.answer(context_id, found["id"], "because") == {"state": "processing_tool_results"}
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert api.steps(context_id) == PATH
    assert "awaiting_tool_results" in turn["phases"]
    (found,) = api.calls(context_id)
    assert outcomes([found]) == [("ask", "succeeded", None)]
    assert api.result(context_id, found) == "because"
    message = api.message(context_id, found["result_message_id"])
    assert (message["role"], message["kind"], message["status"]) == (
        "tool", "tool_result", "completed",
    )  # fmt: skip
    assert message["metadata"]["tool_call_id"] == found["id"]


def test_an_error_is_posted(api: ToolApi, context_id: str) -> None:
    """`is_error`: the call failed, the turn goes on, the model reads the words."""
    turn_id, (found,) = api.asked(context_id, ask())
    api.answer(context_id, found["id"], "nobody is home", is_error=True)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    (found,) = api.calls(context_id)
    assert found["status"] == "failed"
    assert found["error"]
    assert api.result(context_id, found) == "nobody is home"


@pytest.mark.parametrize("content", ["", " ", "é" * 70_000, "x" * 200_000, "a\nb\u2028🙂"])
def test_whatever_the_result_says(api: ToolApi, context_id: str, content: str) -> None:
    """Empty, long or odd: it is stored as it came."""
    turn_id, (found,) = api.asked(context_id, ask())
    api.answer(context_id, found["id"], content)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.result(context_id, api.calls(context_id)[0]) == content


def test_results_come_in_any_order(api: ToolApi, context_id: str) -> None:
    """The turn goes on with the last; each result belongs to its call."""
    turn_id, found = api.asked(context_id, *(ask(str(n)) for n in range(4)), {"text": "all"})
    for one in (found[2], found[0], found[3]):
        answer = api.answer(context_id, one["id"], one["arguments"]["question"])
        assert answer == {"state": "awaiting_tool_results"}
    assert api.answer(context_id, found[1]["id"], "1") == {"state": "processing_tool_results"}
    api.ended(context_id, turn_id)
    assert [api.result(context_id, one) for one in api.calls(context_id)] == ["0", "1", "2", "3"]
    assert api.steps(context_id).count("collect_results") == 1


def test_a_result_while_others_still_run(api: ToolApi, context_id: str, place: Place) -> None:
    """Taken in `executing_tools`; with all of them there nobody is waited for."""
    turn_id, found = api.waiting(
        context_id, place.holding(), ask("1"), ask("2"), state="executing_tools"
    )
    place.began()
    assert api.answer(context_id, found[1]["id"]) == {"state": "executing_tools"}
    assert api.answer(context_id, found[2]["id"]) == {"state": "executing_tools"}
    place.open()
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert "await_results" not in api.steps(context_id)
    assert [one["status"] for one in api.calls(context_id)] == ["succeeded"] * 3


def test_only_external_calls_left(api: ToolApi, context_id: str, place: Place) -> None:
    """`await_results` when the server's own have ended, and not before."""
    turn_id, found = api.waiting(context_id, place.holding(), ask(), state="executing_tools")
    place.began()
    assert api.context(context_id)["state"] == "executing_tools"
    place.open()
    api.in_state(context_id, "awaiting_tool_results")
    assert api.call_named(context_id, "hold")["status"] == "succeeded"
    api.answer(context_id, found[1]["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_several_rounds_of_external_calls(api: ToolApi, context_id: str) -> None:
    turn_id, (first,) = api.asked(context_id, ask("1"), {"text": "mid"}, ask("2"), {"text": "end"})
    api.answer(context_id, first["id"], "one")
    until(lambda: len(api.calls(context_id)) == 2)
    api.in_state(context_id, "awaiting_tool_results")
    assert api.post_result(context_id, first["id"], content="one").status_code == 202
    assert api.context(context_id)["state"] == "awaiting_tool_results"
    api.answer(context_id, api.calls(context_id)[1]["id"], "two")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.steps(context_id).count("await_results") == 2


# Approval and mode


def test_an_external_tool_that_needs_approval(api: ToolApi) -> None:
    """It waits for a person, then for its result; a denial needs no result."""
    context_id = api.create(tools=[external("ask", requires_approval=True)])
    turn_id, (found,) = api.pending(context_id, ask("old"), {"text": "done"})
    assert found["requires_approval"] is True
    early = api.post_result(context_id, found["id"], content="early")
    assert problem(early, 409, "illegal_transition")["state"] == "awaiting_tool_approval"
    api.decide_all(context_id, "approve", arguments={"question": "new"})
    api.in_state(context_id, "awaiting_tool_results")
    (found,) = api.calls(context_id)
    assert found["arguments"] == {"question": "new"}
    api.answer(context_id, found["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"
    turn_id, _ = api.pending(context_id, ask())
    assert api.decide_all(context_id, "deny") == {"state": "processing_tool_results"}
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_no_result_until_all_is_decided(api: ToolApi, context_id: str, place: Place) -> None:
    """Nothing of a request runs until all its calls are decided: a result then is too early (§8)."""
    _, (asked, _) = api.pending(context_id, ask(), call("guarded", path=place.runs))
    try:
        early = api.post_result(context_id, asked["id"], content="early")
        assert problem(early, 409, "illegal_transition")["state"] == "awaiting_tool_approval"
        assert api.call_named(context_id, "ask")["result_message_id"] is None
    finally:
        api.cancel(context_id)


def test_plan_blocks_external_tools_that_change_things(api: ToolApi) -> None:
    """But for those that say they are read-only."""
    tools = [external("look", read_only=True), external("act")]
    context_id = api.create(mode="plan", tools=tools)
    turn_id, found = api.asked(context_id, ask(name="look"), ask(name="act"))
    assert [one["error"] for one in found] == [None, "plan_mode"]
    api.answer(context_id, found[0]["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_plan_is_enforced_when_an_external_tool_would_run(api: ToolApi) -> None:
    """A switch to `plan` before the approval: nobody is asked to execute it (§8)."""
    context_id = api.create(tools=[external("ask", requires_approval=True)])
    turn_id, _ = api.pending(context_id, ask(), {"text": "so"})
    ok(api.http.patch(f"/contexts/{context_id}", json={"mode": "plan"}))
    api.decide_all(context_id, "approve")
    try:
        state = api.in_state(context_id, "idle", "awaiting_tool_results")["state"]
        assert outcomes(api.calls(context_id)) == [("ask", "failed", "plan_mode")]
        assert state == "idle"
        assert api.turn(context_id, turn_id)["status"] == "completed"
    finally:
        api.cancel(context_id)


def test_invalid_arguments_reach_nobody(api: ToolApi, context_id: str) -> None:
    """Checked against the declared schema before anything runs."""
    turn, found = api.played(
        context_id, call("ask"), call("ask", question=1), call("ask", question="x", more=1)
    )
    assert turn["status"] == "completed"
    assert outcomes(found) == [("ask", "failed", "invalid_arguments")] * 3
    assert "await_results" not in api.steps(context_id)


def test_a_declared_tool_goes_before_the_servers(api: ToolApi) -> None:
    """Of the same name: what the context says counts."""
    context_id = api.create(tools=[external("echo")])
    turn_id, (found,) = api.asked(context_id, ask(name="echo"))
    api.answer(context_id, found["id"], "mine")
    api.ended(context_id, turn_id)
    assert api.result(context_id, api.calls(context_id)[0]) == "mine"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"external": False}, "tools[0].external"),
        ({"name": ""}, "tools[0].name"),
        ({"name": "a b"}, "tools[0].name"),
        ({"description": 1}, "tools[0].description"),
        ({"parameters": "x"}, "tools[0].parameters"),
        ({"requires_approval": "yes"}, "tools[0].requires_approval"),
        ({"idempotent": True}, "tools[0].idempotent"),
    ],
)
def test_a_bad_declaration_is_400(api: ToolApi, more: Json, field: str) -> None:
    invalid(api.http.post("/contexts", json={"tools": [{**ASK, **more}]}), field)
