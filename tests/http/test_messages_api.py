"""§3.1 and §3.2 at the wire: sending, the queue, forks, and lists."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import (
    ENDLESS,
    SILENT,
    TIMESTAMP,
    UUID7,
    Api,
    Json,
    invalid,
    ok,
    problem,
    script,
    until,
)

MESSAGE_FIELDS = {
    "id", "context_id", "turn_id", "parent_id", "role", "kind", "status", "current_sequence",
    "final_sequence", "media_type", "finish_reason", "usage", "error", "metadata",
    "client_metadata", "stats", "created_at", "completed_at",
}  # fmt: skip
SEND_FIELDS = {
    "context_id", "message_id", "turn_id", "state", "revision", "stream_cursor", "queued",
}  # fmt: skip
STATS_FIELDS = {"chunks", "characters", "bytes"}

TURN_STATES = {
    "processing_user_message", "awaiting_llm_response", "streaming_llm_response",
    "processing_llm_response",
}  # fmt: skip


def ids(items: list[Json]) -> list[str]:
    return [item["id"] for item in items]


# Sending


def test_a_send_is_answered_at_once_and_the_turn_runs_on_its_own(api: Api, context_id: str) -> None:
    """202 with the answer's seven fields, while the model has not said a word."""
    before = api.context(context_id)
    response = api.post_message(context_id, SILENT, client_metadata={"k": [1]})
    answer = ok(response, 202)
    assert set(answer) == SEND_FIELDS
    assert answer["context_id"] == context_id
    assert UUID7.fullmatch(answer["message_id"])
    assert UUID7.fullmatch(answer["turn_id"])
    assert answer["state"] in TURN_STATES
    assert answer["queued"] is False
    assert answer["revision"] == before["revision"] + 1
    assert answer["stream_cursor"] != before["stream_cursor"]
    api.cancel(context_id)


def test_a_users_message_is_closed_from_the_start(api: Api, context_id: str) -> None:
    """One chunk, final_sequence 1, the text exactly, client_metadata as it was sent."""
    answer = api.send(context_id, "Grüße 🦊\n", client_metadata={"k": [1, None]})
    message = api.message(context_id, answer["message_id"])
    assert set(message) == MESSAGE_FIELDS
    assert message["id"] == answer["message_id"]
    assert message["context_id"] == context_id
    assert message["turn_id"] == answer["turn_id"]
    assert message["parent_id"] is None
    assert (message["role"], message["kind"]) == ("user", "text")
    assert message["status"] == "completed"
    assert message["current_sequence"] == message["final_sequence"] == 1
    assert message["media_type"] == "text/plain"
    assert message["client_metadata"] == {"k": [1, None]}
    assert message["error"] is None
    assert TIMESTAMP.fullmatch(message["created_at"])
    assert TIMESTAMP.fullmatch(message["completed_at"])
    assert message["stats"]["chunks"] == 1
    assert message["stats"]["characters"] == 8
    assert message["stats"]["bytes"] == len("Grüße 🦊\n".encode())
    pulled = api.pull(context_id, answer["message_id"])
    assert (pulled["content"], pulled["final"]) == ("Grüße 🦊\n", True)


def test_the_reply_follows_the_message(api: Api, context_id: str) -> None:
    """The reply hangs on the user's message, belongs to its turn and has stats once closed."""
    answer, _ = api.run(context_id, "Hello there")
    user, reply = api.messages(context_id)
    assert user["id"] == answer["message_id"]
    assert reply["parent_id"] == user["id"]
    assert reply["turn_id"] == answer["turn_id"]
    assert (reply["role"], reply["kind"], reply["status"]) == ("assistant", "text", "completed")
    assert reply["final_sequence"] == reply["current_sequence"] == 4
    assert reply["stats"]["chunks"] == 4
    assert reply["stats"]["characters"] == reply["stats"]["bytes"] == len("You said: Hello there")
    assert api.text(context_id, reply["id"]) == "You said: Hello there"


