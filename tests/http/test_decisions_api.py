"""§8 at the wire: what a person says of a call that waits, in what order, and who is first."""

import json

import pytest
from tooling import Place, ToolApi, at_once, guarded, verdict
from wire import TIMESTAMP, Json, invalid, problem


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


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


def test_edited_arguments_are_bounded(api: ToolApi, place: Place) -> None:
    """As a model's are: 413, and the call waits on."""
    context_id = api.create()
    _, (found,) = api.pending(context_id, guarded(place))
    large = {"path": place.runs, "line": "y" * 300_000}
    said = verdict(found["id"], "approve", arguments=large)
    refused = problem(api.post_decisions(context_id, said), 413, "payload_too_large")
    assert refused["limit_bytes"] == 262_144
    assert api.context(context_id)["pending_tool_calls"] == [found["id"]]
    api.cancel(context_id)
