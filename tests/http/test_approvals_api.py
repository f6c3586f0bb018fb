"""§8 at the wire: calls that wait for a person, and what the person says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tooling import (
    Chat,
    Place,
    ToolApi,
    at_once,
    call,
    outcomes,
    serving_tools,
    start_with_tools,
    verdict,
)
from wire import TIMESTAMP, Json, invalid, ok, problem, script, until


@pytest.fixture(scope="module")
def api(
    make_server: Any, tmp_path_factory: pytest.TempPathFactory, chat: Chat
) -> Iterator[ToolApi]:
    """A server with tools and little time for a turn's work."""
    settings = {"openai_base_url": chat.url, "openai_api_key": "none", "model": "fake"}
    folder = tmp_path_factory.mktemp("workspace")
    with serving_tools(make_server, folder, turn_timeout_s=4, **settings) as client:
        yield client


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create()


def guarded(place: Place, line: str = "ran") -> Json:
    """A call that waits for a person, and is seen in a file when it runs."""
    return call("guarded", path=place.runs, line=line)


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


# What is said


def test_approve(api: ToolApi, context_id: str, place: Place) -> None:
    """`execute_tools` from `awaiting_tool_approval`; the answer has the state."""
    turn_id, _ = api.pending(context_id, guarded(place), {"text": "done"})
    assert api.decide_all(context_id, "approve") == {"state": "executing_tools"}
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    (found,) = api.calls(context_id)
    assert (found["status"], found["error"]) == ("succeeded", None)
    assert TIMESTAMP.fullmatch(found["decided_at"])
    assert place.lines() == ["ran"]
    assert api.steps(context_id)[4:8] == [
        "require_approval", "execute_tools", "collect_results", "request_llm",
    ]  # fmt: skip
    assert "awaiting_tool_approval" in turn["phases"]
    assert api.context(context_id)["pending_tool_calls"] == []


def test_deny(api: ToolApi, context_id: str, place: Place) -> None:
    """All denied: `collect_results` from `awaiting_tool_approval`; the model reads the reason."""
    turn_id, found = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    first, second = found
    answer = api.decide(
        context_id, verdict(first["id"], "deny", reason="not on a Sunday"),
        verdict(second["id"], "deny"),
    )  # fmt: skip
    assert answer == {"state": "processing_tool_results"}
    assert api.ended(context_id, turn_id)["status"] == "completed"
    found = api.calls(context_id)
    assert [one["status"] for one in found] == ["denied", "denied"]
    assert all(TIMESTAMP.fullmatch(one["decided_at"]) for one in found)
    assert "not on a Sunday" in api.result(context_id, found[0])
    assert api.result(context_id, found[1])
    assert place.lines() == []
    steps = [(e["trigger"], e["from_state"]) for e in api.journal(context_id)]
    assert ("collect_results", "awaiting_tool_approval") in steps


def test_some_approved_some_denied(api: ToolApi, context_id: str, place: Place) -> None:
    turn_id, (first, second) = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    answer = api.decide(context_id, verdict(first["id"], "deny"), verdict(second["id"], "approve"))
    assert answer == {"state": "executing_tools"}
    api.ended(context_id, turn_id)
    assert [one["status"] for one in api.calls(context_id)] == ["denied", "succeeded"]
    assert place.lines() == ["2"]


