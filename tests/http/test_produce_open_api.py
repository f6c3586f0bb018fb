"""§7 at the wire: opening a message from outside, taking it over, and what the context says of it."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from bodies import MESSAGE_FIELDS
from producing import WORKER, Pen, numbered
from signal_rules import check_live, types
from wire import ENDLESS, TIMESTAMP, Api, ok, problem, script

PRODUCED_FIELDS = MESSAGE_FIELDS | {"epoch"}


@pytest.fixture
def pen(api: Api, context_id: str) -> Pen:
    """A message that nobody has opened yet."""
    return Pen(api, context_id)


# Opening


def test_an_opened_message_is_open_and_empty(pen: Pen) -> None:
    """201 with Location: a Message with `epoch`, nothing in it, of no turn."""
    response = pen.put()
    message = ok(response, 201)
    assert response.headers["location"].endswith(pen.path)
    assert set(message) == PRODUCED_FIELDS
    assert message["id"] == "out"
    assert message["context_id"] == pen.context_id
    assert (message["role"], message["kind"]) == ("assistant", "text")
    assert message["media_type"] == "text/plain"
    assert message["status"] == "streaming"
    assert message["epoch"] == 1
    assert message["current_sequence"] == 0
    for name in (
        "turn_id", "parent_id", "final_sequence", "finish_reason", "usage", "error", "stats",
        "completed_at",
    ):  # fmt: skip
        assert message[name] is None, name
    assert message["metadata"] == message["client_metadata"] == {}
    assert TIMESTAMP.fullmatch(message["created_at"])
    assert pen.message() == message
    assert pen.api.messages(pen.context_id) == [message]
    assert pen.pull()["content"] == ""
    assert (pen.pull()["sequence"], pen.pull()["final"]) == (0, False)
    pen.complete()
    assert pen.message()["epoch"] == 1


def test_the_context_is_producing_while_a_message_is_open(pen: Pen) -> None:
    """The state, the open message, the count; no turn was made, and one change is one revision."""
    before = pen.api.context(pen.context_id)
    pen.open(kind="thinking")
    context = pen.api.context(pen.context_id)
    assert context["state"] == "producing"
    assert context["state_detail"] == {}
    assert context["revision"] == before["revision"] + 1
    assert context["record_revision"] == before["record_revision"]
    assert context["message_count"] == 1
    assert context["open_messages"] == [
        {"message_id": "out", "role": "assistant", "kind": "thinking", "current_sequence": 0}
    ]
    assert pen.api.walk(f"/contexts/{pen.context_id}/turns") == []
    listed = pen.api.walk("/contexts", state="producing", limit=100)
    assert pen.context_id in [item["id"] for item in listed]
    pen.write("a", "b")
    assert pen.api.context(pen.context_id)["open_messages"][0]["current_sequence"] == 2


def test_can_send_while_producing(pen: Pen) -> None:
    """`producing` is busy: a send would get 409 only where on_busy is `reject`."""
    pen.open()
    for on_busy, can_send in (("reject", False), ("enqueue", True), ("interrupt", True)):
        changed = pen.api.http.patch(f"/contexts/{pen.context_id}", json={"on_busy": on_busy})
        assert ok(changed)["can_send"] is can_send, on_busy
        assert ok(changed)["state"] == "producing"
    ok(pen.api.http.patch(f"/contexts/{pen.context_id}", json={"on_busy": "reject"}))
    pen.complete()
    assert pen.api.context(pen.context_id)["can_send"] is True


@pytest.mark.parametrize("role", ["assistant", "system", "user", "tool"])
@pytest.mark.parametrize("kind", ["text", "thinking", "tool_call", "progress"])
def test_what_the_producer_says_of_its_message_is_kept(pen: Pen, role: str, kind: str) -> None:
    """Every role, and any lower-case word for a kind; media_type and metadata exactly."""
    more = {"media_type": "text/markdown", "metadata": {"a": [1, None, {"ü": 1.5}]}}
    message = pen.open(role=role, kind=kind, **more)
    assert (message["role"], message["kind"]) == (role, kind)
    assert message["media_type"] == more["media_type"]
    assert message["metadata"] == more["metadata"]
    assert pen.message() == message


def test_a_message_hangs_on_the_leaf_and_becomes_it(pen: Pen) -> None:
    """A branch's leaf moves when a message opens; the next turn's message hangs on it."""
    pen.api.run(pen.context_id, "hello")
    pen.open()
    pen.other("second").open()
    pen.complete()
    ok(pen.other("second").complete())
    pen.api.run(pen.context_id, "and on")
    listed = pen.api.messages(pen.context_id)
    assert [m["id"] for m in listed][2:4] == ["out", "second"]
    assert len(listed) == 6
    for before, after in pairwise(listed):
        assert after["parent_id"] == before["id"]
    assert [m["id"] for m in listed if "epoch" in m] == ["out", "second"]


def test_a_message_may_name_its_branch(pen: Pen) -> None:
    """At that branch's leaf, whichever is active."""
    first = pen.api.run(pen.context_id, "one")[0]
    pen.api.run(pen.context_id, "fork", parent_id=first["message_id"])
    active = pen.api.context(pen.context_id)["active_branch"]
    main = pen.api.messages(pen.context_id, branch="main")
    fork = pen.api.messages(pen.context_id, branch=active)
    message = pen.open(branch="main")
    assert message["parent_id"] == main[-1]["id"]
    assert pen.api.messages(pen.context_id, branch="main") == [*main, message]
    assert pen.api.messages(pen.context_id, branch=active) == fork
    assert pen.api.context(pen.context_id)["active_branch"] == active


