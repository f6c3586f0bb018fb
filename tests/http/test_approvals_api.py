"""§8 at the wire: which calls wait for a person, and what else happens while they wait."""

import pytest
from tooling import Place, ToolApi, call, guarded, outcomes, verdict
from wire import ok, problem


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


# Who waits


def test_a_call_that_waits(api: ToolApi, context_id: str, place: Place) -> None:
    """`awaiting_tool_approval`, the call is pending, the Context names it, nothing has run."""
    turn_id, (found,) = api.pending(context_id, {"text": "may I? "}, guarded(place))
    assert (found["status"], found["requires_approval"]) == ("pending", True)
    assert found["arguments"] == {"path": place.runs, "line": "ran"}
    assert found["result_message_id"] is found["error"] is found["duration_ms"] is None
    assert found["decided_at"] is None
    context = api.context(context_id)
    assert context["pending_tool_calls"] == [found["id"]]
    assert context["open_messages"] == []
    assert context["record_revision"] == context["revision"]
    assert api.turn(context_id, turn_id)["status"] == "running"
    assert api.steps(context_id)[-1] == "require_approval"
    assert place.lines() == []
    api.cancel(context_id)


def test_the_mode_manual_makes_all_wait(api: ToolApi) -> None:
    """Also a tool that is read-only, unless `allow` names it."""
    context_id = api.create(approval_policy={"mode": "manual"})
    _, (found,) = api.pending(context_id, call("echo", text="x"))
    assert found["requires_approval"] is True
    api.cancel(context_id)
    allowed = api.create(approval_policy={"mode": "manual", "allow": ["echo"]})
    _, (found,) = api.played(allowed, call("echo", text="x"))
    assert (found["status"], found["requires_approval"]) == ("succeeded", False)


def test_allow_names_a_tool_that_needs_approval(api: ToolApi, place: Place) -> None:
    """It then runs at once, and only it."""
    context_id = api.create(approval_policy={"allow": ["guarded"]})
    _, (found,) = api.played(context_id, guarded(place))
    assert (found["status"], found["requires_approval"]) == ("succeeded", False)
    _, (found,) = api.pending(context_id, call("write_file", path="x", content="x"))
    assert found["status"] == "pending"
    api.cancel(context_id)


def test_a_refused_call_never_waits(api: ToolApi, place: Place) -> None:
    """Unknown, invalid, plan-blocked and over-limit calls have their result at once."""
    context_id = api.create(approval_policy={"mode": "manual", "max_calls": 3})
    _, found = api.pending(
        context_id, call("nope"), call("guarded"), guarded(place), guarded(place, "beyond")
    )
    assert [one["status"] for one in found] == ["failed", "failed", "pending", "failed"]
    assert [one["error"] for one in found] == [
        "unknown_tool", "invalid_arguments", None, "tool_limit",
    ]  # fmt: skip
    assert all(one["result_message_id"] for one in found if one["status"] == "failed")
    assert api.context(context_id)["pending_tool_calls"] == [found[2]["id"]]
    refused = api.post_decisions(context_id, verdict(found[0]["id"], "approve"))
    assert problem(refused, 409, "tool_call_decided")["tool_call_id"] == found[0]["id"]
    turn_id = found[0]["turn_id"]
    api.decide_all(context_id, "approve")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert place.lines() == ["ran"]
    assistant = [m for m in api.replies(context_id, turn_id) if m["role"] == "assistant"]
    assert assistant[-1]["finish_reason"] == "tool_limit"


def test_nothing_of_a_request_runs_until_all_is_decided(
    api: ToolApi, context_id: str, place: Place
) -> None:
    """Also the calls that need nobody's word; then all of them."""
    turn_id, found = api.pending(
        context_id, call("note", path=place.runs, line="free"), guarded(place, "1"),
        guarded(place, "2"),
    )  # fmt: skip
    assert [one["status"] for one in found] == ["approved", "pending", "pending"]
    assert api.decide(context_id, verdict(found[1]["id"], "approve")) == {
        "state": "awaiting_tool_approval"
    }
    assert api.context(context_id)["pending_tool_calls"] == [found[2]["id"]]
    assert place.lines() == []
    assert [one["status"] for one in api.calls(context_id)] == ["approved", "approved", "pending"]
    api.decide(context_id, verdict(found[2]["id"], "approve"))
    api.ended(context_id, turn_id)
    assert sorted(place.lines()) == ["1", "2", "free"]


# While it waits


def test_a_cancel_while_it_waits(api: ToolApi, context_id: str, place: Place) -> None:
    """idle; the call cancelled; what was said stays; no decision brings it back."""
    turn_id, (first, second) = api.pending(
        context_id, {"text": "may I? "}, guarded(place, "1"), guarded(place, "2")
    )
    api.decide(context_id, verdict(first["id"], "approve"))
    before = api.context(context_id)
    assert api.cancel(context_id) == {"state": "idle", "cancelled_turn_id": turn_id}
    found = api.calls(context_id)
    assert [one["status"] for one in found] == ["cancelled", "cancelled"]
    context = api.context(context_id)
    assert context["pending_tool_calls"] == []
    assert context["revision"] == before["revision"] + 1
    turn = api.turn(context_id, turn_id)
    assert turn["status"] == "cancelled"
    kinds = [m["kind"] for m in api.messages(context_id)]
    assert kinds == ["text", "text", "tool_call", "tool_call", "text"]  # the last says the end
    for decision in ("approve", "deny"):
        answer = api.post_decisions(context_id, verdict(second["id"], decision))
        problem(answer, 409, "tool_call_decided")
    assert api.context(context_id) == context
    assert api.run(context_id, "on")[1]["status"] == "completed"
    assert place.lines() == []


