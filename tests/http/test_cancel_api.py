"""§6 at the wire: cancelling, in every state that a turn reaches without tools."""

import pytest
from protocol_table import TURN_STATES
from wire import ENDLESS, SILENT, TIMESTAMP, Api, Json, invalid, ok, script, until


def check_cancelled(api: Api, context_id: str, turn_id: str) -> Json:
    """What holds after every cancel; returns the turn's last assistant's message."""
    turn = api.turn(context_id, turn_id)
    assert turn["status"] == "cancelled"
    assert TIMESTAMP.fullmatch(turn["ended_at"])
    context = api.context(context_id)
    assert context["state"] == "idle"
    assert context["state_detail"] == {}
    assert context["open_messages"] == []
    assert api.journal(context_id)[-1]["trigger"] == "cancel"
    replies = api.replies(context_id, turn_id)
    assert replies[-1]["role"] == "assistant"
    assert replies[-1]["status"] == "cancelled"
    assert replies[-1]["final_sequence"] == replies[-1]["current_sequence"]
    return replies[-1]


def test_cancel_while_the_model_is_silent(api: Api, context_id: str) -> None:
    """awaiting_llm_response: an empty message is closed as cancelled."""
    answer = api.send(context_id, SILENT)
    api.in_state(context_id, "awaiting_llm_response")
    cancelled = api.cancel(context_id)
    assert cancelled == {"state": "idle", "cancelled_turn_id": answer["turn_id"]}
    message = check_cancelled(api, context_id, answer["turn_id"])
    assert message["final_sequence"] == 0
    assert [m["id"] for m in api.messages(context_id)] == [answer["message_id"], message["id"]]


def test_cancel_while_the_model_writes(api: Api, context_id: str) -> None:
    """streaming_llm_response: open messages are closed at their committed head, and stay so."""
    answer = api.send(context_id, script({"rate": 1000}, {"repeat": 1_000_000, "text": "x"}))
    api.opened(context_id)
    assert api.cancel(context_id)["cancelled_turn_id"] == answer["turn_id"]
    message = check_cancelled(api, context_id, answer["turn_id"])
    assert message["final_sequence"] >= 1
    assert api.text(context_id, message["id"]) == "x" * message["final_sequence"]
    assert message["stats"]["chunks"] == message["final_sequence"]
    api.run(context_id, "time passes")
    assert api.message(context_id, message["id"]) == message
    pulled = api.pull(context_id, message["id"])
    assert pulled["head_sequence"] == message["final_sequence"]


def test_cancel_closes_every_open_message(api: Api, context_id: str) -> None:
    """Thinking and text alike."""
    text = script({"thinking": "a b "}, {"text": "c "}, {"delay_ms": 600_000})
    answer = api.send(context_id, text)
    until(lambda: len(api.context(context_id)["open_messages"]) == 2)
    api.cancel(context_id)
    check_cancelled(api, context_id, answer["turn_id"])
    replies = api.replies(context_id, answer["turn_id"])
    assert [(m["kind"], m["status"]) for m in replies] == [
        ("thinking", "cancelled"), ("text", "cancelled"),
    ]  # fmt: skip


def test_cancel_while_waiting_to_try_again(patient: Api) -> None:
    """transient_failure: the wait ends, and an empty message stands for the turn's end."""
    context_id = patient.create()
    answer = patient.send(context_id, script({"text": "half "}, {"error": "transient"}))
    context = patient.in_state(context_id, "transient_failure")
    assert context["state_detail"]["attempt"] == 1
    assert context["state_detail"]["wait_ms"] > 0
    patient.cancel(context_id)
    message = check_cancelled(patient, context_id, answer["turn_id"])
    assert message["final_sequence"] == 0
    listed = [m["id"] for m in patient.messages(context_id)]
    assert listed == [answer["message_id"], message["id"]]
    assert patient.reply(context_id, "on")["status"] == "completed"


def test_cancel_when_nothing_runs_changes_nothing(api: Api, context_id: str) -> None:
    """200, cancelled_turn_id null: idle, failed, after a turn, and twice."""
    assert api.cancel(context_id) == {"state": "idle", "cancelled_turn_id": None}
    answer, _ = api.run(context_id, "x")
    before = api.context(context_id)
    assert api.cancel(context_id)["cancelled_turn_id"] is None
    assert api.cancel(context_id, turn_id=answer["turn_id"])["cancelled_turn_id"] is None
    path = f"/contexts/{context_id}/turns/{answer['turn_id']}/cancel"
    assert ok(api.http.post(path))["cancelled_turn_id"] is None
    assert api.context(context_id) == before
    api.run(context_id, script({"error": "fatal"}))
    assert api.cancel(context_id) == {"state": "failed", "cancelled_turn_id": None}


def test_cancel_of_another_turn_changes_nothing(api: Api, context_id: str) -> None:
    """Another turn than the one named: a click that comes late never hits the next turn."""
    old, _ = api.run(context_id, "x")
    running = api.send(context_id, ENDLESS)
    api.opened(context_id)
    for turn_id in (old["turn_id"], "nothing"):
        answer = api.cancel(context_id, turn_id=turn_id)
        assert answer == {"state": "streaming_llm_response", "cancelled_turn_id": None}
    named = api.cancel(context_id, turn_id=running["turn_id"])
    assert named == {"state": "idle", "cancelled_turn_id": running["turn_id"]}