def test_a_message_may_name_its_parent(pen: Pen) -> None:
    """From an earlier message: it stands on a branch of its own, and the old one is as it was."""
    pen.api.run(pen.context_id, "one")
    pen.api.run(pen.context_id, "two")
    main = pen.api.messages(pen.context_id)
    message = pen.open(parent_id=main[1]["id"])
    assert message["parent_id"] == main[1]["id"]
    assert pen.api.messages(pen.context_id, branch="main") == main
    assert pen.api.context(pen.context_id)["message_count"] == 5
    pen.write("x")
    assert ok(pen.complete())["status"] == "completed"


def test_unknown_places_are_404(pen: Pen) -> None:
    """The context, the branch, the parent, each by its own code; nothing is stored."""
    refusal = problem(Pen(pen.api, "no-such").put(), 404, "context_not_found")
    assert refusal["context_id"] == "no-such"
    refusal = problem(pen.put(branch="no"), 404, "branch_not_found")
    assert refusal["branch"] == "no"
    elsewhere = pen.api.send(pen.api.create(), "x", respond=False)["message_id"]
    for parent_id in ("no", "out", elsewhere):
        refusal = problem(pen.put(parent_id=parent_id), 404, "message_not_found")
        assert refusal["message_id"] == parent_id
    context = pen.api.context(pen.context_id)
    assert (context["state"], context["revision"]) == ("idle", 1)
    problem(pen.api.http.get(pen.path), 404, "message_not_found")


def test_a_messages_id_belongs_to_its_context(pen: Pen) -> None:
    """The same id in two contexts is two messages."""
    other = Pen(pen.api, pen.api.create())
    for one, text in ((pen, "mine"), (other, "yours")):
        one.open()
        one.write(text)
    assert (pen.texts(), other.texts()) == (["mine"], ["yours"])


@pytest.mark.parametrize("message_id", ["a" * 64, "A:b_c.d-9", "0"])
def test_a_producer_brings_its_own_id(pen: Pen, message_id: str) -> None:
    """Any id of §1."""
    assert pen.other(message_id).open()["id"] == message_id


@pytest.mark.parametrize("message_id", ["a" * 65, "a%20b", "%C3%BC", "a%0A", "%00", "%ff"])
def test_another_form_of_id_is_refused(pen: Pen, message_id: str) -> None:
    """Whatever it is called, it is no defect and nothing is stored."""
    assert pen.other(message_id).put().status_code in (400, 404)
    assert pen.api.context(pen.context_id)["message_count"] == 0


# What opening and closing do to the state


def test_several_messages_are_open_at_once(pen: Pen) -> None:
    """Idle when the last closes; a row for each opening, and one for the last closing."""
    pens = [pen.other(name) for name in ("a", "b", "c")]
    start = pen.api.context(pen.context_id)["revision"]
    for number, each in enumerate(pens):
        each.open()
        assert pen.api.context(pen.context_id)["revision"] == start + number + 1
    opened = pen.api.context(pen.context_id)["open_messages"]
    assert [item["message_id"] for item in opened] == ["a", "b", "c"]
    for number, each in enumerate((pens[1], pens[0], pens[2])):
        ok(each.complete() if number else each.fail())
        context = pen.api.context(pen.context_id)
        assert context["state"] == ("idle" if number == 2 else "producing")
        assert context["revision"] == start + 4 + number
    steps = [
        (row["trigger"], row["from_state"], row["to_state"], row["turn_id"], row["revision"])
        for row in pen.api.journal(pen.context_id)
    ]
    assert steps == [
        ("open_message", "idle", "producing", None, start + 1),
        ("open_message", "producing", "producing", None, start + 2),
        ("open_message", "producing", "producing", None, start + 3),
        ("close_message", "producing", "idle", None, start + 6),
    ]


