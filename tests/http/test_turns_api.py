"""§5 and §6 at the wire: the machine, the journal, turns, cancel, retry and back-off."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from serving import Server
from wire import ENDLESS, SILENT, TIMESTAMP, Api, Json, invalid, ok, problem, script, until

TURN_FIELDS = {
    "id", "context_id", "branch", "status", "attempt", "retry_of", "started_at", "ended_at",
    "first_chunk_ms", "phases", "message_ids", "usage", "error",
}  # fmt: skip
ENTRY_FIELDS = {
    "revision", "turn_id", "trigger", "from_state", "to_state", "at", "duration_ms", "detail",
}  # fmt: skip

TURN_STATES = (
    "processing_user_message", "awaiting_llm_response", "streaming_llm_response",
    "processing_llm_response", "awaiting_tool_approval", "executing_tools",
    "awaiting_tool_results", "processing_tool_results", "transient_failure",
)  # fmt: skip
STATES = {"idle", *TURN_STATES, "failed", "producing"}

# The table of §5, as the page has it.
TABLE: dict[str, list[tuple[tuple[str, ...], str | None]]] = {
    "receive_message": [(("idle", "failed"), "processing_user_message")],
    "request_llm": [
        (
            ("processing_user_message", "processing_tool_results", "transient_failure"),
            "awaiting_llm_response",
        )
    ],
    "first_chunk": [(("awaiting_llm_response",), "streaming_llm_response")],
    "end_stream": [
        (("awaiting_llm_response", "streaming_llm_response"), "processing_llm_response")
    ],
    "require_approval": [(("processing_llm_response",), "awaiting_tool_approval")],
    "execute_tools": [(("processing_llm_response", "awaiting_tool_approval"), "executing_tools")],
    "await_results": [(("executing_tools",), "awaiting_tool_results")],
    "collect_results": [
        (
            (
                "processing_llm_response", "awaiting_tool_approval", "executing_tools",
                "awaiting_tool_results",
            ),
            "processing_tool_results",
        )
    ],
    "finish": [(("processing_llm_response", "processing_tool_results"), "idle")],
    "fail_transiently": [
        (("awaiting_llm_response", "streaming_llm_response"), "transient_failure")
    ],
    "fail": [(TURN_STATES, "failed")],
    "retry": [(("failed",), "awaiting_llm_response")],
    "cancel": [((*TURN_STATES, "producing"), "idle")],
    "open_message": [(("idle", "failed", "producing"), "producing")],
    "close_message": [(("producing",), "idle")],
    "recover": [
        (("awaiting_llm_response", "streaming_llm_response"), "transient_failure"),
        (
            (
                "processing_user_message", "processing_llm_response", "processing_tool_results",
                "executing_tools", "transient_failure",
            ),
            None,
        ),
    ],
}  # fmt: skip
TRANSITIONS = {
    (trigger, source, target or source)
    for trigger, rows in TABLE.items()
    for sources, target in rows
    for source in sources
}


@pytest.fixture(scope="module")
def patient(make_server: Any) -> Iterator[Api]:
    """A server that waits for minutes before it tries a second time."""
    client = Api(make_server(backoff_initial_s=300, backoff_max_s=300).url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def hasty(make_server: Any) -> Iterator[Api]:
    """A server with little patience: for a token, and for attempts."""
    client = Api(make_server(token_timeout_s=0.2, attempts_max=2, turn_timeout_s=1.5).url)
    yield client
    client.close()


# The machine


def test_the_machine_is_the_table_of_the_protocol(api: Api) -> None:
    """States, triggers and every transition, and none besides."""
    machine = ok(api.http.get("/machine"))
    assert set(machine) == {"states", "triggers", "transitions"}
    assert set(machine["states"]) == STATES
    assert len(machine["states"]) == len(STATES)
    assert set(machine["triggers"]) == set(TABLE)
    for row in machine["transitions"]:
        assert set(row) == {"trigger", "from_state", "to_state"}
    rows = [(r["trigger"], r["from_state"], r["to_state"]) for r in machine["transitions"]]
    assert len(rows) == len(set(rows))
    assert set(rows) == TRANSITIONS


def test_the_machine_as_a_diagram(api: Api) -> None:
    """`Accept: text/vnd.mermaid` gives a state diagram that names every state and trigger."""
    response = api.http.get("/machine", headers={"accept": "text/vnd.mermaid"})
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == "text/vnd.mermaid"
    assert "stateDiagram" in response.text
    for name in STATES | set(TABLE):
        assert name in response.text
    assert "accept" in response.headers["vary"].lower()
    ok(api.http.get("/machine", headers={"accept": "application/json, text/vnd.mermaid;q=0.5"}))


# The journal


def test_the_journal_of_a_plain_turn(api: Api, context_id: str) -> None:
    """Five steps, oldest first, each its own revision, each allowed by the table."""
    answer, _ = api.run(context_id, "hello")
    journal = api.journal(context_id)
    assert [entry["trigger"] for entry in journal] == [
        "receive_message", "request_llm", "first_chunk", "end_stream", "finish",
    ]  # fmt: skip
    for entry in journal:
        assert set(entry) == ENTRY_FIELDS
        assert (entry["trigger"], entry["from_state"], entry["to_state"]) in TRANSITIONS
        assert entry["turn_id"] == answer["turn_id"]
        assert TIMESTAMP.fullmatch(entry["at"])
        assert entry["duration_ms"] >= 0
        assert isinstance(entry["detail"], dict)
    for before, after in pairwise(journal):
        assert after["revision"] == before["revision"] + 1
        assert after["from_state"] == before["to_state"]
    assert journal[0]["revision"] == answer["revision"]
    assert journal[-1]["revision"] == api.context(context_id)["revision"]
    path = f"/contexts/{context_id}/transitions"
    assert api.walk(path, limit=2) == api.walk(path, limit=5) == journal


@pytest.mark.parametrize("list_", ["transitions", "turns"])
@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("cursor=garbage", "cursor"), ("a=1", "a")],
)
def test_a_wrong_parameter_of_these_lists_is_named(
    api: Api, context_id: str, list_: str, query: str, field: str
) -> None:
    """400 with its name."""
    invalid(api.http.get(f"/contexts/{context_id}/{list_}?{query}"), field)


# Turns


def test_a_turn_that_completed(api: Api, context_id: str) -> None:
    """Its thirteen fields, its messages in order, and its time by states."""
    text = script({"thinking": "hm"}, {"text": "yes"}, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    answer, turn = api.run(context_id, text)
    assert set(turn) == TURN_FIELDS
    assert turn["id"] == answer["turn_id"]
    assert turn["context_id"] == context_id
    assert (turn["branch"], turn["status"], turn["attempt"]) == ("main", "completed", 1)
    assert turn["retry_of"] is turn["error"] is None
    assert TIMESTAMP.fullmatch(turn["started_at"])
    assert TIMESTAMP.fullmatch(turn["ended_at"])
    assert turn["first_chunk_ms"] >= 0
    assert turn["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    assert turn["message_ids"] == [message["id"] for message in api.messages(context_id)]
    assert set(turn["phases"]) <= set(TURN_STATES)
    assert {"awaiting_llm_response", "streaming_llm_response"} <= set(turn["phases"])
    assert all(ms >= 0 for ms in turn["phases"].values())
    last = api.messages(context_id)[-1]
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    assert isinstance(last["finish_reason"], str)


def test_turns_are_listed_and_paged(api: Api, context_id: str) -> None:
    """Every turn once, the running and the queued as well."""
    ids = [api.run(context_id, str(n))[0]["turn_id"] for n in range(2)]
    ids += [api.send(context_id, SILENT)["turn_id"], api.send(context_id, "queued")["turn_id"]]
    path = f"/contexts/{context_id}/turns"
    turns = api.walk(path)
    assert sorted(turn["id"] for turn in turns) == sorted(ids)
    assert {turn["id"]: turn["status"] for turn in turns} == {
        ids[0]: "completed", ids[1]: "completed", ids[2]: "running", ids[3]: "queued",
    }  # fmt: skip
    queued = api.turn(context_id, ids[3])
    assert queued["started_at"] is queued["ended_at"] is queued["first_chunk_ms"] is None
    assert queued["phases"] == {}
    for limit in (1, 3, 4):
        assert [turn["id"] for turn in api.walk(path, limit=limit)] == [turn["id"] for turn in turns]
    api.http.delete(f"/contexts/{context_id}")


def test_unknown_turns_are_404(api: Api, context_id: str) -> None:
    """turn_not_found with the id; also of another context."""
    elsewhere = api.run(api.create(), "x")[0]["turn_id"]
    for turn_id in ("nothing", elsewhere, "x" * 65):
        path = f"/contexts/{context_id}/turns/{turn_id}"
        for response in (api.http.get(path), api.http.post(f"{path}/cancel")):
            assert problem(response, 404, "turn_not_found")["turn_id"] == turn_id


def test_an_answer_without_a_word_completes(api: Api, context_id: str) -> None:
    """A turn never hangs, also when the model says nothing."""
    _, turn = api.run(context_id, script())
    assert turn["status"] == "completed"
    assert api.context(context_id)["state"] == "idle"


# Cancel


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


# Retry


def test_a_failed_turn_can_be_tried_again(api: Api, context_id: str) -> None:
    """202 with a new turn that has retry_of; what failed stays, and is not shown to the model."""
    answer, turn = api.run(context_id, script({"text": "half "}, {"error": "fatal"}))
    assert turn["status"] == "failed"
    assert turn["error"]["type"]
    assert turn["error"]["message"]
    context = api.context(context_id)
    assert context["state"] == "failed"
    assert context["state_detail"]["error"] == turn["error"]
    assert context["can_send"] is True
    (reply,) = api.replies(context_id, answer["turn_id"])
    assert (reply["status"], reply["error"]) == ("failed", turn["error"])
    assert api.text(context_id, reply["id"]) == "half "
    response = api.http.post(f"/contexts/{context_id}/retry")
    retried = ok(response, 202)
    assert set(retried) == {"turn_id", "state", "revision"}
    assert retried["turn_id"] != answer["turn_id"]
    assert retried["state"] == "awaiting_llm_response"
    assert retried["revision"] == context["revision"] + 1
    again = api.ended(context_id, retried["turn_id"])
    assert again["retry_of"] == answer["turn_id"]
    assert again["status"] == "failed"  # the same script
    assert [e["trigger"] for e in api.journal(context_id)].count("retry") == 1
    third = ok(api.http.post(f"/contexts/{context_id}/retry"), 202)
    assert api.ended(context_id, third["turn_id"])["retry_of"] == retried["turn_id"]


def test_retry_is_only_possible_from_failed(api: Api, context_id: str) -> None:
    """Else 409 illegal_transition with state, trigger and what is allowed; nothing changed."""
    refusal = problem(api.http.post(f"/contexts/{context_id}/retry"), 409, "illegal_transition")
    assert (refusal["state"], refusal["trigger"]) == ("idle", "retry")
    assert set(refusal["allowed"]) == {"receive_message", "open_message"}
    api.send(context_id, ENDLESS)
    api.opened(context_id)
    before = api.context(context_id)
    refusal = problem(api.http.post(f"/contexts/{context_id}/retry"), 409, "illegal_transition")
    assert refusal["state"] == "streaming_llm_response"
    assert set(refusal["allowed"]) == {
        trigger for trigger, source, _ in TRANSITIONS if source == "streaming_llm_response"
    }
    assert api.context(context_id)["revision"] == before["revision"]
    api.cancel(context_id)
    problem(api.http.post(f"/contexts/{context_id}/retry"), 409, "illegal_transition")


def test_a_message_after_a_failure_starts_a_turn(api: Api, context_id: str) -> None:
    """receive_message is possible in `failed`."""
    _, turn = api.run(context_id, script({"error": "fatal"}))
    assert turn["status"] == "failed"
    assert api.reply(context_id, "hello")["status"] == "completed"
    assert api.context(context_id)["state_detail"] == {}


# Transient errors


def test_transient_errors_are_tried_again(api: Api, context_id: str) -> None:
    """Each attempt writes new messages; the broken ones' are interrupted, and leave the lists."""
    text = script({"text": "half an "}, {"error": "transient", "times": 2}, {"text": "answer"})
    answer, turn = api.run(context_id, text)
    assert (turn["status"], turn["attempt"]) == ("completed", 3)
    replies = api.replies(context_id, answer["turn_id"])
    assert [m["status"] for m in replies] == ["interrupted", "interrupted", "completed"]
    for broken in replies[:2]:
        assert broken["final_sequence"] == 2
        assert api.text(context_id, broken["id"]) == "half an "
    assert api.text(context_id, replies[2]["id"]) == "half an answer"
    listed = api.messages(context_id)
    assert [m["id"] for m in listed] == [answer["message_id"], replies[2]["id"]]
    assert listed[1]["parent_id"] == answer["message_id"]
    assert api.context(context_id)["message_count"] == 2
    triggers = [entry["trigger"] for entry in api.journal(context_id)]
    assert triggers == [
        "receive_message", "request_llm", "first_chunk", "fail_transiently", "request_llm",
        "first_chunk", "fail_transiently", "request_llm", "first_chunk", "end_stream", "finish",
    ]  # fmt: skip