def test_a_cancel_moves_the_record(api: ToolApi, context_id: str, place: Place) -> None:
    """`pending_tool_calls` changed, so more than the state did (§1)."""
    api.pending(context_id, guarded(place))
    before = api.context(context_id)
    api.cancel(context_id)
    after = api.context(context_id)
    assert before["pending_tool_calls"] != after["pending_tool_calls"]
    assert after["record_revision"] > before["record_revision"]


def test_each_decision_is_one_revision_and_signalled(
    api: ToolApi, context_id: str, place: Place
) -> None:
    """A watcher hears that something else than the state changed (§4)."""
    _, (first, _) = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    before = api.context(context_id)
    with api.stream(context_id) as stream:
        stream.current()
        api.decide(context_id, verdict(first["id"], "approve"))
        frames = stream.until(lambda f: f.get("revision") == before["revision"] + 1)
    assert frames[-1]["new_state"] == "awaiting_tool_approval"
    assert frames[-1]["record_revision"] == before["revision"] + 1
    api.cancel(context_id)


def test_the_queue_behind_a_call_that_waits(api: ToolApi, context_id: str, place: Place) -> None:
    """A send is queued, and runs when the turn has ended; a cancel starts it as well."""
    turn_id, _ = api.pending(context_id, guarded(place))
    queued = [api.send(context_id, "one"), api.send(context_id, "two")]
    assert [answer["queued"] for answer in queued] == [True, True]
    assert api.context(context_id)["queued_messages"] == 2
    assert api.context(context_id)["state"] == "awaiting_tool_approval"
    api.decide_all(context_id, "approve")
    for id_ in (turn_id, queued[0]["turn_id"], queued[1]["turn_id"]):
        assert api.ended(context_id, id_)["status"] == "completed"
    turn_id, _ = api.pending(context_id, guarded(place))
    behind = api.send(context_id, "three")
    assert api.cancel(context_id)["cancelled_turn_id"] == turn_id
    assert api.ended(context_id, behind["turn_id"])["status"] == "completed"
    assert place.lines() == ["ran"]


def test_a_send_that_rejects_or_interrupts(api: ToolApi, context_id: str, place: Place) -> None:
    """409 `context_busy`; or the waiting turn is cancelled with its calls, and this one runs."""
    turn_id, _ = api.pending(context_id, guarded(place))
    refused = api.post_message(context_id, "x", on_busy="reject")
    assert problem(refused, 409, "context_busy")["state"] == "awaiting_tool_approval"
    answer = api.send(context_id, "now", on_busy="interrupt")
    assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    assert api.turn(context_id, turn_id)["status"] == "cancelled"
    assert outcomes(api.calls(context_id))[0][:2] == ("guarded", "cancelled")
    assert api.context(context_id)["pending_tool_calls"] == []
    assert place.lines() == []


def test_what_is_illegal_while_it_waits(api: ToolApi, context_id: str, place: Place) -> None:
    """A retry and a producer are refused, and nothing changed."""
    api.pending(context_id, guarded(place))
    before = api.context(context_id)
    refused = problem(api.http.post(f"/contexts/{context_id}/retry"), 409, "illegal_transition")
    assert (refused["state"], refused["trigger"]) == ("awaiting_tool_approval", "retry")
    assert set(refused["allowed"]) == {"execute_tools", "collect_results", "fail", "cancel"}
    opened = api.http.put(f"/contexts/{context_id}/messages/m", json={"producer": {"id": "p"}})
    problem(opened, 409, "context_busy")
    assert api.context(context_id) == before
    api.cancel(context_id)


def test_a_delete_while_it_waits(api: ToolApi, context_id: str, place: Place) -> None:
    """Everything is gone; a decision finds nothing."""
    _, (found,) = api.pending(context_id, guarded(place))
    assert api.http.delete(f"/contexts/{context_id}").status_code == 204
    answer = api.post_decisions(context_id, verdict(found["id"], "approve"))
    problem(answer, 404, "context_not_found")
    problem(api.http.get(f"/contexts/{context_id}/tool-calls"), 404, "context_not_found")
    assert place.lines() == []


def test_plan_is_enforced_when_it_runs(api: ToolApi, context_id: str, place: Place) -> None:
    """A switch to `plan` before the approval: what may change things does not run."""
    turn_id, _ = api.pending(context_id, guarded(place), {"text": "so"})
    ok(api.http.patch(f"/contexts/{context_id}", json={"mode": "plan"}))
    api.decide_all(context_id, "approve")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert outcomes(api.calls(context_id)) == [("guarded", "failed", "plan_mode")]
    assert place.lines() == []


def test_a_tool_that_was_taken_away_does_not_run(
    api: ToolApi, context_id: str, place: Place
) -> None:
    """`tools` is read at each execution (§6)."""
    turn_id, _ = api.pending(context_id, guarded(place), {"text": "so"})
    ok(api.http.patch(f"/contexts/{context_id}", json={"tools": ["echo"]}))
    api.decide_all(context_id, "approve")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert outcomes(api.calls(context_id)) == [("guarded", "failed", "unknown_tool")]
    assert place.lines() == []