def test_a_failed_context_can_be_produced_to(pen: Pen) -> None:
    """open_message leads from `failed` too; then the failed turn is history."""
    pen.api.run(pen.context_id, script({"error": "fatal"}))
    assert pen.api.context(pen.context_id)["state"] == "failed"
    pen.open()
    context = pen.api.context(pen.context_id)
    assert (context["state"], context["state_detail"]) == ("producing", {})
    row = pen.api.journal(pen.context_id)[-1]
    assert (row["trigger"], row["from_state"], row["to_state"]) == (
        "open_message", "failed", "producing",
    )  # fmt: skip
    retry = pen.api.http.post(f"/contexts/{pen.context_id}/retry")
    refusal = problem(retry, 409, "illegal_transition")
    assert (refusal["state"], refusal["trigger"]) == ("producing", "retry")
    assert set(refusal["allowed"]) == {"open_message", "close_message", "cancel"}
    pen.complete()
    assert pen.api.context(pen.context_id)["state"] == "idle"


def test_while_a_turn_runs_nobody_else_writes(pen: Pen) -> None:
    """409 context_busy with the state; nothing changed, and the id is still free."""
    pen.api.send(pen.context_id, ENDLESS)
    reply_id = pen.api.opened(pen.context_id)["message_id"]
    before = pen.api.context(pen.context_id)
    for each in (pen, pen.other(reply_id)):
        refusal = problem(each.put(), 409, "context_busy")
        assert refusal["state"] == "streaming_llm_response"
    after = pen.api.context(pen.context_id)
    assert after["revision"] == before["revision"]
    assert after["message_count"] == before["message_count"]
    pen.api.cancel(pen.context_id)
    assert pen.open()["parent_id"] == reply_id


def test_a_message_that_is_no_producers_cannot_be_opened(pen: Pen) -> None:
    """409 for what was sent and for what a turn wrote; both stay as they are."""
    pen.api.run(pen.context_id, "hello", message_id="sent")
    before = pen.api.context(pen.context_id)
    for message in pen.api.messages(pen.context_id):
        each = pen.other(message["id"])
        refusal = each.put(producer={"id": "w", "epoch": 9})
        assert refusal.status_code == 409, refusal.text
        assert refusal.json()["code"] in ("id_taken", "message_closed")
        assert each.message() == message
    assert pen.api.context(pen.context_id) == before


def test_a_producers_id_is_taken_for_a_send(pen: Pen) -> None:
    """409 id_taken, while it is open and afterwards; nothing is stored."""
    pen.open()
    for respond in (True, False):
        response = pen.api.post_message(pen.context_id, "x", message_id="out", respond=respond)
        assert problem(response, 409, "id_taken")["id"] == "out"
    ok(pen.complete())
    problem(pen.api.post_message(pen.context_id, "x", message_id="out"), 409, "id_taken")
    assert pen.api.context(pen.context_id)["message_count"] == 1


# Who may write


def test_opening_again_with_the_same_producer_and_epoch_is_harmless(pen: Pen) -> None:
    """200, the message as it is, and nothing changed: also after it has been written to."""
    pen.open(kind="thinking", metadata={"a": 1})
    pen.write("a", "b")
    before = pen.held()
    again = ok(pen.put(kind="thinking", metadata={"a": 1}))
    assert again == before[1]
    assert again["current_sequence"] == 2
    assert ok(pen.put()) == again
    assert pen.held() == before


def test_without_an_epoch_each_opening_takes_the_next(pen: Pen) -> None:
    """The current one + 1, by whoever asks; each is one change."""
    producers = ("a", "a", "b", "a")
    start = pen.api.context(pen.context_id)["revision"]
    for number, name in enumerate(producers):
        message = ok(pen.put(producer={"id": name}), 200 if number else 201)
        assert message["epoch"] == number + 1
        assert pen.api.context(pen.context_id)["revision"] == start + number + 1
    assert pen.message()["epoch"] == 4
    assert pen.api.context(pen.context_id)["message_count"] == 1


def test_a_higher_epoch_takes_over(pen: Pen) -> None:
    """200 with the new epoch; what is written stays, what it is stays, and it stays open."""
    opened = pen.open(kind="thinking", role="tool", metadata={"a": 1})
    pen.write("one ", "two ")
    before = pen.api.context(pen.context_id)
    taken = ok(pen.put(producer={"id": "worker-2", "epoch": 5}))
    assert taken == {**opened, "epoch": 5, "current_sequence": 2}
    context = pen.api.context(pen.context_id)
    assert context["revision"] == before["revision"] + 1
    assert context["open_messages"] == before["open_messages"]
    assert context["state"] == "producing"
    assert ok(pen.batch(*numbered(3, "three"), epoch=5))["sequence"] == 3
    assert pen.texts() == ["one ", "two ", "three"]
    changed = pen.api.messages(pen.context_id, since_revision=before["revision"])
    assert [(m["id"], m["epoch"]) for m in changed] == [("out", 5)]