def test_an_open_message_has_neither_stats_nor_an_end(api: Api, context_id: str) -> None:
    """final_sequence, stats and completed_at are null until the message is closed."""
    api.send(context_id, ENDLESS)
    message = api.message(context_id, api.opened(context_id)["message_id"])
    assert message["status"] == "streaming"
    assert message["final_sequence"] is message["stats"] is message["completed_at"] is None
    assert message["current_sequence"] >= 1
    api.cancel(context_id)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "payload"),
        ({"payload": None}, "payload"),
        ({"payload": "text"}, "payload"),
        ({"payload": {"content": "x"}}, "payload.type"),
        ({"payload": {"type": "text"}}, "payload.content"),
        ({"payload": {"type": "text", "content": ""}}, "payload.content"),
        ({"payload": {"type": "text", "content": 5}}, "payload.content"),
        ({"payload": {"type": "text", "content": None}}, "payload.content"),
        ({"payload": {"type": "text", "content": "a\u0000"}}, "payload.content"),
        ({"payload": {"type": "text", "content": "\u0000"}}, "payload.content"),
        ({"payload": {"type": "text", "content": "x", "display": 1}}, "payload.display"),
        ({"payload": {"type": "text", "content": "x", "colour": 1}}, "payload.colour"),
        ({"payload": {"type": "image", "content": "x"}}, "payload.type"),
        ({"payload": {"type": 5, "content": "x"}}, "payload.type"),
        ({"text": "x"}, "text"),
        ({"role": "robot"}, "role"),
        ({"role": None}, "role"),
        ({"respond": "yes"}, "respond"),
        ({"respond": 1}, "respond"),
        ({"respond": "true"}, "respond"),
        ({"respond": None}, "respond"),
        ({"on_busy": "wait"}, "on_busy"),
        ({"client_metadata": []}, "client_metadata"),
        ({"message_id": "a b"}, "message_id"),
        ({"message_id": "x" * 65}, "message_id"),
        ({"message_id": 1}, "message_id"),
        ({"message_id": "a\n"}, "message_id"),
        ({"branch": "a b"}, "branch"),
        ({"parent_id": "a/b"}, "parent_id"),
    ],
)
def test_a_wrong_field_of_a_send_is_named(
    api: Api, context_id: str, body: Json, field: str
) -> None:
    """400 with the field's path, and nothing is stored."""
    if "payload" not in body and body:
        body = {"payload": {"type": "text", "content": "x"}, **body}
    before = api.context(context_id)
    invalid(api.http.post(f"/contexts/{context_id}/messages", json=body), field)
    assert api.context(context_id) == before


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "file_reference", "paths": []},
        {"type": "file_reference"},
        {"type": "file_reference", "paths": "a.md"},
        {"type": "file_reference", "paths": ["a.md"], "colour": 1},
        {"type": "workflow", "parameters": {}},
        {"type": "workflow", "workflow": 5, "parameters": {}},
        {"type": "workflow", "workflow": "x", "parameters": []},
    ],
)
def test_a_wrong_payload_of_another_type_is_refused(
    api: Api, context_id: str, payload: Json
) -> None:
    """400 for these as for text."""
    response = api.http.post(f"/contexts/{context_id}/messages", json={"payload": payload})
    problem(response, 400, "invalid_request")


def test_file_references_are_taken(api: Api, context_id: str) -> None:
    """`file_reference {paths, display_text?}` is a payload: a message of that kind (§3.1)."""
    payload = {
        "type": "file_reference",
        "paths": ["dir/a.md", "b.py:10-20"],
        "display_text": "two files",
    }
    response = api.http.post(
        f"/contexts/{context_id}/messages", json={"payload": payload, "respond": False}
    )
    answer = ok(response, 201)
    message = api.message(context_id, answer["message_id"])
    assert (message["role"], message["kind"]) == ("user", "file_reference")
    assert message["final_sequence"] == 1


def test_workflows_are_taken(api: Api, context_id: str) -> None:
    """`workflow {workflow, parameters, display_text?}` is a payload, or names what is unknown."""
    payload = {"type": "workflow", "workflow": "review", "parameters": {"depth": 2}}
    response = api.http.post(
        f"/contexts/{context_id}/messages", json={"payload": payload, "respond": False}
    )
    if response.status_code == 404:
        problem(response, 404, "workflow_not_found")
        return
    message = api.message(context_id, ok(response, 201)["message_id"])
    assert message["kind"] == "workflow"


