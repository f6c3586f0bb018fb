"""§4.1 at the wire: attaching, coming back, and the end of streams."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from bodies import SLOWLY
from serving import Server
from signal_rules import check_live, check_order, completed, types
from wire import ENDLESS, Api, Frame, Json, script, until


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
    [
        "",
        "garbage",
        "0",
        "-1",
        "{0}-",
        "{0}-99999999",
        "{0}--1",
        "{0}-1.5",
        "other-1",
        "{0}-²",
        "x" * 500,
    ],
)
def test_an_unknown_cursor_is_the_very_beginning(api: Api, context_id: str, cursor: str) -> None:
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
    with ThreadPoolExecutor(8) as pool:
        sent = pool.map(lambda n: api.send(context_id, str(n), respond=False), range(620))
        assert len({answer["message_id"] for answer in sent}) == 620
    frames = api.attach(context_id, last_event_id="garbage")
    check_order(frames)
    ids = [frame["message_id"] for frame in frames[:-2]]
    assert len(ids) == len(set(ids)) == 620
    assert ids == [message["id"] for message in api.messages(context_id, limit=500)]
    middle = [n for n, frame in enumerate(frames[:-2]) if frame.id is not None]
    assert middle
    for place in middle:
        after = api.attach(context_id, last_event_id=frames[place].id)
        assert set(ids[: place + 1]) | completed(after) == set(ids)
        assert len(completed(after)) <= 620 - place


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
    assert [frame["final_sequence"] for frame in frames if frame.type == "message_completed"] == [
        10
    ]


@pytest.fixture(scope="module")
def lonely(make_server: Any) -> Server:
    """A server for the two tests that need one to themselves; the second stops it."""
    server: Server = make_server()
    return server


def test_a_reader_that_closes_is_forgotten_within_a_second(lonely: Server) -> None:
    """The server's own figure goes back to 0, without anything having happened to the context."""
    server = lonely
    api = Api(server.url)
    context_id = api.create()

    def open_streams() -> float:
        lines = api.http.get("/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith("contextd_streams_open ")).split()[1])

    with (
        httpx.Client(base_url=server.url) as one,
        one.stream("GET", f"/contexts/{context_id}/stream") as response,
    ):
        assert response.status_code == 200
        until(lambda: open_streams() == 1)
    gone_at = time.monotonic()
    until(lambda: open_streams() == 0)
    assert time.monotonic() - gone_at < 1
    api.close()


def test_a_stop_ends_every_stream_with_a_retry(lonely: Server) -> None:
    """A clean end after `retry:`, different for different readers, and the process exits (§4.2)."""
    server = lonely
    api = Api(server.url)
    context_id = api.create()
    api.send(context_id, ENDLESS)
    retries: list[Json] = []
    ready = threading.Barrier(9)

    def read() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=20) as client,
            client.stream("GET", f"/contexts/{context_id}/stream") as response,
        ):
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
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
    api.close()
