"""§3.1 at the wire: what a send to a busy context does."""

from itertools import pairwise

from wire import (
    ENDLESS,
    SILENT,
    Api,
    Json,
    ok,
    problem,
    script,
    until,
)


def ids(items: list[Json]) -> list[str]:
    return [item["id"] for item in items]


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
    for before, after in pairwise(listed):
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
