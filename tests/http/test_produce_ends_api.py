"""§7 at the wire: how a produced message ends, and what the context does then (§3.1, §5, §6)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from bodies import MESSAGE_FIELDS
from producing import ERROR, Pen, lines, numbered
from protocol_table import TRANSITIONS, TURN_STATES
from signal_rules import check_live
from wire import TIMESTAMP, Api, Json, ok, problem, until


@pytest.fixture
def pen(api: Api, context_id: str) -> Pen:
    """A message that was just opened, by `worker-1` in epoch 1."""
    pen = Pen(api, context_id)
    pen.open()
    return pen


def last_steps(pen: Pen, count: int) -> list[tuple[str, str, str]]:
    """The newest rows of the journal."""
    rows = pen.api.journal(pen.context_id)[-count:]
    return [(row["trigger"], row["from_state"], row["to_state"]) for row in rows]


# Completing


def test_a_completed_message(pen: Pen) -> None:
    """200 with the Message: final_sequence, finish_reason, usage, stats; one change; idle."""
    pen.write("Grüße ", "🦊")
    before = pen.api.context(pen.context_id)
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    response = pen.complete(epoch=1, final_sequence=2, finish_reason="stop", usage=usage)
    message = ok(response)
    assert set(message) == MESSAGE_FIELDS | {"epoch"}
    assert message["status"] == "completed"
    assert message["current_sequence"] == message["final_sequence"] == 2
    assert (message["finish_reason"], message["usage"]) == ("stop", usage)
    assert message["error"] is None
    assert TIMESTAMP.fullmatch(message["completed_at"])
    stats = message["stats"]
    assert (stats["chunks"], stats["characters"], stats["bytes"]) == (2, 7, 12)
    assert stats["total_ms"] >= stats["first_chunk_ms"] >= 0
    assert stats["mean_interval_ms"] >= 0
    assert pen.message() == message
    context = pen.api.context(pen.context_id)
    assert (context["state"], context["open_messages"]) == ("idle", [])
    assert context["revision"] == before["revision"] + 1
    assert last_steps(pen, 1) == [("close_message", "producing", "idle")]
    assert pen.pull()["final"] is True


def test_all_of_a_completion_is_optional(pen: Pen) -> None:
    """An empty object and no body at all; a message may stay empty."""
    message = ok(pen.complete())
    assert (message["status"], message["final_sequence"]) == ("completed", 0)
    assert message["finish_reason"] is message["usage"] is None
    assert message["stats"]["chunks"] == message["stats"]["bytes"] == 0
    assert message["stats"]["first_chunk_ms"] is None
    other = pen.other("other")
    other.open()
    assert ok(pen.api.http.post(f"{other.path}/complete"))["status"] == "completed"


def test_completing_again_is_harmless(pen: Pen) -> None:
    """200 with the message as it is, and nothing changed, also where the repeat says less or more."""
    pen.write("a", "b")
    body = {"epoch": 1, "final_sequence": 2, "finish_reason": "stop"}
    message = ok(pen.complete(**body))
    before = pen.held()
    assert ok(pen.complete(**body)) == message
    assert ok(pen.complete(epoch=1)) == message
    assert ok(pen.complete()) == message
    assert pen.complete(epoch=1, finish_reason="length").status_code in (200, 409)
    assert pen.held() == before


def test_a_completion_may_say_how_many_chunks_there_are(pen: Pen) -> None:
    """More than there are: sequence_gap with the next one; fewer: sequence_conflict; it stays open."""
    pen.write("a", "b", "c")
    before = pen.held()
    for final in (4, 9, 2**53 - 1):
        refusal = problem(pen.complete(final_sequence=final, epoch=1), 409, "sequence_gap")
        assert refusal["expected_sequence"] == 4
    for final in (0, 2):
        refusal = problem(pen.complete(final_sequence=final), 409, "sequence_conflict")
        assert isinstance(refusal["sequence"], int)
    assert pen.held() == before
    assert ok(pen.complete(final_sequence=3))["final_sequence"] == 3
    for final in (2, 4):
        assert pen.complete(final_sequence=final).status_code == 409
    assert pen.message()["final_sequence"] == 3


# Failing


def test_a_failed_message(pen: Pen) -> None:
    """200 with the Message and its error; the context is idle, for the error is the message's."""
    pen.write("half")
    before = pen.api.context(pen.context_id)
    message = ok(pen.fail(epoch=1))
    assert (message["status"], message["final_sequence"]) == ("failed", 1)
    assert message["error"] == ERROR
    assert message["stats"]["chunks"] == 1
    context = pen.api.context(pen.context_id)
    assert (context["state"], context["state_detail"]) == ("idle", {})
    assert context["revision"] == before["revision"] + 1
    assert last_steps(pen, 1) == [("close_message", "producing", "idle")]
    assert ok(pen.fail(epoch=1)) == message
    assert ok(pen.fail()) == message
    assert pen.fail(error={"type": "x", "message": "y"}).status_code in (200, 409)
    assert pen.message() == message
    assert pen.api.context(pen.context_id) == context


