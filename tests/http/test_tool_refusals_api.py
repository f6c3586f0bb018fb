"""§8 at the wire: calls that are refused before they run, by their form, the policy's limits or the mode."""

import pytest
from tooling import ECHO_PATH, Chat, Place, ToolApi, call, outcomes
from wire import Json, ok, script

REFUSED_PATH = [step for step in ECHO_PATH if step != "execute_tools"]


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


# What cannot be called so


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