def test_text_may_be_any_unicode(api: Api, context_id: str) -> None:
    """All but U+0000; a lone surrogate is no Unicode text, so it is refused and not a defect."""
    odd = "\u0001\u001f\u007f\u2028\u2029\ufeff\ufffe\uffff\U0010ffff \r\n\t e\u0301"
    answer = api.send(context_id, odd, respond=False)
    assert api.text(context_id, answer["message_id"]) == odd
    raw = b'{"payload":{"type":"text","content":"\\ud800"}}'
    headers = {"content-type": "application/json"}
    response = api.http.post(f"/contexts/{context_id}/messages", content=raw, headers=headers)
    problem(response, 400, "invalid_request")


def test_a_message_may_be_larger_than_a_chunk(api: Api, context_id: str) -> None:
    """The limit of a message is that of a request, not of a chunk: still one chunk, pulled whole."""
    content = "ä" * 300_000
    answer = api.send(context_id, content, respond=False)
    message = api.message(context_id, answer["message_id"])
    assert message["final_sequence"] == 1
    assert api.text(context_id, answer["message_id"]) == content


def test_a_request_over_the_limit_is_413(tight: Api) -> None:
    """With limit_bytes, and the server lives on; with and without a Content-Length."""
    context_id = tight.create()
    response = tight.post_message(context_id, "x" * 5000)
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 4000
    body = json.dumps({"payload": {"type": "text", "content": "x" * 5000}}).encode()
    response = tight.http.post(
        f"/contexts/{context_id}/messages",
        content=(body[start : start + 1000] for start in range(0, len(body), 1000)),
        headers={"content-type": "application/json"},
    )
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 4000
    response = tight.http.post("/contexts", json={"title": "x" * 5000})
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 4000
    response = tight.http.patch(f"/contexts/{context_id}", json={"system_prompt": "x" * 5000})
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 4000
    assert tight.context(context_id)["message_count"] == 0
    assert tight.reply(context_id, "x" * 3000)["status"] == "completed"


def test_another_media_type_of_a_send_is_415(api: Api, context_id: str) -> None:
    """And nothing is stored."""
    response = api.http.post(
        f"/contexts/{context_id}/messages",
        content=b'{"payload":{"type":"text","content":"x"}}',
        headers={"content-type": "text/plain"},
    )
    problem(response, 415, "unsupported_media_type")
    assert api.messages(context_id) == []


# Idempotent sends


def test_a_repeated_send_starts_nothing(api: Api, context_id: str) -> None:
    """The same message_id and turn_id; state, revision and queued as they are now."""
    first, _ = api.run(context_id, "hello", message_id="mine:1")
    assert first["message_id"] == "mine:1"
    before = api.context(context_id)
    again = api.send(context_id, "hello", message_id="mine:1")
    assert again["message_id"] == "mine:1"
    assert again["turn_id"] == first["turn_id"]
    assert again["state"] == "idle"
    assert again["queued"] is False
    assert again["revision"] == before["revision"]
    assert api.context(context_id) == before
    assert len(api.messages(context_id)) == 2


def test_other_content_under_the_same_id_is_refused(api: Api, context_id: str) -> None:
    """409 id_taken with the id; an assistant's message is never the same as a user's."""
    answer, _ = api.run(context_id, "hello", message_id="m")
    assert problem(api.post_message(context_id, "bye", message_id="m"), 409, "id_taken")["id"] == "m"
    (reply,) = api.replies(context_id, answer["turn_id"])
    refused = api.post_message(context_id, "You said: hello", message_id=reply["id"])
    problem(refused, 409, "id_taken")
    assert len(api.messages(context_id)) == 2


def test_the_same_message_id_in_two_contexts_is_two_messages(api: Api) -> None:
    """A message's id belongs to its context."""
    for content in ("one", "two"):
        context_id = api.create()
        answer, _ = api.run(context_id, content, message_id="shared")
        assert api.text(context_id, answer["message_id"]) == content


def test_a_repeat_says_that_it_is_queued_now(api: Api, context_id: str) -> None:
    """`queued` is as it is now: true while it waits, false once it runs or has run."""
    running = api.send(context_id, ENDLESS)
    queued = api.send(context_id, "next", message_id="q")
    assert queued["queued"] is True
    again = api.send(context_id, "next", message_id="q")
    assert (again["turn_id"], again["queued"]) == (queued["turn_id"], True)
    assert api.context(context_id)["queued_messages"] == 1
    api.cancel(context_id, turn_id=running["turn_id"])
    api.ended(context_id, queued["turn_id"])
    assert api.send(context_id, "next", message_id="q")["queued"] is False