def test_a_message_ends_one_way(pen: Pen) -> None:
    """Completed, failed, cancelled: the others are 409 message_closed then, and change nothing."""
    pens = {name: pen.other(name) for name in ("completed", "failed", "cancelled")}
    for each in pens.values():
        each.open()
        each.write("x")
    ok(pens["completed"].complete())
    ok(pens["failed"].fail())
    pen.api.cancel(pen.context_id)
    for status, each in pens.items():
        before = each.held()
        assert before[1]["status"] == status
        requests = {"completed": [each.fail], "failed": [each.complete]}
        for end in requests.get(status, [each.complete, each.fail]):
            refusal = problem(end(epoch=1), 409, "message_closed")
            assert (refusal["message_status"], refusal["final_sequence"]) == (status, 1)
        assert each.held() == before


def test_of_simultaneous_ends_one_wins(pen: Pen) -> None:
    """complete, fail and cancel against each other: one change, one status, one row."""
    for n in range(10):
        each = pen.other(f"m{n}")
        each.open()
        start = pen.api.context(pen.context_id)["revision"]
        pen_closed = pen if n == 0 else None
        if pen_closed is not None:
            ok(pen_closed.complete())
            start += 1
        with ThreadPoolExecutor(3) as pool:
            completing = pool.submit(each.complete, epoch=1)
            failing = pool.submit(each.fail, epoch=1)
            cancelling = pool.submit(pen.api.cancel, pen.context_id)
            answers = [completing.result(), failing.result()]
        assert cancelling.result()["state"] == "idle"
        status = each.message()["status"]
        won = {"completed": [200, 409], "failed": [409, 200], "cancelled": [409, 409]}
        assert [answer.status_code for answer in answers] == won[status]
        assert pen.api.context(pen.context_id)["revision"] == start + 1


def test_what_was_answered_is_there_when_a_cancel_comes(pen: Pen) -> None:
    """A producer that writes without a pause: cut exactly after what was answered with 200."""
    ok(pen.complete())
    for n in range(10):
        each = Pen(Api(pen.api.url), pen.context_id, f"m{n}")
        each.open()

        def write(each: Pen = each) -> tuple[int, Json]:
            head = 0
            while (answer := each.post({"epoch": 1, "content": "x"})).status_code == 200:
                head = answer.json()["sequence"]
            return head, problem(answer, 409, "message_closed")

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            pen.other(f"m{n}").reached(3)
            pen.api.cancel(pen.context_id)
            head, refusal = writing.result(timeout=20)
        assert refusal["final_sequence"] == head == each.message()["final_sequence"]
        assert each.texts() == ["x"] * head


def test_the_journal_is_a_walk_through_the_table(api: Api, context_id: str) -> None:
    """Producers, senders and cancels against each other: only legal steps, and rest at the end."""

    def act(n: int) -> None:
        own = Api(api.url)
        for turn in range(8):
            each = Pen(own, context_id, f"m{n}-{turn}")
            opened = each.put().status_code
            sent = own.post_message(context_id, "hi", on_busy=("enqueue", "interrupt")[n % 2])
            ends = (each.complete, each.fail, lambda: own.http.post(f"{root}/cancel"))
            ended = ends[turn % 3]().status_code
            assert (opened, sent.status_code) in ((201, 202), (409, 202))
            assert ended in (200, 404, 409)
        own.close()

    root = f"/contexts/{context_id}"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(act, range(4)))
    api.cancel(context_id)

    def at_rest() -> bool:
        for item in api.context(context_id)["open_messages"]:
            Pen(api, context_id, item["message_id"]).complete()
        context = api.context(context_id)
        return context["state"] == "idle" and context["queued_messages"] == 0

    until(at_rest, "rest")
    state = "idle"
    for row in api.journal(context_id):
        assert row["from_state"] == state
        assert (row["trigger"], row["from_state"], row["to_state"]) in TRANSITIONS
        state = row["to_state"]
    assert state == "idle"
    listed = api.messages(context_id)
    assert [m["parent_id"] for m in listed] == [None, *[m["id"] for m in listed[:-1]]]
    assert len(listed) == api.context(context_id)["message_count"]
    assert all(m["status"] != "streaming" for m in listed)