def test_a_producer_that_was_taken_over_is_refused(pen: Pen) -> None:
    """409 stale_producer with the current epoch, on every route; nothing changed."""
    pen.open()
    pen.write("one ")
    ok(pen.put(producer={"id": "worker-2", "epoch": 3}))
    before = pen.held()
    for response in (
        pen.put(),
        pen.put(producer={"id": "worker-1", "epoch": 2}),
        pen.put(producer={"id": "worker-1", "epoch": 3}),
        pen.put(producer={"id": "worker-2", "epoch": 2}),
        pen.batch(*numbered(2, "x"), epoch=1),
        pen.batch(*numbered(2, "x"), epoch=2),
        pen.post({"content": "x", "epoch": 1}),
        pen.batch(*numbered(1, "one "), epoch=1),
        pen.lines(b'{"epoch":1}\n{"content":"x"}\n'),
        pen.complete(epoch=1),
        pen.fail(epoch=2),
    ):
        assert problem(response, 409, "stale_producer")["epoch"] == 3, response.request.url
    assert pen.held() == before
    assert ok(pen.put(producer={"id": "worker-2", "epoch": 3})) == before[1]


def test_an_epoch_that_nobody_has_taken_may_not_write(pen: Pen) -> None:
    """A message is taken over by opening it, not by writing with a higher number."""
    pen.open()
    before = pen.held()
    for response in (
        pen.post({"content": "x", "epoch": 2}),
        pen.complete(epoch=2),
        pen.fail(epoch=2),
    ):
        assert problem(response, 409, "stale_producer")["epoch"] == 1
    assert pen.held() == before


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_a_closed_message_is_never_opened_again(pen: Pen, end: str) -> None:
    """409 message_closed with how and where, whatever the epoch; nothing changed."""
    pen.open()
    pen.write("a", "b")
    if end == "cancel":
        pen.api.cancel(pen.context_id)
    else:
        ok(pen.complete() if end == "complete" else pen.fail())
    before = pen.held()
    for producer in (WORKER, {"id": "worker-1"}, {"id": "w", "epoch": 2}):
        refusal = problem(pen.put(producer=producer), 409, "message_closed")
        assert refusal["message_status"] == before[1]["status"]
        assert refusal["final_sequence"] == 2
    assert pen.held() == before
    assert pen.other("next").open()["parent_id"] == "out"


def test_of_simultaneous_openings_one_makes_the_message(pen: Pen) -> None:
    """The same request from many: 201 once, 200 else; without epochs no two get the same."""
    with ThreadPoolExecutor(8) as pool:
        same = [answer.status_code for answer in pool.map(lambda _: pen.put(), range(16))]
        other = pen.other("other")
        taken = list(pool.map(lambda n: other.put(producer={"id": f"w{n}"}), range(16)))
    assert Counter(same) == {201: 1, 200: 15}
    assert Counter(answer.status_code for answer in taken) == {201: 1, 200: 15}
    assert sorted(answer.json()["epoch"] for answer in taken) == list(range(1, 17))
    assert other.message()["epoch"] == 16


def test_epochs_end_where_numbers_do(pen: Pen) -> None:
    """The largest number of §1 is an epoch; beyond it there is none to take, and no defect."""
    largest = 2**53 - 1
    assert pen.open(producer={"id": "w", "epoch": largest})["epoch"] == largest
    assert ok(pen.post({"content": "x", "epoch": largest}))["accepted"] == 1
    assert pen.put(producer={"id": "w"}).status_code in (400, 409)
    assert pen.message()["epoch"] == largest


# Signals


def test_an_opened_message_is_signalled_at_0(pen: Pen) -> None:
    """content_delta at 0, then the state; so it is for who attaches, and for a take-over's reader."""
    with pen.api.stream(pen.context_id, throttle_ms=0) as stream:
        stream.current()
        pen.open(kind="progress", role="tool")
        frames = stream.until_state("producing")
        assert types(frames) == ["content_delta", "state_changed"]
        assert frames[0]["message_id"] == "out"
        assert frames[0]["current_sequence"] == 0
        assert (frames[0]["role"], frames[0]["kind"]) == ("tool", "progress")
        assert frames[1]["revision"] == pen.api.context(pen.context_id)["revision"]
        ok(pen.put(producer={"id": "b"}))
        revision = pen.api.context(pen.context_id)["revision"]
        frames += stream.until_state("producing", after=revision - 1)
    check_live(frames)
    attached = pen.api.attach(pen.context_id)
    assert types(attached) == ["content_delta", "state_changed", "heartbeat"]
    assert attached[0]["current_sequence"] == 0
    assert attached[1]["new_state"] == "producing"
