"""§4 and §4.2 at the wire: the stream itself, live signals and their order."""

import json
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from bodies import SLOWLY
from signal_rules import check_live, check_order, completed, types
from wire import ENDLESS, SILENT, Api, Frame, invalid, problem, script, until

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


def test_the_last_delta_goes_a_throttle_before_the_completion(api: Api, context_id: str) -> None:
    """At least throttle_ms before it: time for a client to pull on the delta."""
    with api.stream(context_id, throttle_ms=400) as stream:
        stream.current()
        answer = api.send(context_id, "one two three")
        at = {}
        for frame in stream:
            if frame.get("role") == "assistant":
                at[frame.type] = time.monotonic()
            if frame.get("new_state") == "idle" and frame["revision"] > answer["revision"]:
                break
    # Half of it, as a busy reader may take the first late and the second at once.
    assert at["message_completed"] - at["content_delta"] >= 0.2


def test_a_reader_may_attach_at_any_moment(api: Api, context_id: str) -> None:
    """While the model writes as fast as it can: no gap between what is told first and what is live."""
    text = script(
        *({"rate": 300}, {"repeat": 30, "text": "a "}, {"thinking": "hm hm hm"}) * 3,
        {"error": "transient", "times": 1},
    )
    answer = api.send(context_id, text)
    cursor = answer["stream_cursor"]

    def read(number: int) -> list[Frame]:
        time.sleep(number * 0.03)  # spreads the attaching; nothing waits for this
        params = {"last_event_id": cursor} if number % 2 else {}
        with api.stream(context_id, throttle_ms=number % 3 * 20, **params) as stream:
            return stream.until(
                lambda f: f.get("new_state") == "idle" and f["revision"] > answer["revision"]
            )

    with ThreadPoolExecutor(16) as pool:
        streams = list(pool.map(read, range(16)))
    everything = {m["id"] for m in api.replies(context_id, answer["turn_id"])}
    assert len(everything) == 12
    for number, frames in enumerate(streams):
        check_order(frames)
        if number % 2:
            assert completed(frames) == everything
        else:  # of the newest turn, which is this one
            assert completed(frames) == everything, number


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
