"""§6 at the wire: turns, retry, back-off, and a crash."""

from collections.abc import Iterator
from typing import Any

import pytest
from protocol_table import TRANSITIONS, TURN_STATES
from serving import Server
from wire import ENDLESS, SILENT, TIMESTAMP, Api, ok, problem, script, until

TURN_FIELDS = {
    "id", "context_id", "branch", "status", "attempt", "retry_of", "started_at", "ended_at",
    "first_chunk_ms", "phases", "message_ids", "finish_reason", "usage", "error",
}  # fmt: skip


@pytest.fixture(scope="module")
def hasty(make_server: Any) -> Iterator[Api]:
    """A server with little patience: for a token, and for attempts."""
    client = Api(make_server(token_timeout_s=0.2, attempts_max=2, turn_timeout_s=1.5).url)
    yield client
    client.close()


# Turns


def test_a_turn_that_completed(api: Api, context_id: str) -> None:
    """Its thirteen fields, its messages in order, and its time by states."""
    text = script(
        {"thinking": "hm"}, {"text": "yes"}, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    )
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
        assert [turn["id"] for turn in api.walk(path, limit=limit)] == [
            turn["id"] for turn in turns
        ]
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
    assert api.journal(context_id)[-1]["duration_ms"] == 0  # it ended with the end of the answer


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
    _, turn = api.run(context_id, script(usage, {"error": "transient", "times": 1}, {"text": "x"}))
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
    server: Server = make_server()
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
