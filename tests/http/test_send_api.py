"""§3.1 at the wire: sending, repeating a send, and storing without a turn."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from bodies import MESSAGE_FIELDS, SEND_FIELDS
from protocol_table import TURN_STATES
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
)


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
    assert (
        problem(api.post_message(context_id, "bye", message_id="m"), 409, "id_taken")["id"] == "m"
    )
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


def test_a_repeat_is_answered_also_where_a_send_would_be_refused(api: Api, context_id: str) -> None:
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
