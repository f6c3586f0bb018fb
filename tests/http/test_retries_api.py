"""§6 at the wire: turns that are tried again, after what their tools did or from the start."""

import json
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tooling import ASK, Chat, Place, ToolApi, call
from wire import ENDLESS, Json, invalid, ok, problem, script, until


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


@pytest.fixture
def context_id(api: ToolApi, chat: Chat) -> str:
    """A context that asks the model."""
    return api.create(provider="openai", tools=["note", "hold", "echo", ASK])


def note(place: Place, line: str) -> list[tuple[str, str]]:
    """A reply of the model: one call that notes a line."""
    return [("note", json.dumps({"path": place.runs, "line": line}))]


def post_retry(api: ToolApi, context_id: str, turn_id: str | None = None, **body: Any) -> Any:
    of_turn = f"/turns/{turn_id}" if turn_id else ""
    return api.http.post(f"/contexts/{context_id}{of_turn}/retry", json=body or None)


def retried(api: ToolApi, context_id: str, turn_id: str | None = None, **body: Any) -> Json:
    """The turn that tries it again, when it has ended."""
    response = post_retry(api, context_id, turn_id, **body)
    answer = ok(response, 202)
    assert set(answer) == {"turn_id", "state", "revision"}
    assert response.headers["location"].endswith(f"/turns/{answer['turn_id']}")
    return api.ended(context_id, answer["turn_id"])


def shown(request: Json) -> list[str]:
    """What the model was shown: texts and results, and of calls the lines that they note."""
    lines = []
    for message in request["messages"]:
        calls = [json.loads(one["function"]["arguments"]) for one in message.get("tool_calls", [])]
        lines += [message["content"]] if message["content"] else []
        lines += [f"call {arguments.get('line')}" for arguments in calls]
    return lines


def failed(api: ToolApi, chat: Chat, context_id: str, *replies: Any, text: str = "go") -> Json:
    """A turn that the model refuses to go on with after these replies."""
    chat.replies = [*replies, 400]
    _, turn = api.run(context_id, text)
    assert turn["status"] == "failed"
    return turn


# What a retry goes on after


@pytest.mark.parametrize("by_turn", [False, True])
def test_a_retry_goes_on_after_the_last_round(
    api: ToolApi, chat: Chat, context_id: str, place: Place, by_turn: bool
) -> None:
    """Each tool has run once; the model sees the results, also in later turns."""
    turn = failed(api, chat, context_id, note(place, "1"), note(place, "2"))
    chat.replies = ["done", "more"]
    again = retried(api, context_id, turn["id"] if by_turn else None)
    assert (again["status"], again["retry_of"]) == ("completed", turn["id"])
    assert place.lines() == ["1", "2"]
    rounds = ["go", "call 1", "noted", "call 2", "noted"]
    assert shown(chat.requests[-1]) == rounds
    api.run(context_id, "on")
    assert shown(chat.requests[-1]) == [*rounds, "done", "on"]
    assert "retry" in api.steps(context_id)


def test_from_start_begins_anew(api: ToolApi, chat: Chat, context_id: str, place: Place) -> None:
    """What was tried before is not shown, then or later, and so the tools run again."""
    turn = failed(api, chat, context_id, note(place, "1"), note(place, "2"))
    chat.replies = [note(place, "3"), "done", "more"]
    again = retried(api, context_id, turn["id"], from_start=True)
    assert again["status"] == "completed"
    assert place.lines() == ["1", "2", "3"]
    assert [shown(request) for request in chat.requests[3:]] == [
        ["go"], ["go", "call 3", "noted"],
    ]  # fmt: skip
    api.run(context_id, "on")
    assert shown(chat.requests[-1]) == ["go", "call 3", "noted", "done", "on"]


@pytest.mark.parametrize("from_start", [False, True])
def test_a_second_retry(
    api: ToolApi, chat: Chat, context_id: str, place: Place, from_start: bool
) -> None:
    """Of the retry or of the first turn: it goes on after both, or after neither."""
    first = failed(api, chat, context_id, note(place, "1"))
    chat.replies = [note(place, "2"), 400]
    second = retried(api, context_id)
    assert second["status"] == "failed"
    chat.replies = ["done"]
    third = retried(api, context_id, first["id"], from_start=from_start)
    assert (third["status"], third["retry_of"]) == ("completed", first["id"])
    rounds = [] if from_start else ["call 1", "noted", "call 2", "noted"]
    assert shown(chat.requests[-1]) == ["go", *rounds]
    assert place.lines() == ["1", "2"]