def test_ends_are_signalled(pen: Pen) -> None:
    """A message_completed with each status; the state after the last of them."""
    pens = {name: pen.other(name) for name in ("completed", "failed", "cancelled")}
    ok(pen.complete())
    with pen.api.stream(pen.context_id, throttle_ms=0) as stream:
        frames = stream.current()
        for each in pens.values():
            each.open(kind="progress")
            each.write("a", "b")
        ok(pens["failed"].fail())
        ok(pens["completed"].complete())
        pen.api.cancel(pen.context_id)
        revision = pen.api.context(pen.context_id)["revision"]
        frames += stream.until_state("idle", after=revision - 1)
    check_live(frames)
    ends = {f["message_id"]: f for f in frames if f.type == "message_completed"}
    assert {name: end["status"] for name, end in ends.items()} == {name: name for name in pens}
    assert {end["final_sequence"] for end in ends.values()} == {2}
    assert {end["kind"] for end in ends.values()} == {"progress"}
    assert frames[-1]["revision"] == revision
    assert frames[-1].id == pen.api.context(pen.context_id)["stream_cursor"]


# Cancelling


def test_a_viewer_cancels_all_that_is_open(pen: Pen) -> None:
    """200 with cancelled_turn_id null; each message closed at its head; the producer hears of it."""
    other = pen.other("other")
    other.open()
    pen.write("a", "b")
    start = pen.api.context(pen.context_id)["revision"]
    answer = pen.api.cancel(pen.context_id)
    assert answer == {"state": "idle", "cancelled_turn_id": None}
    for each, final in ((pen, 2), (other, 0)):
        message = each.message()
        assert (message["status"], message["final_sequence"]) == ("cancelled", final)
        assert message["stats"]["chunks"] == final
        refusal = problem(each.post({"content": "x", "epoch": 1}), 409, "message_closed")
        assert (refusal["message_status"], refusal["final_sequence"]) == ("cancelled", final)
    assert pen.texts() == ["a", "b"]
    context = pen.api.context(pen.context_id)
    assert (context["state"], context["open_messages"]) == ("idle", [])
    assert context["revision"] > start
    row = pen.api.journal(pen.context_id)[-1]
    assert (row["trigger"], row["from_state"], row["to_state"]) == ("cancel", "producing", "idle")
    assert row["turn_id"] is None
    assert pen.api.cancel(pen.context_id)["cancelled_turn_id"] is None
    assert pen.api.context(pen.context_id) == context


def test_a_cancel_of_one_message_is_one_change(pen: Pen) -> None:
    """The state and the message in one revision."""
    before = pen.api.context(pen.context_id)["revision"]
    pen.api.cancel(pen.context_id)
    assert pen.api.context(pen.context_id)["revision"] == before + 1


def test_a_cancel_of_a_turn_leaves_producers_alone(api: Api, context_id: str) -> None:
    """Another turn than the one named, as none runs: 200, null, nothing changed."""
    turn_id = api.run(context_id, "hello")[0]["turn_id"]
    pen = Pen(api, context_id)
    pen.open()
    before = pen.held()
    for named in (turn_id, "nothing"):
        answer = api.cancel(context_id, turn_id=named)
        assert answer == {"state": "producing", "cancelled_turn_id": None}
    path = f"/contexts/{context_id}/turns/{turn_id}/cancel"
    assert ok(api.http.post(path))["cancelled_turn_id"] is None
    assert pen.held() == before
    assert pen.write("x")["accepted"] == 1


# Sends while producing


@pytest.mark.parametrize("end", ["complete", "fail", "cancel", "line"])
def test_what_is_queued_starts_when_the_last_message_closes(pen: Pen, end: str) -> None:
    """However it closes; the end and the start are one transaction, and not before the last."""
    other = pen.other("other")
    other.open()
    queued = [pen.api.send(pen.context_id, f"number {n}") for n in range(2)]
    for answer in queued:
        assert (answer["queued"], answer["state"]) == (True, "producing")
        assert pen.api.message(pen.context_id, answer["message_id"])["parent_id"] is None
    if end == "cancel":
        assert pen.api.cancel(pen.context_id)["state"] in TURN_STATES
    else:
        ok(other.complete())
        assert pen.api.context(pen.context_id)["queued_messages"] == 2
        ends = {"complete": pen.complete, "fail": pen.fail}
        ok(ends[end]() if end in ends else pen.lines(lines({"complete": {}})))
    for answer in queued:
        assert pen.api.ended(pen.context_id, answer["turn_id"])["status"] == "completed"
    message = pen.api.message(pen.context_id, queued[0]["message_id"])
    assert message["parent_id"] == "other"
    journal = pen.api.journal(pen.context_id)
    trigger = "cancel" if end == "cancel" else "close_message"
    place = [row["trigger"] for row in journal].index(trigger)
    first, second = journal[place : place + 2]
    assert (second["trigger"], second["turn_id"]) == ("receive_message", queued[0]["turn_id"])
    assert second["revision"] == first["revision"] + 1
    assert second["at"] == first["at"]
    pen.api.in_state(pen.context_id, "idle")