def test_attempts_are_bounded(api: Api, context_id: str) -> None:
    """At most 4 by default, then the turn fails: also before a first chunk."""
    for first in ({"text": "x "}, {"delay_ms": 0}):
        answer, turn = api.run(context_id, script(first, {"error": "transient"}))
        assert (turn["status"], turn["attempt"]) == ("failed", 4)
        context = api.context(context_id)
        assert context["state"] == "failed"
        assert context["state_detail"]["error"] == turn["error"]
        replies = api.replies(context_id, answer["turn_id"])
        assert replies[-1]["status"] == "failed"
        assert {m["status"] for m in replies[:-1]} <= {"interrupted"}
        triggers = [
            e["trigger"] for e in api.journal(context_id) if e["turn_id"] == answer["turn_id"]
        ]
        assert triggers.count("request_llm") == 4
        assert triggers[-1] == "fail"
    assert len(api.messages(context_id)) == 4


def test_a_fatal_error_fails_at_once(api: Api, context_id: str) -> None:
    """Without another attempt; without a word an empty message is closed as failed."""
    answer, turn = api.run(context_id, script({"error": "fatal"}))
    assert (turn["status"], turn["attempt"]) == ("failed", 1)
    (reply,) = api.replies(context_id, answer["turn_id"])
    assert (reply["status"], reply["final_sequence"]) == ("failed", 0)
    assert [e["trigger"] for e in api.journal(context_id)] == [
        "receive_message", "request_llm", "fail",
    ]  # fmt: skip