def test_approve_with_other_arguments(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """They replace the model's: for the tool, for the list of calls, and in what the model sees."""
    arguments = {"path": place.runs, "line": "the model's"}
    chat.replies = [[("guarded", json.dumps(arguments))], "done"]
    context_id = api.create(provider="openai")
    turn_id = api.send(context_id, "go")["turn_id"]
    api.in_state(context_id, "awaiting_tool_approval")
    edited = {"path": place.runs, "line": "mine"}
    api.decide_all(context_id, "approve", arguments=edited)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert place.lines() == ["mine"]
    (found,) = api.calls(context_id)
    assert found["arguments"] == edited
    assert json.loads(api.text(context_id, found["message_id"])) == arguments
    asked = chat.requests[-1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(asked) == edited


@pytest.mark.parametrize(
    "arguments", [{}, {"path": 7}, {"path": "/x", "more": 1}, {"path": "/x", "line": "a\x00b"}]
)
def test_other_arguments_are_checked_too(
    api: ToolApi, context_id: str, place: Place, arguments: Json
) -> None:
    """Against the schema, before anything runs: 400 that names them, and nothing changed (§8)."""
    _, (first, second) = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    before = api.context(context_id)
    answer = api.post_decisions(
        context_id, verdict(first["id"], "approve"),
        verdict(second["id"], "approve", arguments=arguments),
    )  # fmt: skip
    try:
        body = problem(answer, 400, "invalid_request")
        assert "arguments" in json.dumps(body["errors"])
        assert api.context(context_id)["revision"] == before["revision"]
        assert len(api.context(context_id)["pending_tool_calls"]) == 2
    finally:
        api.cancel(context_id)
    assert place.lines() == []


# Refusals


def test_bad_decisions_are_400(api: ToolApi, context_id: str, place: Place) -> None:
    """Each named; nothing changed."""
    _, (found,) = api.pending(context_id, guarded(place))
    path = f"/contexts/{context_id}/tool-calls/decisions"
    good = verdict(found["id"], "approve")
    for body, field in (
        ({}, "decisions"),
        ({"decisions": []}, "decisions"),
        ({"decisions": good}, "decisions"),
        ({"decisions": [good], "more": 1}, "more"),
        ({"decisions": [{**good, "decision": "maybe"}]}, "decisions[0].decision"),
        ({"decisions": [{"decision": "deny"}]}, "decisions[0].tool_call_id"),
        ({"decisions": [{"tool_call_id": found["id"]}]}, "decisions[0].decision"),
        ({"decisions": [{**good, "reason": 1}]}, "decisions[0].reason"),
        ({"decisions": [{**good, "arguments": "x"}]}, "decisions[0].arguments"),
        ({"decisions": [{**good, "more": 1}]}, "decisions[0].more"),
        ({"decisions": [good, {**good, "tool_call_id": "no id"}]}, "decisions[1].tool_call_id"),
    ):
        invalid(api.http.post(path, json=body), field)
    assert api.context(context_id)["pending_tool_calls"] == [found["id"]]
    api.cancel(context_id)


def test_unknown_calls_are_404(api: ToolApi, context_id: str, place: Place) -> None:
    """Also another context's; and of several decisions all or none are taken."""
    other = api.create()
    _, (elsewhere,) = api.pending(other, guarded(place))
    _, (found,) = api.pending(context_id, guarded(place))
    for id_ in ("nothing", elsewhere["id"]):
        answer = api.post_decisions(
            context_id, verdict(found["id"], "approve"), verdict(id_, "approve")
        )
        assert problem(answer, 404, "tool_call_not_found")["tool_call_id"] == id_
    missing = api.post_decisions("nothing", verdict(found["id"], "approve"))
    assert problem(missing, 404, "context_not_found")["context_id"] == "nothing"
    assert api.context(context_id)["pending_tool_calls"] == [found["id"]]
    api.cancel(context_id)
    api.cancel(other)
    assert place.lines() == []


@pytest.mark.parametrize("first", ["approve", "deny"])
def test_deciding_twice(api: ToolApi, context_id: str, place: Place, first: str) -> None:
    """The same again is harmless, also long after; the other way is 409 and changes nothing."""
    second = {"approve": "deny", "deny": "approve"}[first]
    turn_id, (found, other) = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    api.decide(context_id, verdict(found["id"], first))
    before = api.context(context_id)
    assert api.decide(context_id, verdict(found["id"], first)) == {"state": before["state"]}
    answer = api.post_decisions(context_id, verdict(found["id"], second))
    assert problem(answer, 409, "tool_call_decided")["tool_call_id"] == found["id"]
    both = api.post_decisions(
        context_id, verdict(other["id"], "approve"), verdict(found["id"], second)
    )
    problem(both, 409, "tool_call_decided")
    assert api.context(context_id) == before
    api.decide(context_id, verdict(other["id"], first))
    api.ended(context_id, turn_id)
    settled = api.context(context_id)
    assert api.decide(context_id, verdict(found["id"], first)) == {"state": "idle"}
    answer = api.post_decisions(context_id, verdict(found["id"], second))
    problem(answer, 409, "tool_call_decided")
    assert api.context(context_id) == settled
    assert len(place.lines()) == (2 if first == "approve" else 0)


@pytest.mark.parametrize("arguments", [None, {"path": "/x"}])
def test_the_very_same_body_again_is_harmless(
    api: ToolApi, context_id: str, place: Place, arguments: Json | None
) -> None:
    """A client that lost the answer says the same again, whatever was in it."""
    _, (found, _) = api.pending(context_id, guarded(place), guarded(place))
    for decision in ("deny",):
        said = verdict(found["id"], decision, reason="no", arguments=arguments)
        first = api.post_decisions(context_id, said)
        again = api.post_decisions(context_id, said)
        assert again.status_code == first.status_code, again.text
    api.cancel(context_id)


def test_contradicting_decisions_in_one_request(
    api: ToolApi, context_id: str, place: Place
) -> None:
    """Refused as a whole."""
    _, (found,) = api.pending(context_id, guarded(place))
    answer = api.post_decisions(
        context_id, verdict(found["id"], "approve"), verdict(found["id"], "deny")
    )
    problem(answer, 409, "tool_call_decided")
    assert api.context(context_id)["pending_tool_calls"] == [found["id"]]
    api.cancel(context_id)


@pytest.mark.parametrize("order", [1, -1])
def test_a_repeat_for_an_older_turn_beside_a_decision(
    api: ToolApi, context_id: str, place: Place, order: int
) -> None:
    """The repeat is harmless in either order: the turn that waits goes on."""
    turn_id, (old,) = api.pending(context_id, guarded(place, "old"))
    api.decide_all(context_id, "approve")
    api.ended(context_id, turn_id)
    turn_id, (new,) = api.pending(context_id, guarded(place, "new"), {"text": "done"})
    said = [verdict(old["id"], "approve"), verdict(new["id"], "approve")][::order]
    answer = api.decide(context_id, *said)
    assert answer == {"state": "executing_tools"}
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert place.lines() == ["old", "new"]


# While it waits


def test_waiting_for_people_is_no_work(api: ToolApi, context_id: str, place: Place) -> None:
    """A turn that waited for longer than its limit of work goes on (§6)."""
    turn_id, _ = api.pending(context_id, guarded(place), {"text": "done"})
    api.ended(other := api.create(), api.send(other, script({"delay_ms": 60_000}))["turn_id"])
    api.decide_all(context_id, "approve")
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert turn["phases"]["awaiting_tool_approval"] > 4000


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
    assert kinds == ["text", "text", "tool_call", "tool_call"]
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


# Races


def test_rivals_decide_the_same_call(api: ToolApi, place: Place) -> None:
    """One of two opposite decisions is taken, the other is 409; the tool runs once or not at all."""
    for _ in range(10):
        context_id = api.create()
        turn_id, (found,) = api.pending(context_id, guarded(place, context_id))
        answers = at_once(
            lambda c=context_id, i=found["id"]: api.post_decisions(c, verdict(i, "approve")),
            lambda c=context_id, i=found["id"]: api.post_decisions(c, verdict(i, "deny")),
        )
        assert sorted(answer.status_code for answer in answers) == [202, 409]
        assert api.ended(context_id, turn_id)["status"] == "completed"
        approved = answers[0].status_code == 202
        assert place.lines().count(context_id) == int(approved)
        assert api.calls(context_id)[0]["status"] == ("succeeded" if approved else "denied")
        assert api.steps(context_id).count("collect_results") == 1


def test_many_decide_at_once(api: ToolApi, place: Place) -> None:
    """Each says one of the calls, and all of them say it twice: the turn goes on once."""
    context_id = api.create()
    turn_id, found = api.pending(context_id, *(guarded(place, str(n)) for n in range(8)))
    said = [verdict(one["id"], "approve") for one in found] * 2
    answers = at_once(*(lambda v=v: api.post_decisions(context_id, v) for v in said))
    assert {answer.status_code for answer in answers} == {202}
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert sorted(place.lines()) == [str(n) for n in range(8)]
    assert api.steps(context_id).count("execute_tools") == 1


def test_a_decision_and_a_cancel_at_once(api: ToolApi, place: Place) -> None:
    """Whoever is first: the turn ends once, and nothing runs after a cancel that was first."""
    for _ in range(10):
        context_id = api.create()
        turn_id, (found,) = api.pending(context_id, guarded(place, context_id))
        decided, cancelled = at_once(
            lambda c=context_id, i=found["id"]: api.post_decisions(c, verdict(i, "approve")),
            lambda c=context_id: api.http.post(f"/contexts/{c}/cancel"),
        )
        turn = api.ended(context_id, turn_id)
        assert cancelled.status_code == 200
        assert decided.status_code in (202, 409)
        if decided.status_code == 409:
            problem(decided, 409, "tool_call_decided")
            assert turn["status"] == "cancelled"
            assert context_id not in place.lines()
        assert api.in_state(context_id, "idle")["pending_tool_calls"] == []
        assert place.lines().count(context_id) <= 1
        ends = {"finish", "cancel"} & set(api.steps(context_id))
        assert len(ends) == 1


# Restarts and other processes


def test_decisions_after_a_crash(tmp_path: Path, place: Place) -> None:
    """`awaiting_tool_approval` survives kill -9, and so does what was decided before it."""
    database, settings = tmp_path / "contextd.db", {"scripted_rate": 0}

    def make(**more: Any) -> Server:
        return Server(database, settings={**settings, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    some, none = api.create(), api.create()
    turn_id, (first, second) = api.pending(
        some, guarded(place, "1"), guarded(place, "2"), {"text": "done"}
    )
    denied_turn, (denied,) = api.pending(none, guarded(place, "never"))
    api.decide(some, verdict(first["id"], "approve"))
    before = api.context(some)
    server.kill()
    api.close()
    server = start_with_tools(make)
    try:
        api = ToolApi(server.url)
        after = api.context(some)
        assert {**after, "stream_cursor": ""} == {**before, "stream_cursor": ""}
        assert "recover" not in api.steps(some)
        assert api.decide(some, verdict(first["id"], "approve")) == {
            "state": "awaiting_tool_approval"
        }
        answer = api.post_decisions(some, verdict(first["id"], "deny"))
        problem(answer, 409, "tool_call_decided")
        assert place.lines() == []
        api.decide(some, verdict(second["id"], "approve"))
        api.decide(none, verdict(denied["id"], "deny"))
        assert api.ended(some, turn_id)["status"] == "completed"
        assert api.ended(none, denied_turn)["status"] == "completed"
        assert sorted(place.lines()) == ["1", "2"]
        api.close()
    finally:
        server.kill()


def test_another_process_decides(tmp_path: Path, place: Place) -> None:
    """Two servers on one database: whoever takes the last decision goes on with the turn."""
    database, settings = tmp_path / "contextd.db", {"scripted_rate": 0, "poll_s": 0.05}

    def make(**more: Any) -> Server:
        return Server(database, settings={**settings, **more}).start()

    first, second = start_with_tools(make), start_with_tools(make)
    one, two = ToolApi(first.url), ToolApi(second.url)
    try:
        context_id = one.create()
        turn_id, (a, b) = one.pending(
            context_id,
            guarded(place, "a"),
            guarded(place, "b"),
            {"text": "on"},
            guarded(place, "c"),
        )
        one.decide(context_id, verdict(a["id"], "approve"))
        two.decide(context_id, verdict(b["id"], "approve"))
        until(lambda: len(two.calls(context_id)) == 3, "the second round")
        two.in_state(context_id, "awaiting_tool_approval")
        first.kill()
        two.decide_all(context_id, "approve")
        assert two.ended(context_id, turn_id)["status"] == "completed"
        assert sorted(place.lines()) == ["a", "b", "c"]
        assert two.steps(context_id).count("execute_tools") == 2
    finally:
        one.close()
        two.close()
        first.kill()
        second.kill()
