"""§6 at the wire: the end of a turn that called tools is seen, and what it changes is said."""

from datetime import datetime

import pytest
from tooling import Place, ToolApi, ask, call, external, guarded, verdict
from wire import Json, script, until

WAITS = {"delay_ms": 600_000}


@pytest.fixture
def api(tooled: ToolApi) -> ToolApi:
    return tooled


def last(api: ToolApi, context_id: str) -> tuple[Json, int]:
    """The newest message, and how many came to the same end."""
    listed = api.messages(context_id)
    return listed[-1], sum(one["status"] == listed[-1]["status"] for one in listed)


def in_second_round(api: ToolApi, context_id: str, state: str) -> None:
    """Waits until the context stands in `state` after its calls were written."""
    until(lambda: api.calls(context_id) and api.context(context_id)["state"] == state)


def open_texts(api: ToolApi, context_id: str) -> list[Json]:
    return [one for one in api.context(context_id)["open_messages"] if one["kind"] == "text"]


@pytest.mark.parametrize("state", ["awaiting_tool_approval", "awaiting_llm_response"])
def test_a_cancel_between_two_rounds_is_seen(api: ToolApi, place: Place, state: str) -> None:
    """Nothing was open, so an empty answer says it: on the stream, and in the list."""
    context_id = api.create()
    first = guarded(place) if state == "awaiting_tool_approval" else call("echo", text="a")
    turn_id = api.send(context_id, script(first, WAITS))["turn_id"]
    in_second_round(api, context_id, state)
    with api.stream(context_id) as stream:
        stream.current()
        api.cancel(context_id)
        told = stream.until_state("idle")
    ended = [frame for frame in told if frame["type"] == "message_completed"]
    message, ends = last(api, context_id)
    assert [(frame["message_id"], frame["status"]) for frame in ended] == [
        (message["id"], "cancelled")
    ]
    assert ends == 1
    assert (message["role"], message["kind"], message["final_sequence"]) == ("assistant", "text", 0)
    assert message["turn_id"] == turn_id
    assert api.turn(context_id, turn_id)["status"] == "cancelled"


def test_a_failure_between_two_rounds_is_seen(api: ToolApi) -> None:
    """With its error, on a message of its own."""
    context_id = api.create()
    turn, _ = api.played(context_id, call("echo", text="a"), {"error": "fatal"})
    message, ends = last(api, context_id)
    assert (turn["status"], message["status"], ends) == ("failed", "failed", 1)
    assert message["error"] == turn["error"]
    assert message["final_sequence"] == 0


def test_what_was_being_written_is_the_end(api: ToolApi) -> None:
    """Then no other message says it too."""
    context_id = api.create()
    api.send(context_id, script(call("echo", text="a"), {"text": "half an "}, WAITS))
    until(lambda: [one["current_sequence"] for one in open_texts(api, context_id)] == [2])
    api.cancel(context_id)
    message, ends = last(api, context_id)
    assert (message["status"], message["final_sequence"], ends) == ("cancelled", 2, 1)


def test_calls_move_the_record(api: ToolApi, place: Place) -> None:
    """When they are written, decided, begun and ended (§4), and with nothing else."""
    context_id = api.create(tools=["guarded", external("ask")])
    created = api.context(context_id)["record_revision"]
    _, (kept, asked) = api.pending(context_id, guarded(place), ask())
    moved = [created, api.context(context_id)["record_revision"]]
    api.decide(context_id, verdict(kept["id"], "approve"))
    api.in_state(context_id, "awaiting_tool_results")
    moved.append(api.context(context_id)["record_revision"])
    api.answer(context_id, asked["id"])
    api.in_state(context_id, "idle")
    moved.append(api.context(context_id)["record_revision"])
    assert moved == sorted(set(moved))


def test_waiting_for_an_external_tool_changes_nothing_else(api: ToolApi) -> None:
    """One revision a step: what runs nowhere here is not begun."""
    context_id = api.create(tools=[external("ask")])
    api.asked(context_id, ask())
    steps = {entry["trigger"]: entry["revision"] for entry in api.journal(context_id)}
    assert steps["await_results"] == steps["execute_tools"] + 1
    api.cancel(context_id)


def test_a_tool_that_was_declared_anew_is_another_one(api: ToolApi, place: Place) -> None:
    """What was approved is not run by somebody else: the model is told."""
    context_id = api.create(tools=["guarded"])
    turn_id, (found,) = api.pending(context_id, guarded(place), {"text": "done"})
    tools = {"tools": [external("guarded")]}
    assert api.http.patch(f"/contexts/{context_id}", json=tools).status_code == 200
    api.decide(context_id, verdict(found["id"], "approve"))
    assert api.ended(context_id, turn_id)["status"] == "completed"
    (found,) = api.calls(context_id)
    assert (found["status"], found["error"]) == ("failed", "unknown_tool")
    assert place.lines() == []


def test_other_arguments_are_another_decision(api: ToolApi, place: Place) -> None:
    """The same again is harmless, also with the arguments that it was given; others are 409."""
    context_id = api.create()
    _, (first, _) = api.pending(context_id, guarded(place, "1"), guarded(place, "2"))
    edited = {"path": place.runs, "line": "edited"}
    for _ in range(2):
        api.decide(context_id, verdict(first["id"], "approve", arguments=edited))
    api.decide(context_id, verdict(first["id"], "approve"))
    other = {"path": place.runs, "line": "other"}
    answer = api.post_decisions(context_id, verdict(first["id"], "approve", arguments=other))
    assert (answer.status_code, answer.json()["code"]) == (409, "tool_call_decided")
    assert api.calls(context_id)[0]["arguments"] == edited
    api.cancel(context_id)


def test_the_first_chunk_is_the_turns_first(api: ToolApi) -> None:
    """Of all its rounds: a later message does not move it; and the journal says how long each state took."""
    context_id = api.create()
    turn, _ = api.played(
        context_id, {"text": "a "}, call("echo", text="x"), {"delay_ms": 300}, {"text": "b"}
    )
    first = next(one for one in api.journal(context_id) if one["trigger"] == "first_chunk")
    elapsed = datetime.fromisoformat(first["at"]) - datetime.fromisoformat(turn["started_at"])
    # The two are read from clocks of different kinds; a later message would come 300 ms after.
    assert abs(turn["first_chunk_ms"] - elapsed.total_seconds() * 1000) < 290
    waited = [
        entry["duration_ms"]
        for entry in api.journal(context_id)
        if entry["from_state"] == "awaiting_llm_response"
    ]
    assert len(waited) == 2
    assert waited[1] >= 290
    assert sum(waited) == turn["phases"]["awaiting_llm_response"]


def test_a_retry_says_of_what_it_is_one(api: ToolApi) -> None:
    """In the journal as in the turn."""
    context_id = api.create()
    failed, _ = api.played(context_id, call("echo", text="x"), {"error": "fatal"})
    answer = api.http.post(f"/contexts/{context_id}/retry")
    assert answer.status_code == 202
    api.ended(context_id, answer.json()["turn_id"])
    (retry,) = [entry for entry in api.journal(context_id) if entry["trigger"] == "retry"]
    assert retry["detail"] == {"retry_of": failed["id"]}
    assert retry["turn_id"] == answer.json()["turn_id"]