def test_transient_failure_says_attempt_wait_and_error(patient: Api) -> None:
    """state_detail holds what the state needs said, and the interrupted message is out of lists."""
    context_id = patient.create()
    answer = patient.send(context_id, script({"text": "half "}, {"error": "transient"}))
    context = patient.in_state(context_id, "transient_failure")
    detail = context["state_detail"]
    assert detail["attempt"] == 1
    assert 0 < detail["wait_ms"] <= 300_000
    assert set(detail["error"]) == {"type", "message"}
    assert context["open_messages"] == []
    assert context["message_count"] == 1
    assert [m["id"] for m in patient.messages(context_id)] == [answer["message_id"]]
    (broken,) = patient.replies(context_id, answer["turn_id"])
    assert broken["status"] == "interrupted"
    assert patient.pull(context_id, broken["id"])["final"] is True
    interrupting = patient.send(context_id, "now", on_busy="interrupt")
    assert patient.ended(context_id, interrupting["turn_id"])["status"] == "completed"
    assert patient.turn(context_id, answer["turn_id"])["status"] == "cancelled"


def test_usage_of_broken_attempts_counts(api: Api, context_id: str) -> None:
    """What was paid for is the turn's usage."""
    usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 1}}
    _, turn = api.run(
        context_id, script(usage, {"error": "transient", "times": 1}, {"text": "x"})
    )
    assert turn["status"] == "completed"
    assert turn["usage"] == {"prompt_tokens": 20, "completion_tokens": 2}