def test_cancel_needs_no_body(api: Api, context_id: str) -> None:
    """`{"turn_id"?}`: an empty object, and no body at all."""
    path = f"/contexts/{context_id}/cancel"
    for response in (api.http.post(path), api.http.post(path, json={})):
        assert ok(response)["cancelled_turn_id"] is None


def test_a_field_where_none_is_known_is_named(api: Api, context_id: str) -> None:
    """Routes without a body of their own ignore nothing either (§1); nothing is done."""
    _, turn = api.run(context_id, script({"error": "fatal"}))
    for path in ("retry", f"turns/{turn['id']}/cancel"):
        response = api.http.post(f"/contexts/{context_id}/{path}", json={"colour": "red"})
        invalid(response, "colour")
    assert api.context(context_id)["state"] == "failed"


@pytest.mark.parametrize(
    ("body", "field"),
    [({"turn_id": 5}, "turn_id"), ({"turn": "x"}, "turn"), ({"turn_id": "a b"}, "turn_id")],
)
def test_a_wrong_field_of_a_cancel_is_named(
    api: Api, context_id: str, body: Json, field: str
) -> None:
    """400, and the turn runs on."""
    answer = api.send(context_id, ENDLESS)
    invalid(api.http.post(f"/contexts/{context_id}/cancel", json=body), field)
    assert api.turn(context_id, answer["turn_id"])["status"] == "running"
    api.cancel(context_id)


def test_cancel_starts_what_is_queued(api: Api, context_id: str) -> None:
    """The queue goes on after a cancelled turn."""
    api.send(context_id, ENDLESS)
    queued = api.send(context_id, "next")
    api.opened(context_id)
    assert api.cancel(context_id)["state"] in TURN_STATES
    assert api.ended(context_id, queued["turn_id"])["status"] == "completed"


def test_what_was_sent_as_the_assistant_is_no_answer(api: Api, context_id: str) -> None:
    """Every turn's end is seen as a message_completed, whatever the role of what was sent."""
    api.send(context_id, SILENT, respond=False)
    sent = api.send(context_id, "said by the assistant", role="assistant")
    api.in_state(context_id, "awaiting_llm_response")
    cursor = api.context(context_id)["stream_cursor"]
    api.cancel(context_id)
    assert api.messages(context_id)[-1]["status"] == "cancelled"
    frames = api.attach(context_id, last_event_id=cursor)
    ends = [f for f in frames if f.type == "message_completed"]
    assert [f["status"] for f in ends] == ["cancelled"]
    assert ends[0]["message_id"] != sent["message_id"]


def test_a_queued_turn_can_be_taken_out(api: Api, context_id: str) -> None:
    """The running one is not touched; the queued one ends as cancelled, seen as a completion."""
    running = api.send(context_id, ENDLESS)
    queued = [api.send(context_id, str(n)) for n in range(3)]
    api.opened(context_id)
    cursor = api.context(context_id)["stream_cursor"]
    path = f"/contexts/{context_id}/turns/{queued[1]['turn_id']}/cancel"
    answer = ok(api.http.post(path))
    assert answer["cancelled_turn_id"] == queued[1]["turn_id"]
    assert answer["state"] == "streaming_llm_response"
    assert ok(api.http.post(path))["cancelled_turn_id"] is None
    turn = api.turn(context_id, queued[1]["turn_id"])
    assert turn["status"] == "cancelled"
    assert turn["started_at"] is None
    assert TIMESTAMP.fullmatch(turn["ended_at"])
    assert api.context(context_id)["queued_messages"] == 2
    assert api.turn(context_id, running["turn_id"])["status"] == "running"
    frames = api.attach(context_id, last_event_id=cursor)
    (reply,) = api.replies(context_id, queued[1]["turn_id"])
    assert (reply["status"], reply["final_sequence"]) == ("cancelled", 0)
    ends = [f["message_id"] for f in frames if f.type == "message_completed"]
    assert reply["id"] in ends
    api.cancel(context_id)
    for other in (queued[0], queued[2]):
        assert api.ended(context_id, other["turn_id"])["status"] == "completed"
    texts = [api.text(context_id, m["id"]) for m in api.messages(context_id)]
    assert [t for t in texts if t in ("0", "1", "2")] == ["0", "2"]
    assert api.context(context_id)["message_count"] == len(texts)


def test_a_running_turn_can_be_cancelled_by_its_path(api: Api, context_id: str) -> None:
    """As with `POST …/cancel` and its id."""
    answer = api.send(context_id, ENDLESS)
    api.opened(context_id)
    path = f"/contexts/{context_id}/turns/{answer['turn_id']}/cancel"
    assert ok(api.http.post(path)) == {"state": "idle", "cancelled_turn_id": answer["turn_id"]}
    check_cancelled(api, context_id, answer["turn_id"])


def test_exactly_one_end_however_often_it_is_asked_for(api: Api, context_id: str) -> None:
    """A cancel against the natural end: one of them wins, and the journal has one end."""
    for _ in range(10):
        answer = api.send(context_id, "a b c")
        cancelled = api.cancel(context_id)["cancelled_turn_id"]
        turn = api.ended(context_id, answer["turn_id"])
        assert turn["status"] == ("cancelled" if cancelled else "completed")
        ends = [
            entry["trigger"]
            for entry in api.journal(context_id)
            if entry["turn_id"] == answer["turn_id"]
            and entry["trigger"] in ("finish", "cancel", "fail")
        ]
        assert len(ends) == 1