def test_one_that_goes_on_after_one_from_the_start(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """What `from_start` left behind stays behind."""
    failed(api, chat, context_id, note(place, "1"))
    chat.replies = [note(place, "2"), 400]
    retried(api, context_id, from_start=True)
    chat.replies = ["done"]
    retried(api, context_id)
    assert shown(chat.requests[-1]) == ["go", "call 2", "noted"]


def test_a_cancelled_turn_with_half_a_round(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """Results are kept; of a call that was stopped the model is told so, of one that waited too."""
    arguments = place.holding()["tool_call"]["arguments"]
    chat.replies = [
        [*note(place, "1"), ("hold", json.dumps(arguments)), ("ask", '{"question":"why"}')],
    ]
    turn_id = api.send(context_id, "go")["turn_id"]
    place.began()
    api.in_state(context_id, "executing_tools")
    until(lambda: api.call_named(context_id, "note")["status"] == "succeeded", "the note")
    api.cancel(context_id)
    chat.replies = ["done"]
    again = retried(api, context_id, turn_id)
    assert again["status"] == "completed"
    results = [m["content"] for m in chat.requests[-1]["messages"] if m["role"] == "tool"]
    assert results[0] == "noted"
    assert "stopped while it ran" in results[1]
    assert "cancelled" in results[2]
    assert sorted(place.lines())[:2] == ["1", "began"]
    # The context was at rest: this is a turn as any other.
    triggers = [e["trigger"] for e in api.journal(context_id) if e["turn_id"] == again["id"]]
    assert triggers[0] == "receive_message"


def test_a_round_of_which_nothing_ran_is_left_behind(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """A call that was cancelled before anybody decided on it: the model may ask for it anew."""
    patch = {"approval_policy": {"mode": "manual", "allow": ["echo"]}}
    ok(api.http.patch(f"/contexts/{context_id}", json=patch))
    chat.replies = [[("echo", '{"text":"first"}')], note(place, "1")]
    turn_id = api.send(context_id, "go")["turn_id"]
    api.in_state(context_id, "awaiting_tool_approval")
    api.cancel(context_id)
    chat.replies = ["done"]
    retried(api, context_id, turn_id)
    assert shown(chat.requests[-1]) == ["go", "call None", "first"]
    assert place.lines() == []


# The queue


def test_a_retry_waits_for_the_turn_of_another_branch(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """It failed with others behind it; queued, and tried where it failed when it is its turn."""
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    turn = failed(api, chat, context_id, note(place, "1"))
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    running = api.send(context_id, ENDLESS, branch="other")
    behind = api.send(context_id, "behind", branch="other")
    answer = ok(post_retry(api, context_id, turn["id"]), 202)
    before = api.context(context_id)
    assert before["queued_messages"] == 2
    assert api.turn(context_id, answer["turn_id"])["status"] == "queued"
    refusal = problem(post_retry(api, context_id, turn["id"]), 409, "illegal_transition")
    assert answer["turn_id"] in refusal["detail"]
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    chat.replies = ["of behind", "done"]
    api.cancel(context_id)
    assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    assert shown(chat.requests[-1]) == ["go", "call 1", "noted"]
    started = [api.turn(context_id, one)["started_at"] for one in (
        running["turn_id"], behind["turn_id"], answer["turn_id"])]  # fmt: skip
    assert started == sorted(started)
    listed = [m["content"] for m in api.messages(context_id, branch="main", include="content")]
    assert listed[0] == "go"
    assert listed[-1] == "done"
    assert "behind" not in listed


def test_a_queued_retry_that_is_cancelled(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """As if it had not been asked for: the message keeps its place, and what failed is shown again."""
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    text = script({"text": "half "}, {"error": "fatal"})
    _, turn = api.run(context_id, text)
    listed = api.messages(context_id)
    api.send(context_id, ENDLESS, branch="other")
    queued = ok(post_retry(api, context_id, turn["id"], from_start=True), 202)
    ok(api.http.post(f"/contexts/{context_id}/turns/{queued['turn_id']}/cancel"))
    assert api.turn(context_id, queued["turn_id"])["status"] == "cancelled"
    assert api.messages(context_id) == listed
    api.cancel(context_id)
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    chat.replies = ["fine"]
    fork = {"name": "look", "from_message_id": listed[-1]["id"]}
    ok(api.http.post(f"/contexts/{context_id}/branches", json=fork), 201)
    api.run(context_id, "on", branch="look")
    assert shown(chat.requests[-1]) == [text, "half ", "on"]
    chat.replies = ["done"]
    again = retried(api, context_id, queued["turn_id"])
    assert (again["status"], again["retry_of"]) == ("completed", queued["turn_id"])
    assert shown(chat.requests[-1]) == [text]


def test_a_queued_retry_that_is_overtaken(api: ToolApi, chat: Chat, context_id: str) -> None:
    """A message that interrupts goes ahead on the branch: there is nothing to try again any more."""
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    turn = failed(api, chat, context_id)
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    api.send(context_id, ENDLESS, branch="other")
    queued = ok(post_retry(api, context_id, turn["id"]), 202)
    last = api.send(context_id, "behind", branch="other")
    urgent = api.send(context_id, "urgent", branch="main", on_busy="interrupt")
    assert api.ended(context_id, urgent["turn_id"])["status"] == "completed"
    overtaken = api.ended(context_id, queued["turn_id"])
    assert (overtaken["status"], overtaken["error"]["type"]) == ("cancelled", "overtaken")
    assert overtaken["started_at"] is None
    assert api.ended(context_id, last["turn_id"])["status"] == "completed"
    assert api.context(context_id)["state"] == "idle"


def test_a_full_queue_takes_no_retry(tight: Any) -> None:
    """429 queue_full, as for a message."""
    context_id = tight.create()
    ok(tight.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    _, turn = tight.run(context_id, script({"error": "fatal"}))
    for _ in range(3):
        tight.send(context_id, ENDLESS, branch="other")
    problem(post_retry(tight, context_id, turn["id"]), 429, "queue_full")
    tight.http.delete(f"/contexts/{context_id}")


def test_a_queued_retry_survives_a_crash(tmp_path: Path) -> None:
    """SIGKILL while it waits: the next server tries it when it is its turn, from the start as asked."""
    database = tmp_path / "contextd.db"
    server = Server(database, settings={"scripted_rate": 0}).start()
    api = ToolApi(server.url)
    context_id = api.create()
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    _, turn = api.run(context_id, script(call("nope"), {"text": "half"}, {"error": "fatal"}))
    running = api.send(context_id, ENDLESS, branch="other")
    api.opened(context_id)
    queued = ok(post_retry(api, context_id, turn["id"], from_start=True), 202)
    server.kill()
    api.close()
    with Server(database, settings={"scripted_rate": 0}) as server:
        api = ToolApi(server.url)
        assert api.turn(context_id, queued["turn_id"])["status"] == "queued"
        api.cancel(context_id, turn_id=running["turn_id"])
        again = api.ended(context_id, queued["turn_id"])
        assert (again["status"], again["retry_of"]) == ("failed", turn["id"])
        # From the start: the model asked for the tool once more.
        assert [one["turn_id"] for one in api.calls(context_id)] == [turn["id"], again["id"]]
        api.close()


# What is refused


def refused(api: ToolApi, context_id: str, turn_id: str) -> str:
    """The words of a 409 that changed nothing."""
    before = api.context(context_id)
    refusal = problem(post_retry(api, context_id, turn_id), 409, "illegal_transition")
    assert (refusal["state"], refusal["trigger"]) == (before["state"], "retry")
    assert api.context(context_id) == before
    return str(refusal["detail"])


def test_what_is_not_tried_again(api: ToolApi, chat: Chat, context_id: str) -> None:
    """A turn that waits, runs or was answered, whose message was, or is not the branch's last."""
    first = failed(api, chat, context_id)
    chat.replies = ["done"]
    second = retried(api, context_id)
    assert "completed" in refused(api, context_id, second["id"])
    assert second["id"] in refused(api, context_id, first["id"])
    third = failed(api, chat, context_id, text="next")
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    running = api.send(context_id, ENDLESS)
    api.opened(context_id)
    queued = api.send(context_id, "queued")
    for turn_id in (third["id"], first["id"]):
        assert refused(api, context_id, turn_id)
    assert "running" in refused(api, context_id, running["turn_id"])
    assert "queued" in refused(api, context_id, queued["turn_id"])
    ok(api.http.post(f"/contexts/{context_id}/turns/{queued['turn_id']}/cancel"))
    assert "send it again" in refused(api, context_id, queued["turn_id"])
    api.cancel(context_id)
    assert "not the last" in refused(api, context_id, third["id"])
    assert api.context(context_id)["state"] == "idle"


def test_a_queued_message_of_the_branch_comes_after_too(api: ToolApi, context_id: str) -> None:
    """A cancelled turn with another behind it on its branch: that message is the user's last."""
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    _, turn = api.run(context_id, script({"error": "fatal"}))
    api.send(context_id, ENDLESS, branch="other")
    api.opened(context_id)
    queued = api.send(context_id, "queued", branch="main")
    assert "not the last" in refused(api, context_id, turn["id"])
    ok(api.http.post(f"/contexts/{context_id}/turns/{queued['turn_id']}/cancel"))
    ok(post_retry(api, context_id, turn["id"]), 202)
    api.http.delete(f"/contexts/{context_id}")


def test_a_failed_turn_with_others_behind_it(api: ToolApi, chat: Chat, context_id: str) -> None:
    """On another branch: its failure is long over when it is tried again."""
    ok(api.http.post(f"/contexts/{context_id}/branches", json={"name": "other"}), 201)
    turn = failed(api, chat, context_id)
    chat.replies = ["fine", "done"]
    api.run(context_id, "meanwhile", branch="other")
    problem(post_retry(api, context_id), 409, "illegal_transition")
    assert retried(api, context_id, turn["id"])["status"] == "completed"
    assert shown(chat.requests[-1]) == ["go"]


def test_unknown_turns_and_bodies(api: ToolApi, context_id: str) -> None:
    """404 for a turn that is not there; a body with another field or type is named."""
    assert problem(post_retry(api, context_id, "nothing"), 404, "turn_not_found")
    for turn_id in (None, "nothing"):
        invalid(post_retry(api, context_id, turn_id, again=True), "again")
        invalid(post_retry(api, context_id, turn_id, from_start="yes"), "from_start")


def test_what_was_sent_is_never_left_behind(api: ToolApi, chat: Chat, context_id: str) -> None:
    """Whatever its role: the retry is about it."""
    chat.replies = [400, "done"]
    turn_id = api.send(context_id, "as I said", role="assistant")["turn_id"]
    assert api.ended(context_id, turn_id)["status"] == "failed"
    assert retried(api, context_id)["status"] == "completed"
    assert shown(chat.requests[-1])[-1] == "as I said"


def test_a_branch_that_forked_off_before_a_retry_goes_on_as_it_was(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """What the retry left behind on its own branch is still the beginning of the other one."""
    turn = failed(api, chat, context_id, note(place, "1"))
    result = next(one for one in api.messages(context_id) if one["kind"] == "tool_result")
    path = f"/contexts/{context_id}/branches"
    ok(api.http.post(path, json={"name": "other", "from_message_id": result["id"]}), 201)
    chat.replies = ["there"]
    api.run(context_id, "other", branch="other")
    chat.replies = ["anew", "more"]
    assert retried(api, context_id, turn["id"], from_start=True)["status"] == "completed"
    api.run(context_id, "on", branch="other")
    assert shown(chat.requests[-1]) == ["go", "call 1", "noted", "other", "there", "on"]


def test_a_turn_of_any_role_overtakes(api: ToolApi, chat: Chat, context_id: str) -> None:
    """A message that has had its turn is one that the conversation went on with."""
    turn = failed(api, chat, context_id)
    chat.replies = ["as told"]
    told = api.send(context_id, "be brief", role="system")["turn_id"]
    assert api.ended(context_id, told)["status"] == "completed"
    problem(post_retry(api, context_id, turn["id"]), 409, "illegal_transition")