def test_silence_is_a_transient_error(hasty: Api) -> None:
    """Without a token for the time that is set, the attempt breaks; then it fails."""
    context_id = hasty.create()
    answer, turn = hasty.run(context_id, script({"text": "a "}, {"delay_ms": 600_000}))
    assert (turn["status"], turn["attempt"]) == ("failed", 2)
    statuses = [m["status"] for m in hasty.replies(context_id, answer["turn_id"])]
    assert statuses == ["interrupted", "failed"]


def test_a_turn_has_a_time_limit(hasty: Api) -> None:
    """The server's work of a turn is bounded, however busily the model writes."""
    context_id = hasty.create()
    text = script({"rate": 100}, {"repeat": 1_000_000, "text": "x"})
    answer, turn = hasty.run(context_id, text)
    assert turn["status"] == "failed"
    (reply,) = hasty.replies(context_id, answer["turn_id"])
    assert reply["status"] == "failed"
    assert reply["final_sequence"] >= 1
    assert hasty.reply(context_id, "x")["status"] == "completed"


# Branches and turns


def test_a_turn_keeps_the_branch_that_it_started_on(api: Api, context_id: str) -> None:
    """A switch of the view in the middle leaves the answer where its question is."""
    first, _ = api.run(context_id, "one")
    api.run(context_id, "fork", parent_id=first["message_id"])
    fork = api.context(context_id)["active_branch"]
    text = script({"text": "a "}, {"delay_ms": 300}, {"text": "b "}, {"thinking": "c"})
    answer = api.send(context_id, text)
    api.opened(context_id)
    ok(api.http.patch(f"/contexts/{context_id}", json={"active_branch": "main"}))
    turn = api.ended(context_id, answer["turn_id"])
    assert turn["branch"] == fork
    replies = {m["id"] for m in api.replies(context_id, answer["turn_id"])}
    assert replies <= {m["id"] for m in api.messages(context_id, branch=fork)}
    assert replies.isdisjoint(m["id"] for m in api.messages(context_id, branch="main"))