def test_a_queued_turn_can_be_taken_out(pen: Pen) -> None:
    """It ends as cancelled; the producer is not touched, and nothing starts at its end."""
    queued = pen.api.send(pen.context_id, "number")
    path = f"/contexts/{pen.context_id}/turns/{queued['turn_id']}/cancel"
    answer = ok(pen.api.http.post(path))
    assert answer == {"state": "producing", "cancelled_turn_id": queued["turn_id"]}
    assert pen.write("x")["accepted"] == 1
    ok(pen.complete())
    assert pen.api.context(pen.context_id)["state"] == "idle"
    assert last_steps(pen, 1) == [("close_message", "producing", "idle")]


def test_more_messages_may_open_while_something_is_queued(pen: Pen) -> None:
    """open_message leads from producing to producing, and the queue waits on."""
    queued = pen.api.send(pen.context_id, "number")
    other = pen.other("other")
    other.open()
    ok(pen.complete())
    assert pen.api.turn(pen.context_id, queued["turn_id"])["status"] == "queued"
    ok(other.complete())
    assert pen.api.ended(pen.context_id, queued["turn_id"])["status"] == "completed"


def test_a_send_may_refuse_to_wait(pen: Pen) -> None:
    """on_busy reject: 409 context_busy with the state; nothing is stored."""
    before = pen.held()
    response = pen.api.post_message(pen.context_id, "x", on_busy="reject")
    assert problem(response, 409, "context_busy")["state"] == "producing"
    assert pen.held() == before


def test_a_send_may_interrupt_producers(pen: Pen) -> None:
    """What they wrote stays, closed as cancelled; this one runs now, ahead of what is queued."""
    other = pen.other("other")
    other.open()
    pen.write("a", "b")
    queued = pen.api.send(pen.context_id, "queued")
    urgent = pen.api.send(pen.context_id, "urgent", on_busy="interrupt")
    assert urgent["queued"] is False
    assert urgent["state"] in TURN_STATES
    for each, final in ((pen, 2), (other, 0)):
        message = each.message()
        assert (message["status"], message["final_sequence"]) == ("cancelled", final)
        problem(each.post({"content": "x"}), 409, "message_closed")
    for answer in (urgent, queued):
        assert pen.api.ended(pen.context_id, answer["turn_id"])["status"] == "completed"
    sent = [m["id"] for m in pen.api.messages(pen.context_id) if m["role"] == "user"]
    assert sent == [urgent["message_id"], queued["message_id"]]
    journal = pen.api.journal(pen.context_id)
    place = [row["trigger"] for row in journal].index("cancel")
    assert journal[place]["from_state"] == "producing"
    assert journal[place + 1]["trigger"] == "receive_message"
    assert journal[place + 1]["turn_id"] == urgent["turn_id"]


def test_respond_false_works_while_producing(pen: Pen) -> None:
    """Stored at the leaf at once, with any on_busy; the state does not change."""
    for on_busy in ("enqueue", "reject", "interrupt"):
        answer = pen.api.send(pen.context_id, "note", respond=False, on_busy=on_busy)
        assert (answer["state"], answer["turn_id"], answer["queued"]) == ("producing", None, False)
    listed = pen.api.messages(pen.context_id)
    assert [m["parent_id"] for m in listed] == [None, *[m["id"] for m in listed[:-1]]]
    assert pen.message()["status"] == "streaming"


# Deleting


def test_a_deleted_context_is_gone_for_its_producer(pen: Pen) -> None:
    """404 context_not_found on every route; who reads is told, and its stream ends."""
    pen.write("a")
    with pen.api.stream(pen.context_id) as stream:
        stream.current()
        assert pen.api.http.delete(f"/contexts/{pen.context_id}").status_code == 204
        frames = list(stream)
        assert frames[-1]["new_state"] == "deleted"
    for response in (
        pen.put(),
        pen.put(producer={"id": "worker-1", "epoch": 2}),
        pen.batch(*numbered(1, "a")),
        pen.post({"content": "b"}),
        pen.lines(lines({"content": "b"})),
        pen.complete(),
        pen.fail(),
    ):
        problem(response, 404, "context_not_found")