def test_a_repeat_is_answered_also_where_a_send_would_be_refused(
    api: Api, context_id: str
) -> None:
    """It starts nothing, so a busy context is no reason to refuse it."""
    first = api.send(context_id, ENDLESS, message_id="m")
    again = api.send(context_id, ENDLESS, message_id="m", on_busy="reject")
    assert again["turn_id"] == first["turn_id"]
    interrupted = api.send(context_id, ENDLESS, message_id="m", on_busy="interrupt")
    assert interrupted["turn_id"] == first["turn_id"]
    assert api.turn(context_id, first["turn_id"])["status"] == "running"
    api.cancel(context_id)


def test_simultaneous_sends_of_one_message_are_one(api: Api, context_id: str) -> None:
    """A client that repeats without having heard an answer never starts two turns."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: api.post_message(context_id, "hi", message_id="one"), range(16))
        )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["turn_id"] for answer in answers}) == 1
    api.ended(context_id, answers[0].json()["turn_id"])
    assert len(api.messages(context_id)) == 2


# Without a turn


def test_respond_false_only_stores(api: Api, context_id: str) -> None:
    """201 with Location, turn_id null, no turn, and the message at the leaf."""
    first = api.run(context_id, "hello")[0]
    response = api.post_message(context_id, "noted", respond=False, message_id="note")
    answer = ok(response, 201)
    assert set(answer) == SEND_FIELDS
    assert answer["turn_id"] is None
    assert answer["queued"] is False
    assert answer["state"] == "idle"
    assert response.headers["location"].endswith(f"/contexts/{context_id}/messages/note")
    listed = api.messages(context_id)
    assert listed[-1]["id"] == "note"
    assert listed[-1]["parent_id"] == listed[-2]["id"]
    assert ids(api.walk(f"/contexts/{context_id}/turns")) == [first["turn_id"]]
    again = api.send(context_id, "noted", respond=False, message_id="note")
    assert (again["message_id"], again["turn_id"]) == ("note", None)
    assert ids(api.messages(context_id)) == ids(listed)


def test_respond_false_works_in_every_state(api: Api, context_id: str) -> None:
    """Also while a turn runs, with any on_busy, and in `failed`; the state does not change."""
    api.send(context_id, ENDLESS)
    api.opened(context_id)
    for on_busy in ("reject", "enqueue", "interrupt"):
        answer = api.send(context_id, "note", respond=False, on_busy=on_busy)
        assert answer["state"] == "streaming_llm_response"
        assert answer["queued"] is False
    api.cancel(context_id)
    api.run(context_id, script({"error": "fatal"}))
    assert api.send(context_id, "note", respond=False)["state"] == "failed"


def test_roles_may_be_said(api: Api, context_id: str) -> None:
    """system and assistant as well; all are closed from the start."""
    for role in ("system", "assistant", "user"):
        answer = api.send(context_id, f"as {role}", role=role, respond=False)
        message = api.message(context_id, answer["message_id"])
        assert (message["role"], message["status"]) == (role, "completed")


# Busy


def test_a_send_to_a_busy_context_waits_and_runs_in_order(api: Api, context_id: str) -> None:
    """enqueue: 202 with queued true; stored and listed at once; parent_id when its turn starts."""
    first = api.send(context_id, ENDLESS)
    reply_id = api.opened(context_id)["message_id"]
    queued = [api.send(context_id, f"number {n}") for n in range(3)]
    for answer in queued:
        assert answer["queued"] is True
        assert api.turn(context_id, answer["turn_id"])["status"] == "queued"
        message = api.message(context_id, answer["message_id"])
        assert message["parent_id"] is None
        assert message["status"] == "completed"
    waiting = [answer["message_id"] for answer in queued]
    assert ids(api.messages(context_id)) == [first["message_id"], reply_id, *waiting]
    assert ids(api.messages(context_id, limit=2)) == [first["message_id"], reply_id, *waiting]
    api.cancel(context_id)
    for answer in queued:
        assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    listed = api.messages(context_id)
    assert len(listed) == 8
    for before, after in zip(listed, listed[1:], strict=False):
        assert after["parent_id"] == before["id"]
    users = [message["id"] for message in listed if message["role"] == "user"]
    assert users == [first["message_id"], *waiting]
    started = [api.turn(context_id, answer["turn_id"])["started_at"] for answer in queued]
    assert started == sorted(started)


def test_reject_is_409_with_the_state(api: Api, context_id: str) -> None:
    """By the send's own on_busy and by the context's; nothing is stored."""
    api.send(context_id, ENDLESS)
    api.opened(context_id)
    before = api.context(context_id)
    refusal = problem(api.post_message(context_id, "x", on_busy="reject"), 409, "context_busy")
    assert refusal["state"] == "streaming_llm_response"
    assert api.context(context_id) == before
    ok(api.http.patch(f"/contexts/{context_id}", json={"on_busy": "reject"}))
    problem(api.post_message(context_id, "x"), 409, "context_busy")
    assert api.send(context_id, "x", on_busy="enqueue")["queued"] is True
    api.http.delete(f"/contexts/{context_id}")


def test_interrupt_cancels_and_runs_ahead_of_the_queue(api: Api, context_id: str) -> None:
    """What the running turn wrote stays; the new turn runs first, then what was queued before."""
    first = api.send(context_id, ENDLESS)
    opened = until(lambda: [m for m in api.context(context_id)["open_messages"]
                            if m["current_sequence"] == 3])[0]  # fmt: skip
    queued = api.send(context_id, "queued")
    urgent = api.send(context_id, "urgent", on_busy="interrupt")
    assert urgent["queued"] is False
    assert api.turn(context_id, first["turn_id"])["status"] == "cancelled"
    cut = api.message(context_id, opened["message_id"])
    assert (cut["status"], cut["final_sequence"]) == ("cancelled", 3)
    assert api.text(context_id, cut["id"]) == "on and on "
    api.ended(context_id, urgent["turn_id"])
    api.ended(context_id, queued["turn_id"])
    listed = api.messages(context_id)
    assert [message["role"] for message in listed] == ["user", "assistant"] * 3
    assert ids(listed)[::2] == [
        first["message_id"], urgent["message_id"], queued["message_id"],
    ]  # fmt: skip
    triggers = [(entry["trigger"], entry["turn_id"]) for entry in api.journal(context_id)]
    place = triggers.index(("cancel", first["turn_id"]))
    assert triggers[place + 1] == ("receive_message", urgent["turn_id"])


def test_interrupt_of_an_idle_context_is_a_plain_send(api: Api, context_id: str) -> None:
    """There is nothing to cancel."""
    _, turn = api.run(context_id, "x", on_busy="interrupt")
    assert turn["status"] == "completed"


def test_a_full_queue_is_429(tight: Api) -> None:
    """queue_full with Retry-After; what is queued stays, and a note still gets in."""
    context_id = tight.create()
    tight.send(context_id, SILENT)
    queued = [tight.send(context_id, SILENT), tight.send(context_id, SILENT)]
    response = tight.post_message(context_id, "too much")
    problem(response, 429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    context = tight.context(context_id)
    assert context["queued_messages"] == 2
    assert context["message_count"] == 3
    tight.send(context_id, "a note", respond=False)
    path = f"/contexts/{context_id}/turns/{queued[0]['turn_id']}/cancel"
    ok(tight.http.post(path))
    assert tight.send(context_id, "now there is room")["queued"] is True
    tight.http.delete(f"/contexts/{context_id}")


def test_the_queue_goes_on_after_a_failed_turn(api: Api, context_id: str) -> None:
    """A turn's end and the next one's start are one transaction: nobody sees `failed` between."""
    running = api.send(context_id, ENDLESS)
    failing = api.send(context_id, script({"error": "fatal"}))
    last = api.send(context_id, "last")
    api.cancel(context_id, turn_id=running["turn_id"])
    assert api.ended(context_id, failing["turn_id"])["status"] == "failed"
    assert api.ended(context_id, last["turn_id"])["status"] == "completed"
    journal = api.journal(context_id)
    for end in ("cancel", "fail"):
        place = [entry["trigger"] for entry in journal].index(end)
        assert journal[place + 1]["trigger"] == "receive_message"
        assert journal[place + 1]["revision"] == journal[place]["revision"] + 1
        assert journal[place + 1]["at"] == journal[place]["at"]


# Forks


def test_a_send_from_an_earlier_message_makes_a_branch(api: Api, context_id: str) -> None:
    """It becomes active, shares what stands above, and the old branch is as it was."""
    api.run(context_id, "one")
    api.run(context_id, "two")
    old = api.messages(context_id)
    answer, turn = api.run(context_id, "instead", parent_id=old[1]["id"])
    context = api.context(context_id)
    assert context["active_branch"] != "main"
    assert turn["branch"] == context["active_branch"]
    new = api.messages(context_id)
    assert ids(new)[:2] == ids(old)[:2]
    assert new[2]["id"] == answer["message_id"]
    assert new[2]["parent_id"] == old[1]["id"]
    assert len(new) == 4
    assert api.messages(context_id, branch="main") == old
    assert api.messages(context_id, branch=context["active_branch"]) == new
    assert api.text(context_id, new[3]["id"]) == "You said: instead"
    switched = ok(api.http.patch(f"/contexts/{context_id}", json={"active_branch": "main"}))
    assert switched["active_branch"] == "main"
    assert api.messages(context_id) == old
    api.run(context_id, "three", branch=context["active_branch"])
    assert api.messages(context_id) == old
    assert len(api.messages(context_id, branch=context["active_branch"])) == 6


def test_a_repeated_fork_makes_no_second_branch(api: Api, context_id: str) -> None:
    """A repeat starts nothing, so it branches nothing."""
    first, _ = api.run(context_id, "one")
    api.run(context_id, "fork", parent_id=first["message_id"], message_id="f")
    before = api.context(context_id)
    api.send(context_id, "fork", parent_id=first["message_id"], message_id="f")
    assert api.context(context_id) == before


def test_a_fork_of_a_fork_of_the_first_message(api: Api, context_id: str) -> None:
    """Branches nest: each list is its own line through the tree, by parent_id."""
    root, _ = api.run(context_id, "root")
    lines = {}
    parent = root["message_id"]
    for n in range(4):
        answer, _ = api.run(context_id, f"fork {n}", parent_id=parent)
        lines[api.context(context_id)["active_branch"]] = answer["message_id"]
        parent = api.messages(context_id)[-1]["id"]
    assert len(lines) == 4
    for branch, message_id in lines.items():
        listed = api.messages(context_id, branch=branch, limit=1)
        for before, after in zip(listed, listed[1:], strict=False):
            assert after["parent_id"] == before["id"]
        assert message_id in ids(listed)
        assert listed[0]["id"] == root["message_id"]


def test_unknown_places_are_404(api: Api, context_id: str) -> None:
    """branch_not_found and message_not_found with what was asked for; nothing is stored."""
    refusal = problem(api.post_message(context_id, "x", branch="no"), 404, "branch_not_found")
    assert refusal["branch"] == "no"
    refusal = problem(api.post_message(context_id, "x", parent_id="no"), 404, "message_not_found")
    assert refusal["message_id"] == "no"
    response = api.http.get(f"/contexts/{context_id}/messages/no")
    assert problem(response, 404, "message_not_found")["message_id"] == "no"
    response = api.http.get(f"/contexts/{context_id}/messages?branch=no")
    assert problem(response, 404, "branch_not_found")["branch"] == "no"
    other = api.create()
    elsewhere = api.send(other, "x", respond=False)["message_id"]
    refused = api.post_message(context_id, "x", parent_id=elsewhere)
    problem(refused, 404, "message_not_found")
    problem(
        api.http.get(f"/contexts/{context_id}/messages/{elsewhere}"), 404, "message_not_found"
    )
    assert api.context(context_id)["message_count"] == 0


# Lists


def test_a_list_is_in_conversation_order_and_of_one_snapshot(api: Api, context_id: str) -> None:
    """items, next_cursor, revision and stream_cursor, the last two as the Context has them."""
    for n in range(3):
        api.run(context_id, f"message {n}")
    page = api.page(context_id)
    assert set(page) == {"items", "next_cursor", "revision", "stream_cursor"}
    context = api.context(context_id)
    assert page["next_cursor"] is None
    assert page["revision"] == context["revision"]
    assert page["stream_cursor"] == context["stream_cursor"]
    assert [set(item) for item in page["items"]] == [MESSAGE_FIELDS] * 6
    assert [item["role"] for item in page["items"]] == ["user", "assistant"] * 3
    assert page["items"] == [api.message(context_id, id_) for id_ in ids(page["items"])]
    for limit in (1, 2, 5, 6, 7):
        assert api.messages(context_id, limit=limit) == page["items"]


def test_content_can_be_included(api: Api, context_id: str) -> None:
    """content and content_sequence beside each item: exactly chunks 1 to content_sequence."""
    api.run(context_id, "Grüße dich")
    page = api.page(context_id, include="content")
    for item in page["items"]:
        assert set(item) == MESSAGE_FIELDS | {"content", "content_sequence"}
        assert item["content"] == api.text(context_id, item["id"])
        assert item["content_sequence"] == item["final_sequence"]


def test_included_content_of_an_open_message_is_whole_chunks(api: Api, context_id: str) -> None:
    """What is there is there exactly, and pulling goes on from content_sequence."""
    api.send(context_id, script({"chunks": ["a", "bc", "def"]}, {"delay_ms": 600_000}))
    until(lambda: api.opened(context_id)["current_sequence"] == 3)
    item = api.page(context_id, include="content")["items"][-1]
    assert (item["content"], item["content_sequence"]) == ("abcdef", 3)
    assert item["status"] == "streaming"
    api.cancel(context_id)


def test_included_content_is_bounded_a_page(tight: Api) -> None:
    """At most the limit of a pull a page; the rest is pulled, from where the content ends."""
    context_id = tight.create()
    for n in range(4):
        tight.run(context_id, script({"repeat": 9, "text": f"{n}ä-------"}))
    page = tight.page(context_id, include="content")
    assert sum(len(item["content"].encode()) for item in page["items"]) <= 100
    assert any(item["content_sequence"] < item["current_sequence"] for item in page["items"])
    for item in page["items"]:
        texts = tight.texts(context_id, item["id"])
        held = item["content_sequence"]
        assert item["content"] == "".join(texts[:held])
        rest = tight.pull(context_id, item["id"], from_sequence=held)
        assert "".join(texts[held:]).startswith(rest["content"])


def test_since_revision_gives_what_changed_on_all_branches(api: Api, context_id: str) -> None:
    """Only what changed after it, so a client that holds a revision reads little."""
    api.run(context_id, "one")
    held = api.page(context_id)
    assert api.messages(context_id, since_revision=held["revision"]) == []
    api.run(context_id, "fork", parent_id=held["items"][0]["id"])
    ok(api.http.patch(f"/contexts/{context_id}", json={"active_branch": "main"}))
    api.run(context_id, "two")
    changed = api.messages(context_id, since_revision=held["revision"])
    texts = {api.text(context_id, item["id"]) for item in changed}
    assert texts == {"fork", "You said: fork", "two", "You said: two"}
    assert len(changed) == 4
    for limit in (1, 3, 4):
        paged = api.messages(context_id, since_revision=held["revision"], limit=limit)
        assert sorted(ids(paged)) == sorted(ids(changed))
    everything = api.messages(context_id, since_revision=0)
    assert len(everything) == 6
    with_content = api.messages(context_id, since_revision=0, include="content")
    assert {item["content"] for item in with_content} == texts | {"one", "You said: one"}


def test_since_revision_sees_a_message_close(api: Api, context_id: str) -> None:
    """A message that was open at the revision held is listed again when it is closed."""
    api.send(context_id, ENDLESS)
    message_id = api.opened(context_id)["message_id"]
    held = api.page(context_id)
    assert held["items"][-1]["status"] == "streaming"
    api.cancel(context_id)
    changed = api.messages(context_id, since_revision=held["revision"])
    assert [(item["id"], item["status"]) for item in changed] == [(message_id, "cancelled")]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=1.0", "limit"),
        ("cursor=garbage", "cursor"),
        ("cursor=%00", "cursor"),
        ("include=everything", "include"),
        ("include=", "include"),
        ("since_revision=-1", "since_revision"),
        ("since_revision=1.5", "since_revision"),
        ("since_revision=x", "since_revision"),
        ("since_revision=99999999999999999999", "since_revision"),
        ("branch=a%20b", "branch"),
        ("colour=red", "colour"),
        ("content=1", "content"),
    ],
)
def test_a_wrong_parameter_of_a_message_list_is_named(
    api: Api, context_id: str, query: str, field: str
) -> None:
    """400 with the parameter's name."""
    invalid(api.http.get(f"/contexts/{context_id}/messages?{query}"), field)