# A crash


def test_a_crash_costs_an_attempt_and_nothing_else(make_server: Any) -> None:
    """The turn goes on after a restart: its message interrupted, the queue in order, all exact."""
    server: Server = make_server(scripted_rate=0)
    api = Api(server.url)
    context_id = api.create()
    text = script({"text": "a b c "}, {"delay_ms": 800}, {"text": "d"})
    running = api.send(context_id, text)
    queued = api.send(context_id, "next", message_id="queued")
    opened = until(lambda: [m for m in api.context(context_id)["open_messages"]
                            if m["current_sequence"] == 3])[0]  # fmt: skip
    cursor = api.context(context_id)["stream_cursor"]
    server.kill()
    api.close()
    server.start()
    api = Api(server.url)
    turn = api.ended(context_id, running["turn_id"])
    assert (turn["status"], turn["attempt"]) == ("completed", 2)
    broken = api.message(context_id, opened["message_id"])
    assert (broken["status"], broken["final_sequence"]) == ("interrupted", 3)
    assert api.text(context_id, broken["id"]) == "a b c "
    assert api.ended(context_id, queued["turn_id"])["status"] == "completed"
    assert api.send(context_id, "next", message_id="queued")["turn_id"] == queued["turn_id"]
    listed = api.messages(context_id)
    assert [m["role"] for m in listed] == ["user", "assistant"] * 2
    assert api.text(context_id, listed[1]["id"]) == "a b c d"
    assert "recover" in [entry["trigger"] for entry in api.journal(context_id)]
    frames = api.attach(context_id, last_event_id=cursor)
    ends = {f["message_id"]: f["status"] for f in frames if f.type == "message_completed"}
    assert ends[broken["id"]] == "interrupted"
    assert {m["id"] for m in listed[1:]} <= set(ends)
    api.close()
