"""§4 to §4.2 at the wire: attaching, coming back, merging and the order of signals."""

import json
import threading
from collections import defaultdict
from typing import Any

import httpx
import pytest
from serving import Server
from wire import ENDLESS, SILENT, Api, Frame, Json, invalid, problem, script, until

SLOWLY = script({"rate": 60}, {"text": "one two three four five six seven eight nine ten "})


def types(frames: list[Frame]) -> list[str]:
    return [frame.type for frame in frames]


def completed(frames: list[Frame]) -> set[str]:
    return {frame["message_id"] for frame in frames if frame.type == "message_completed"}


def check_order(frames: list[Frame]) -> None:
    """What holds for every connection, whatever was merged (§4.1, §4.2)."""
    positions: dict[str, int] = defaultdict(lambda: -1)
    done: set[str] = set()
    revision = 0
    for frame in frames:
        if frame.type == "content_delta":
            assert frame["message_id"] not in done, "a delta after the completion"
            assert frame["current_sequence"] > positions[frame["message_id"]]
            positions[frame["message_id"]] = frame["current_sequence"]
        elif frame.type == "message_completed":
            assert frame["message_id"] not in done, "a second completion"
            assert frame["final_sequence"] >= positions[frame["message_id"]]
            done.add(frame["message_id"])
        elif frame.type == "state_changed":
            assert frame["revision"] > revision, "the state went back"
            assert frame["record_revision"] <= frame["revision"]
            revision = frame["revision"]


def check_live(frames: list[Frame]) -> None:
    """Among live signals: a delta at the final position before each completion (§4.2)."""
    check_order(frames)
    seen: dict[str, int] = {}
    for frame in frames:
        if frame.type == "content_delta":
            seen[frame["message_id"]] = frame["current_sequence"]
        elif frame.type == "message_completed" and frame["final_sequence"]:
            assert seen.get(frame["message_id"]) == frame["final_sequence"], frame


# The stream itself


def test_the_headers_of_a_stream(api: Api, context_id: str) -> None:
    """text/event-stream, never stored, never buffered, never compressed."""
    with api.stream(context_id, headers={"accept-encoding": "gzip, br, zstd"}) as stream:
        assert stream.headers["content-type"].split(";")[0] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-store, no-transform"
        assert stream.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in stream.headers
        stream.current()


def test_attaching_to_a_new_context_says_its_state(api: Api, context_id: str) -> None:
    """state_changed with the state as it is, then one heartbeat: you are current."""
    context = api.context(context_id)
    state, heartbeat = api.attach(context_id)
    assert state.type == "state_changed"
    assert state["context_id"] == context_id
    assert state["new_state"] == "idle"
    assert state["revision"] == context["revision"]
    assert state["record_revision"] == context["record_revision"]
    assert state.id == context["stream_cursor"]
    assert heartbeat.type == "heartbeat"
    assert state.event is heartbeat.event is None


def test_named_framing_adds_the_type(api: Api, context_id: str) -> None:
    """For addEventListener; without it frames are unnamed, and can be asked for by that name."""
    with api.stream(context_id, framing="named", throttle_ms=0) as stream:
        frames = stream.current()
        answer = api.send(context_id, "hi")
        frames += stream.until_state("idle", after=answer["revision"])
    assert {"content_delta", "message_completed"} <= set(types(frames))
    for frame in frames:
        assert frame.event == frame.type
    for frame in api.attach(context_id):
        assert frame.event is None


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("heartbeat=4", "heartbeat"),
        ("heartbeat=4.9", "heartbeat"),
        ("heartbeat=61", "heartbeat"),
        ("heartbeat=x", "heartbeat"),
        ("heartbeat=", "heartbeat"),
        ("heartbeat=nan", "heartbeat"),
        ("throttle_ms=-1", "throttle_ms"),
        ("throttle_ms=1001", "throttle_ms"),
        ("throttle_ms=1.5", "throttle_ms"),
        ("throttle_ms=x", "throttle_ms"),
        ("framing=loud", "framing"),
        ("framing=", "framing"),
        ("colour=red", "colour"),
        ("throttle_ms=1&throttle_ms=2", "throttle_ms"),
        ("context_id=x", "context_id"),
    ],
)
def test_a_wrong_parameter_of_a_stream_is_named(
    api: Api, context_id: str, query: str, field: str
) -> None:
    """400 before the stream starts."""
    with api.http.stream("GET", f"/contexts/{context_id}/stream?{query}") as response:
        if response.status_code == 400:
            response.read()
        invalid(response, field)