def test_every_unknown_parameter_is_named(api: Api, context_id: str) -> None:
    """All of them, and on routes that have no parameters too."""
    body = invalid(api.http.get(f"/contexts/{context_id}/messages?a=1&b=2"), "a")
    assert {error["field"] for error in body["errors"]} == {"a", "b"}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_text_is_kept_and_answered_exactly(api: Api, text: str) -> None:
    """What was sent is what is pulled, and the scripted answer joins to `You said: <text>`."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    context_id = api.create()
    respond = not (isinstance(document, dict) and "script" in document)
    answer = api.send(context_id, text, respond=respond)
    assert api.text(context_id, answer["message_id"]) == text
    if respond:
        api.ended(context_id, answer["turn_id"])
        (reply,) = api.replies(context_id, answer["turn_id"])
        assert api.text(context_id, reply["id"]) == f"You said: {text}"


def test_the_server_refuses_what_it_does_not_know_everywhere(api: Api, context_id: str) -> None:
    """No route ignores a query parameter: each names it (§1)."""
    answer = api.send(context_id, "x", respond=False)
    message = f"/contexts/{context_id}/messages/{answer['message_id']}"
    turn = api.run(context_id, "y")[0]["turn_id"]
    routes = [
        ("GET", "/contexts"),
        ("POST", "/contexts"),
        ("GET", f"/contexts/{context_id}"),
        ("PATCH", f"/contexts/{context_id}"),
        ("GET", f"/contexts/{context_id}/messages"),
        ("POST", f"/contexts/{context_id}/messages"),
        ("GET", message),
        ("GET", f"{message}/content"),
        ("GET", f"{message}/chunks"),
        ("GET", f"/contexts/{context_id}/stream"),
        ("GET", f"/contexts/{context_id}/turns"),
        ("GET", f"/contexts/{context_id}/turns/{turn}"),
        ("POST", f"/contexts/{context_id}/turns/{turn}/cancel"),
        ("POST", f"/contexts/{context_id}/cancel"),
        ("POST", f"/contexts/{context_id}/retry"),
        ("GET", f"/contexts/{context_id}/transitions"),
        ("GET", "/machine"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
        ("GET", "/schema/openapi.json"),
        ("DELETE", f"/contexts/{context_id}"),
    ]
    bodies: dict[str, Any] = {"/contexts": {}, f"/contexts/{context_id}/messages": {
        "payload": {"type": "text", "content": "x"}}}  # fmt: skip
    wrong = []
    for method, path in routes:
        names = ("colour", "state", "data", "request", "context_id", "settings", "contexts")
        for name in names:
            if (path, name) == ("/contexts", "state"):
                continue
            body = None if method in ("GET", "DELETE") else bodies.get(path, {})
            with api.http.stream(method, f"{path}?{name}=x", json=body) as response:
                if response.status_code != 400 or name not in response.read().decode():
                    wrong.append((method, path, name, response.status_code))
    assert wrong == []


def test_a_text_that_looks_like_json_is_only_a_text(api: Api, context_id: str) -> None:
    """An object without `script`, a list, a number: plain text to the scripted provider (§13)."""
    for text in ('{"a": 1}', "[1]", "5", "null", '{"script'):
        message = api.reply(context_id, text)
        assert api.text(context_id, message["id"]) == f"You said: {text}"


def test_a_lost_answer_costs_nothing(api: Api, context_id: str) -> None:
    """A client that hangs up after sending has sent; its turn runs without it."""
    body = json.dumps({"payload": {"type": "text", "content": "hi"}, "message_id": "gone"}).encode()
    with httpx.Client(base_url=api.url) as client, client.stream(
        "POST",
        f"/contexts/{context_id}/messages",
        content=body,
        headers={"content-type": "application/json"},
    ) as response:
        assert response.status_code == 202
    turn = api.message(context_id, "gone")["turn_id"]
    assert api.ended(context_id, turn)["status"] == "completed"