@pytest.mark.parametrize(
    "query", ["heartbeat=5", "heartbeat=60", "throttle_ms=0", "throttle_ms=1000", "framing=named"]
)
def test_the_ends_of_the_ranges_are_taken(api: Api, context_id: str, query: str) -> None:
    """5 to 60 seconds, 0 to 1000 milliseconds."""
    with api.http.stream("GET", f"/contexts/{context_id}/stream?{query}") as response:
        assert response.status_code == 200


def test_an_unknown_context_is_404_before_the_stream(api: Api) -> None:
    """A problem, not a stream: also with a cursor, also for a deleted context."""
    deleted = api.create()
    api.http.delete(f"/contexts/{deleted}")
    for id_ in ("no-such-context", deleted):
        for params in ({}, {"last_event_id": "x"}):
            response = api.http.get(f"/contexts/{id_}/stream", params=params)
            assert problem(response, 404, "context_not_found")["context_id"] == id_


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_only_get_is_possible(api: Api, context_id: str, method: str) -> None:
    """405 with Allow."""
    response = api.http.request(method, f"/contexts/{context_id}/stream")
    problem(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


def test_streams_are_bounded(tight: Api) -> None:
    """More than the limit: 503 with Retry-After; the place is free again when a reader goes."""
    context_id = tight.create()
    with tight.stream(context_id) as stream:
        stream.current()
        response = tight.http.get(f"/contexts/{context_id}/stream")
        problem(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1

    def attach() -> bool:
        with tight.http.stream("GET", f"/contexts/{context_id}/stream") as response:
            return response.status_code == 200

    until(attach, "a free place")


@pytest.mark.slow
def test_a_heartbeat_comes_when_nothing_else_does(api: Api, context_id: str) -> None:
    """As data, at the time that was asked for: 5 s, with as much again for a busy machine."""
    with api.stream(context_id, heartbeat=5, silence_s=10) as stream:
        stream.current()
        (frame,) = stream.current()
        assert frame.type == "heartbeat"
        assert frame.id is None


# Live signals


def test_a_turn_as_a_reader_sees_it(api: Api, context_id: str) -> None:
    """Deltas up to the end, the completion after the last of them, then the state that ends it."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        answer = api.send(context_id, SLOWLY)
        frames = stream.until_state("idle", after=answer["revision"])
    check_live(frames)
    (reply,) = api.replies(context_id, answer["turn_id"])
    mine = [frame for frame in frames if frame.get("message_id") == reply["id"]]
    assert types(mine)[-2:] == ["content_delta", "message_completed"]
    assert mine[-2]["current_sequence"] == mine[-1]["final_sequence"] == 10
    assert mine[-1]["status"] == "completed"
    assert (mine[-1]["role"], mine[-1]["kind"]) == ("assistant", "text")
    for delta in mine[:-1]:
        assert (delta["role"], delta["kind"]) == ("assistant", "text")
        assert delta["context_id"] == context_id
        assert delta.id is None
    states = [frame for frame in frames if frame.type == "state_changed"]
    assert states[-1]["revision"] == api.context(context_id)["revision"]
    assert frames.index(mine[-1]) < frames.index(states[-1])
    users = [frame for frame in frames if frame.get("message_id") == answer["message_id"]]
    assert types(users) == ["content_delta", "message_completed"]
    assert users[-1]["role"] == "user"


@pytest.mark.parametrize("throttle_ms", [0, 10, 200])
def test_what_is_pulled_on_deltas_alone_is_complete_at_the_completion(
    api: Api, context_id: str, throttle_ms: int
) -> None:
    """A simple client that pulls only on deltas has its text when the end comes."""
    with api.stream(context_id, throttle_ms=throttle_ms) as stream:
        stream.current()
        answer = api.send(context_id, script({"rate": 200}, {"repeat": 60, "text": "word "}))
        held: dict[str, tuple[int, str]] = defaultdict(lambda: (0, ""))
        for frame in stream:
            if frame.type == "content_delta":
                position, text = held[frame["message_id"]]
                pull = api.pull(context_id, frame["message_id"], from_sequence=position)
                assert pull["head_sequence"] >= frame["current_sequence"]
                assert pull["sequence"] >= frame["current_sequence"]
                held[frame["message_id"]] = (pull["sequence"], text + pull["content"])
            elif frame.type == "message_completed" and frame["role"] == "assistant":
                break
    (reply,) = api.replies(context_id, answer["turn_id"])
    assert held[reply["id"]] == (60, "word " * 60)


def test_every_delta_tells_of_a_position_that_can_be_pulled(api: Api, context_id: str) -> None:
    """Commit before visible: what is signalled is there."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        api.send(context_id, script({"rate": 300}, {"repeat": 100, "text": "x"}))
        for frame in stream:
            if frame.type == "content_delta":
                end = frame["current_sequence"]
                response = api.get_content(context_id, frame["message_id"], to_sequence=end)
                assert response.json()["sequence"] == end
                assert "immutable" in response.headers["cache-control"]
            elif frame.type == "message_completed" and frame["role"] == "assistant":
                pull = api.pull(context_id, frame["message_id"])
                assert pull["final"] is True
                assert pull["sequence"] == frame["final_sequence"]
                assert api.message(context_id, frame["message_id"])["status"] == frame["status"]
            elif frame.get("new_state") == "idle":
                assert api.context(context_id)["revision"] >= frame["revision"]
                break


def test_deltas_are_throttled_and_merged(api: Api, context_id: str) -> None:
    """At most one a throttle for a message: far fewer deltas than chunks, and the last is the head."""
    with api.stream(context_id, throttle_ms=1000) as stream:
        stream.current()
        api.send(context_id, script({"rate": 500}, {"repeat": 300, "text": "x"}))
        frames = stream.until(lambda f: f.type == "message_completed" and f["role"] == "assistant")
    check_live(frames)
    deltas = [f for f in frames if f.type == "content_delta" and f["role"] == "assistant"]
    assert 2 <= len(deltas) <= 4
    assert deltas[-1]["current_sequence"] == 300


def test_thinking_and_text_are_two_messages(api: Api, context_id: str) -> None:
    """Each of its own kind, and both are complete before the state that ends the turn."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        answer = api.send(context_id, script({"thinking": "let me see"}, {"text": "yes indeed"}))
        frames = stream.until_state("idle", after=answer["revision"])
    check_live(frames)
    kinds = [
        frame["kind"]
        for frame in frames
        if frame.type == "message_completed" and frame["role"] == "assistant"
    ]
    assert kinds == ["thinking", "text"]


def test_a_turn_without_a_word_is_seen_to_end(api: Api, context_id: str) -> None:
    """An empty message is completed at 0, without a delta before it (§4.2, §6)."""
    for text, status in ((SILENT, "cancelled"), (script({"error": "fatal"}), "failed")):
        with api.stream(context_id, throttle_ms=0) as stream:
            stream.current()
            answer = api.send(context_id, text)
            if status == "cancelled":
                api.in_state(context_id, "awaiting_llm_response")
                api.cancel(context_id)
            end = "idle" if status == "cancelled" else "failed"
            frames = stream.until_state(end, after=answer["revision"])
        check_live(frames)
        mine = [frame for frame in frames if frame.get("role") == "assistant"]
        assert types(mine) == ["message_completed"]
        assert (mine[0]["final_sequence"], mine[0]["status"]) == (0, status)


def test_a_change_of_the_record_is_signalled(api: Api, context_id: str) -> None:
    """state_changed with a newer record_revision, and the same state."""
    with api.stream(context_id) as stream:
        stream.current()
        context = api.http.patch(f"/contexts/{context_id}", json={"title": "new"}).json()
        (frame,) = stream.until(lambda f: f.type == "state_changed")
    assert frame["new_state"] == "idle"
    assert frame["revision"] == frame["record_revision"] == context["revision"]
    assert frame.id == context["stream_cursor"]


def test_the_queue_is_part_of_the_record(api: Api, context_id: str) -> None:
    """A message that queues gives a newer record_revision, and so does one that leaves it (§4)."""
    api.send(context_id, ENDLESS)
    api.opened(context_id)
    with api.stream(context_id, throttle_ms=0) as stream:
        (*_, state, _) = stream.current()
        queued = api.send(context_id, "queued")
        frames = stream.until(lambda f: f.type == "state_changed")
        assert frames[-1]["record_revision"] == frames[-1]["revision"] > state["record_revision"]
        api.http.post(f"/contexts/{context_id}/turns/{queued['turn_id']}/cancel")
        before = frames[-1]["record_revision"]
        frames = stream.until(lambda f: f.type == "state_changed")
        assert frames[-1]["record_revision"] > before
    api.cancel(context_id)


def test_no_signal_carries_text(api: Api) -> None:
    """No word of a message, a title or a prompt, and each frame under 1 KB with the longest ids."""
    id_ = ("long-id:" * 8)[:61] + ".c1"
    secret = "xyzzy"
    context_id = api.create(id=id_, title=secret, system_prompt=secret, metadata={secret: secret})
    message_id = "m" * 64
    with api.stream(context_id, throttle_ms=0, framing="named") as stream:
        frames = stream.current()
        answer = api.send(
            context_id,
            script({"text": f"{secret} {secret}"}, {"error": "fatal"}),
            message_id=message_id,
            client_metadata={secret: secret},
        )
        frames += stream.until_state("failed", after=answer["revision"])
    frames += api.attach(context_id, last_event_id="")
    assert len(frames) > 6
    for frame in frames:
        assert secret not in json.dumps(frame.fields)


def test_all_readers_hear_the_same_end(api: Api, context_id: str) -> None:
    """However many watch, with whatever throttle: each sees every completion and the last state."""
    results: dict[int, list[Frame]] = {}
    ready = threading.Barrier(6)

    def read(number: int) -> None:
        with api.stream(context_id, throttle_ms=number * 40) as stream:
            stream.current()
            ready.wait(20)
            results[number] = stream.until(
                lambda f: f.get("new_state") == "idle" and f["revision"] >= 11
            )

    readers = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(5)]
    for reader in readers:
        reader.start()
    ready.wait(20)
    api.run(context_id, SLOWLY)
    api.run(context_id, "again")
    for reader in readers:
        reader.join(20)
    expected = {message["id"] for message in api.messages(context_id)}
    assert len(expected) == 4
    for frames in results.values():
        check_live(frames)
        assert completed(frames) == expected
    assert len(results) == 5


def test_a_deleted_context_ends_its_streams(api: Api) -> None:
    """state_changed to `deleted`, then a clean end; idle or in the middle of a turn."""
    for text in (None, ENDLESS):
        context_id = api.create()
        if text is not None:
            api.send(context_id, text)
            api.opened(context_id)
        with api.stream(context_id) as stream:
            (*_, state, _) = stream.current()
            assert api.http.delete(f"/contexts/{context_id}").status_code == 204
            frames = list(stream)
        assert frames[-1].type == "state_changed"
        assert frames[-1]["new_state"] == "deleted"
        assert frames[-1]["revision"] > state["revision"]


# Attaching and coming back


def test_attaching_while_a_turn_runs(api: Api, context_id: str) -> None:
    """Without a cursor: the newest started turn's messages, open ones, the state, a heartbeat."""
    api.run(context_id, "earlier")
    api.send(context_id, script({"thinking": "hm hm "}, {"text": "on "}, {"delay_ms": 600_000}))
    until(lambda: len(api.context(context_id)["open_messages"]) == 2
          and api.context(context_id)["open_messages"][1]["current_sequence"] == 1)  # fmt: skip
    frames = api.attach(context_id)
    assert types(frames) == ["content_delta", "content_delta", "state_changed", "heartbeat"]
    assert [frame["kind"] for frame in frames[:2]] == ["thinking", "text"]
    assert [frame["current_sequence"] for frame in frames[:2]] == [2, 1]
    assert frames[2]["new_state"] == "streaming_llm_response"
    api.cancel(context_id)
    frames = api.attach(context_id)
    assert types(frames) == [
        "message_completed", "message_completed", "state_changed", "heartbeat",
    ]  # fmt: skip
    assert {frame["status"] for frame in frames[:2]} == {"cancelled"}


def test_attaching_without_a_cursor_never_names_a_users_message(api: Api, context_id: str) -> None:
    """Only what the assistant wrote in the newest started turn, not of the one that is queued."""
    answer, _ = api.run(context_id, "one")
    api.send(context_id, "a note", respond=False)
    frames = api.attach(context_id)
    (reply,) = api.replies(context_id, answer["turn_id"])
    assert types(frames) == ["message_completed", "state_changed", "heartbeat"]
    assert frames[0]["message_id"] == reply["id"]


def test_a_cursor_gives_what_changed_after_it(api: Api, context_id: str) -> None:
    """A signal for each message changed after it, by revision, of every role; then the state."""
    first = api.run(context_id, "one")[0]
    cursor = api.context(context_id)["stream_cursor"]
    assert types(api.attach(context_id, last_event_id=cursor)) == ["state_changed", "heartbeat"]
    second = api.run(context_id, "two")[0]
    third = api.run(context_id, "three")[0]
    frames = api.attach(context_id, last_event_id=cursor)
    check_order(frames)
    expected = [m["id"] for m in api.messages(context_id)][2:]
    assert [frame.get("message_id") for frame in frames[:-2]] == expected
    assert types(frames[-2:]) == ["state_changed", "heartbeat"]
    revisions = [frame["revision"] for frame in frames[:-1]]
    assert revisions == sorted(revisions)
    assert second["message_id"] in expected
    assert third["message_id"] in expected
    assert first["message_id"] not in expected


def test_the_header_and_the_parameter_are_the_same_cursor(api: Api, context_id: str) -> None:
    """Last-Event-ID as EventSource sends it; it is newer than the parameter of the same URL."""
    old = api.context(context_id)["stream_cursor"]
    api.run(context_id, "one")
    new = api.context(context_id)["stream_cursor"]
    by_header = {"last-event-id": old}
    with api.stream(context_id, headers=by_header) as stream:
        assert len(completed(stream.current())) == 2
    with api.stream(context_id, headers={"last-event-id": new}, last_event_id=old) as stream:
        assert completed(stream.current()) == set()


@pytest.mark.parametrize(
    "cursor",
    ["", "garbage", "0", "-1", "{0}-", "{0}-99999999", "{0}--1", "{0}-1.5", "other-1", "{0}-²", "x" * 500],
)
def test_an_unknown_cursor_is_the_very_beginning(
    api: Api, context_id: str, cursor: str
) -> None:
    """Another database, a future revision, garbage: one signal for each message, never an error."""
    api.run(context_id, "one")
    api.run(context_id, "two")
    database = api.context(context_id)["stream_cursor"].rpartition("-")[0]
    frames = api.attach(context_id, last_event_id=cursor.replace("{0}", database))
    assert [f["message_id"] for f in frames[:-2]] == [m["id"] for m in api.messages(context_id)]
    assert types(frames[-2:]) == ["state_changed", "heartbeat"]


def test_a_cursor_of_another_context_is_no_error(api: Api, context_id: str) -> None:
    """It counts as a position of this one or as unknown; the stream starts either way."""
    other = api.create()
    api.run(other, "a")
    api.run(context_id, "b")
    frames = api.attach(context_id, last_event_id=api.context(other)["stream_cursor"])
    assert frames[-1].type == "heartbeat"


def test_a_sends_cursor_gives_the_answer_and_all_after(api: Api, context_id: str) -> None:
    """stream_cursor of a send's answer: nothing of what the send wrote, everything that follows."""
    answer = api.send(context_id, "hello")
    api.ended(context_id, answer["turn_id"])
    (reply,) = api.replies(context_id, answer["turn_id"])
    frames = api.attach(context_id, last_event_id=answer["stream_cursor"])
    assert completed(frames) == {reply["id"]}


def test_a_lists_cursor_goes_on_where_the_list_ends(api: Api, context_id: str) -> None:
    """List, then attach with its cursor, and nothing is missed, though the model writes on."""
    api.send(context_id, SLOWLY)
    until(lambda: api.context(context_id)["open_messages"])
    page = api.page(context_id)
    with api.stream(context_id, last_event_id=page["stream_cursor"]) as stream:
        frames = stream.until_state("idle", after=page["revision"])
    check_order(frames)
    final = {m["id"]: m["final_sequence"] for m in api.messages(context_id)}
    told = {f["message_id"]: f["final_sequence"] for f in frames if f.type == "message_completed"}
    listed = {m["id"] for m in page["items"] if m["final_sequence"] is not None}
    assert told == {id_: n for id_, n in final.items() if id_ not in listed}


def test_every_id_is_a_place_from_which_nothing_is_missed(api: Api, context_id: str) -> None:
    """Cut the connection after any frame: what was seen and what comes next is everything (§4.1)."""
    with api.stream(context_id, throttle_ms=20) as stream:
        frames = stream.current()
        for text in (SLOWLY, script({"error": "transient", "times": 1}, {"text": "a b"}), "c"):
            api.send(context_id, text)
        revision = 0

        def last(frame: Frame) -> bool:
            return frame.get("new_state") == "idle" and frame["revision"] >= revision

        until(lambda: api.context(context_id)["queued_messages"] == 0)
        revision = api.in_state(context_id, "idle")["revision"]
        frames += stream.until(last)
    check_order(frames)
    ids = [frame.id for frame in frames if frame.id]
    assert len(ids) == len(set(ids))
    assert frames[-1].id == api.context(context_id)["stream_cursor"]
    everything = completed(api.attach(context_id, last_event_id=""))
    assert completed(frames) == everything
    for cut, frame in enumerate(frames):
        if frame.id is not None:
            after = api.attach(context_id, last_event_id=frame.id)
            assert completed(frames[: cut + 1]) | completed(after) == everything, frame
            assert after[-2]["revision"] >= max(
                [f["revision"] for f in frames[: cut + 1] if f.type == "state_changed"], default=0
            )


def test_many_messages_are_replayed_from_the_very_beginning(api: Api) -> None:
    """More than a page of them: each once, by revision, and ids on the way are good to go on from."""
    context_id = api.create()
    body = {"payload": {"type": "text", "content": "note"}, "respond": False}
    for _ in range(1100):
        assert api.http.post(f"/contexts/{context_id}/messages", json=body).status_code == 201
    frames = api.attach(context_id, last_event_id="garbage")
    check_order(frames)
    ids = [frame["message_id"] for frame in frames[:-2]]
    assert len(ids) == len(set(ids)) == 1100
    assert ids == [message["id"] for message in api.messages(context_id, limit=500)]
    middle = [n for n, frame in enumerate(frames[:-2]) if frame.id is not None]
    assert middle
    for place in middle:
        after = api.attach(context_id, last_event_id=frames[place].id)
        assert set(ids[: place + 1]) | completed(after) == set(ids)
        assert len(completed(after)) <= 1100 - place


def test_interrupted_messages_are_completed_like_any_other(api: Api, context_id: str) -> None:
    """A broken attempt's message is seen to end, as `interrupted`."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        broken = script({"text": "half a "}, {"error": "transient", "times": 1}, {"text": "whole"})
        answer = api.send(context_id, broken)
        frames = stream.until_state("idle", after=answer["revision"])
    check_live(frames)
    ends = [
        (frame["status"], frame["final_sequence"])
        for frame in frames
        if frame.type == "message_completed" and frame["role"] == "assistant"
    ]
    assert ends == [("interrupted", 2), ("completed", 3)]


def test_a_viewer_has_no_bearing_on_the_turn(api: Api, context_id: str) -> None:
    """Its connection goes in the middle; the turn goes on, and coming back tells the rest."""
    with api.stream(context_id, throttle_ms=0) as stream:
        stream.current()
        answer = api.send(context_id, SLOWLY)
        stream.until(lambda f: f.type == "content_delta" and f["role"] == "assistant")
    assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    frames = api.attach(context_id, last_event_id=answer["stream_cursor"])
    assert [frame["final_sequence"] for frame in frames if frame.type == "message_completed"] == [10]


def test_a_reader_that_closes_is_forgotten_within_a_second(make_server: Any) -> None:
    """The server's own figure goes back to 0, without anything having happened to the context."""
    server: Server = make_server()
    api = Api(server.url)
    context_id = api.create()

    def open_streams() -> float:
        lines = api.http.get("/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith("contextd_streams_open ")).split()[1])

    with httpx.Client(base_url=server.url) as one, one.stream(
        "GET", f"/contexts/{context_id}/stream"
    ) as response:
        assert response.status_code == 200
        until(lambda: open_streams() == 1)
    until(lambda: open_streams() == 0)
    api.close()


def test_a_stop_ends_every_stream_with_a_retry(make_server: Any) -> None:
    """A clean end after `retry:`, different for different readers, and the process exits (§4.2)."""
    server: Server = make_server()
    api = Api(server.url)
    context_id = api.create()
    api.send(context_id, ENDLESS)
    retries: list[Json] = []
    ready = threading.Barrier(9)

    def read() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as client, client.stream(
            "GET", f"/contexts/{context_id}/stream"
        ) as response:
            raw = b""
            for piece in response.iter_raw():
                if b'"heartbeat"' not in raw and b'"heartbeat"' in raw + piece:
                    ready.wait(20)
                raw += piece
            retries.append({"last": raw.rstrip(b"\n").split(b"\n\n")[-1].decode()})

    readers = [threading.Thread(target=read, daemon=True) for _ in range(8)]
    for reader in readers:
        reader.start()
    ready.wait(20)
    assert server.stop() == 0
    for reader in readers:
        reader.join(20)
    waits = [int(entry["last"].partition("retry:")[2]) for entry in retries]
    assert len(waits) == 8
    assert len(set(waits)) > 1
    api.close()
