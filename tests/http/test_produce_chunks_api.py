"""§7 at the wire: appending chunks as JSON, and what readers see of them (§3.3, §4)."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bodies import MESSAGE_FIELDS
from producing import APPEND_FIELDS, Pen, numbered
from signal_rules import check_live, types
from wire import ENDLESS, TIMESTAMP, Api, Json, ok, problem, until

CHUNK_BYTES_MAX = 64 * 1024


@pytest.fixture
def pen(api: Api, context_id: str) -> Pen:
    """A message that was just opened, by `worker-1` in epoch 1."""
    pen = Pen(api, context_id)
    pen.open()
    return pen


# Appending


def test_chunks_are_stored_as_they_were_sent(pen: Pen) -> None:
    """200 with four fields; each chunk by itself, its text exactly."""
    answer = ok(pen.batch(*numbered(1, "He", "llo"), epoch=1))
    assert answer == {"message_id": "out", "sequence": 2, "accepted": 2, "duplicates": 0}
    assert set(answer) == APPEND_FIELDS
    odd = ["\n", " ", "🦊", "\u0001\u2028\u0085\ufeff\U0010ffff", "e\u0301", "\\u0000", '"']
    assert ok(pen.batch(*numbered(3, *odd), epoch=1))["sequence"] == 9
    assert pen.texts() == ["He", "llo", *odd]
    assert pen.pull()["content"] == "Hello" + "".join(odd)
    assert pen.message()["current_sequence"] == 9


def test_the_short_form_is_one_chunk(pen: Pen) -> None:
    """`content` alone, with its sequence, with the epoch."""
    assert ok(pen.post({"content": "a"}))["sequence"] == 1
    assert ok(pen.post({"content": "b", "sequence": 2}))["sequence"] == 2
    assert ok(pen.post({"content": "c", "sequence": 3, "epoch": 1}))["accepted"] == 1
    again = ok(pen.post({"content": "b", "sequence": 2, "epoch": 1}))
    assert (again["accepted"], again["duplicates"]) == (0, 1)
    assert pen.texts() == ["a", "b", "c"]


def test_without_sequences_the_server_numbers(pen: Pen) -> None:
    """From the head on, and the same text again is another chunk."""
    assert pen.write("a", "b")["sequence"] == 2
    assert pen.write("b") == {"message_id": "out", "sequence": 3, "accepted": 1, "duplicates": 0}
    assert ok(pen.batch(*numbered(4, "d"), {"content": "e"}))["sequence"] == 5
    assert pen.texts() == ["a", "b", "b", "d", "e"]


def test_without_an_epoch_a_write_is_unfenced(pen: Pen) -> None:
    """It is taken whoever holds the message by now."""
    ok(pen.put(producer={"id": "worker-2", "epoch": 7}))
    assert ok(pen.batch(*numbered(1, "a")))["sequence"] == 1
    assert ok(pen.post({"content": "b"}))["sequence"] == 2
    assert ok(pen.complete())["epoch"] == 7


def test_an_append_is_no_change_of_the_context(pen: Pen) -> None:
    """No revision, no transition, nothing changed since; the message's end is one again."""
    before = pen.api.context(pen.context_id)
    journal = pen.api.journal(pen.context_id)
    for n in range(5):
        ok(pen.batch(*numbered(2 * n + 1, "a", "b"), epoch=1))
    after = pen.api.context(pen.context_id)
    assert after["open_messages"][0].pop("current_sequence") == 10
    assert before["open_messages"][0].pop("current_sequence") == 0
    assert after == before
    assert pen.api.journal(pen.context_id) == journal
    assert pen.api.messages(pen.context_id, since_revision=before["revision"]) == []
    ok(pen.complete())
    assert pen.api.context(pen.context_id)["revision"] == before["revision"] + 1
    changed = pen.api.messages(pen.context_id, since_revision=before["revision"])
    assert [m["id"] for m in changed] == ["out"]


# Saying it again


def test_a_retry_is_harmless(pen: Pen) -> None:
    """The same text again counts as a duplicate: whole, the older part, and overlapping."""
    ok(pen.batch(*numbered(1, "a", "b", "c"), epoch=1))
    for chunks, accepted, duplicates, head in (
        (numbered(1, "a", "b", "c"), 0, 3, 3),
        (numbered(2, "b"), 0, 1, 3),
        (numbered(2, "b", "c", "d"), 1, 2, 4),
        (numbered(1, "a"), 0, 1, 4),
        (numbered(5, "e"), 1, 0, 5),
    ):
        answer = ok(pen.batch(*chunks, epoch=1))
        assert (answer["accepted"], answer["duplicates"]) == (accepted, duplicates)
        assert answer["sequence"] == head
    assert pen.texts() == ["a", "b", "c", "d", "e"]
    assert pen.message()["current_sequence"] == 5


@pytest.mark.parametrize(
    ("chunks", "accepted", "duplicates"),
    [
        ([*numbered(3, "c"), *numbered(3, "c")], 1, 1),
        ([*numbered(3, "c", "d"), *numbered(3, "c")], 2, 1),
        ([*numbered(2, "b"), *numbered(1, "a"), *numbered(3, "c")], 1, 2),
        ([{"content": "c"}, *numbered(3, "c")], 1, 1),
        ([*numbered(1, "a"), {"content": "c"}], 1, 1),
    ],
)
def test_a_batch_is_judged_chunk_by_chunk(
    pen: Pen, chunks: list[Json], accepted: int, duplicates: int
) -> None:
    """In its order: what stands earlier in the batch counts as stored."""
    pen.write("a", "b")
    answer = ok(pen.batch(*chunks))
    assert (answer["accepted"], answer["duplicates"]) == (accepted, duplicates)
    assert answer["sequence"] == 2 + accepted
    assert pen.texts() == ["a", "b", "c", "d"][: 2 + accepted]


@pytest.mark.parametrize(
    ("chunks", "code", "fact"),
    [
        (numbered(4, "d"), "sequence_gap", 3),
        (numbered(2**53 - 1, "d"), "sequence_gap", 3),
        ([*numbered(4, "d"), *numbered(3, "c")], "sequence_gap", 3),
        (numbered(2, "B"), "sequence_conflict", 2),
        (numbered(1, "a", "B", "c"), "sequence_conflict", 2),
        (numbered(1, "A", "B"), "sequence_conflict", 1),
        (numbered(1, "a "), "sequence_conflict", 1),
        ([*numbered(3, "c"), *numbered(3, "C")], "sequence_conflict", 3),
        ([*numbered(3, "c", "d"), *numbered(2, "B")], "sequence_conflict", 2),
        ([{"content": "c"}, *numbered(2, "B")], "sequence_conflict", 2),
        ([*numbered(2, "B"), *numbered(9, "x")], "sequence_conflict", 2),
        ([*numbered(9, "x"), *numbered(2, "B")], "sequence_gap", 3),
    ],
)
def test_a_refused_batch_stores_nothing(pen: Pen, chunks: list[Json], code: str, fact: int) -> None:
    """409 sequence_gap for a hole, sequence_conflict for other text: all or nothing."""
    pen.write("a", "b")
    before = pen.held()
    refusal = problem(pen.batch(*chunks, epoch=1), 409, code)
    name = "expected_sequence" if code == "sequence_gap" else "sequence"
    assert refusal[name] == fact
    assert pen.held() == before
    assert ok(pen.batch(*numbered(3, "c"), epoch=1))["sequence"] == 3


def test_a_hole_inside_a_batch_stores_nothing(pen: Pen) -> None:
    """Also where the chunks before the hole would have fitted; writing on works."""
    before = pen.held()
    problem(pen.batch(*numbered(1, "a", "b"), *numbered(4, "d")), 409, "sequence_gap")
    assert pen.held() == before
    assert ok(pen.batch(*numbered(1, "a", "b", "c", "d")))["accepted"] == 4


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_after_the_close_only_a_repeat_is_answered(pen: Pen, end: str) -> None:
    """All stored: 200. Anything new, or other text: 409 with how and where it closed."""
    ok(pen.batch(*numbered(1, "a", "b", "c"), epoch=1))
    if end == "cancel":
        pen.api.cancel(pen.context_id)
    else:
        ok(pen.complete() if end == "complete" else pen.fail())
    before = pen.held()
    for chunks in (numbered(1, "a", "b", "c"), numbered(3, "c")):
        for epoch in ({"epoch": 1}, {}):
            answer = ok(pen.batch(*chunks, **epoch))
            assert (answer["accepted"], answer["duplicates"]) == (0, len(chunks))
            assert answer["sequence"] == 3
    for body in (
        {"epoch": 1, "chunks": numbered(3, "c", "d")},
        {"epoch": 1, "chunks": numbered(4, "d")},
        {"content": "d", "epoch": 1},
        {"content": "c"},
        {"content": "d"},
    ):
        refusal = problem(pen.post(body), 409, "message_closed")
        assert refusal["message_status"] == before[1]["status"]
        assert refusal["final_sequence"] == 3
    assert pen.batch(*numbered(3, "C")).status_code == 409
    assert pen.held() == before


# Many at once


def test_simultaneous_writers_share_one_numbering(pen: Pen) -> None:
    """Unnumbered and unfenced: every chunk once, dense, each batch together."""

    def write(n: int) -> Json:
        return ok(pen.batch({"content": f"{n}:0 "}, {"content": f"{n}:1 "}))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(write, range(100)))
    assert sorted(answer["sequence"] for answer in answers) == list(range(2, 201, 2))
    texts = pen.texts()
    for n, answer in enumerate(answers):
        place = answer["sequence"] - 2
        assert texts[place : place + 2] == [f"{n}:0 ", f"{n}:1 "]


def test_simultaneous_retries_store_once(pen: Pen) -> None:
    """A producer that has heard no answer and repeats: no refusal, and each chunk is new once."""
    for first in range(1, 60, 3):
        with ThreadPoolExecutor(4) as pool:
            chunks = numbered(first, "a", "b", "c")
            answers = list(pool.map(lambda c: ok(pen.batch(*c, epoch=1)), [chunks] * 4))
        assert sum(answer["accepted"] for answer in answers) == 3
        assert sum(answer["duplicates"] for answer in answers) == 9
    assert pen.texts() == ["a", "b", "c"] * 20


def test_a_refusal_leaves_its_neighbours_alone(pen: Pen) -> None:
    """Good and bad batches to many messages at once: each is answered for itself."""
    pens = [pen.other(f"m{n}") for n in range(8)]
    for each in pens:
        each.open()

    def write(job: tuple[Pen, int]) -> Any:
        each, n = job
        if n % 2:
            return each.batch(*numbered(999, "gap")).status_code
        return each.batch({"content": "x"}).status_code

    jobs = [(each, n) for n in range(20) for each in pens]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(write, jobs))
    assert statuses == [409 if n % 2 else 200 for _, n in jobs]
    assert [each.texts() for each in pens] == [["x"] * 10] * 8


# What readers see


def test_appends_are_signalled_and_can_be_pulled(pen: Pen) -> None:
    """A content_delta at each position that can be pulled then; at the end message_completed."""
    with pen.api.stream(pen.context_id, throttle_ms=0) as stream:
        frames = stream.current()
        assert types(frames) == ["content_delta", "state_changed", "heartbeat"]
        held = ""
        for n in range(1, 6):
            pen.write(f"{n} ")
            frames += stream.until(lambda f, n=n: f.get("current_sequence") == n)
            answer = pen.pull(from_sequence=n - 1)
            assert (answer["sequence"], answer["final"]) == (n, False)
            held += answer["content"]
        ok(pen.complete())
        frames += stream.until_state("idle")
    check_live(frames)
    assert held == "1 2 3 4 5 "
    end, state = frames[-2:]
    assert end.type == "message_completed"
    assert (end["message_id"], end["final_sequence"], end["status"]) == ("out", 5, "completed")
    assert (end["role"], end["kind"]) == ("assistant", "text")
    assert end["revision"] == state["revision"] == pen.api.context(pen.context_id)["revision"]
    states = [f["new_state"] for f in frames if f.type == "state_changed"]
    assert states == ["producing", "idle"]
    assert types(pen.api.attach(pen.context_id)) == ["state_changed", "heartbeat"]


def test_a_duplicate_is_not_signalled(pen: Pen) -> None:
    """Nothing changed, so the next delta is the next new position."""
    pen.write("a", "b")
    with pen.api.stream(pen.context_id, throttle_ms=0) as stream:
        stream.current()
        ok(pen.batch(*numbered(1, "a", "b")))
        pen.write("c")
        (frame,) = stream.until(lambda f: f.type == "content_delta")
        assert frame["current_sequence"] == 3


def test_a_cursor_tells_of_what_was_produced_since(pen: Pen) -> None:
    """Open messages at their head, closed ones at their end, in the order of their revisions."""
    cursor = pen.api.context(pen.context_id)["stream_cursor"]
    other = pen.other("other")
    other.open()
    pen.write("a", "b")
    other.write("c")
    ok(other.complete())
    frames = pen.api.attach(pen.context_id, last_event_id=cursor)
    assert types(frames) == ["message_completed", "content_delta", "state_changed", "heartbeat"]
    assert (frames[0]["message_id"], frames[0]["final_sequence"]) == ("other", 1)
    assert (frames[1]["message_id"], frames[1]["current_sequence"]) == ("out", 2)
    everything = pen.api.attach(pen.context_id, last_event_id="")
    assert {f.get("message_id") for f in everything[:-2]} == {"out", "other"}


def test_a_pull_waits_for_a_producer(pen: Pen) -> None:
    """Until there is something, and until the end: also of a message that stays empty."""
    empty = pen.other("empty")
    empty.open()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(pen.pull, wait=30)
        nothing = pool.submit(empty.pull, wait=30)
        pen.write("a")
        answer = first.result(timeout=20)
        assert (answer["content"], answer["sequence"], answer["final"]) == ("a", 1, False)
        last = pool.submit(pen.pull, from_sequence=1, wait=30)
        ok(pen.complete())
        ok(empty.fail())
        for pulled, sequence in ((last, 1), (nothing, 0)):
            answer = pulled.result(timeout=20)
            assert (answer["content"], answer["sequence"], answer["final"]) == ("", sequence, True)


def test_pulls_of_every_form(pen: Pen) -> None:
    """Plain text with its headers, ranges, single chunks; a range that is reached stays cached."""
    pen.write("Grüße ", "🦊", "\n")
    plain = {"accept": "text/plain"}
    response = pen.api.get_content(pen.context_id, "out", from_sequence=1, headers=plain)
    assert response.content.decode() == "🦊\n"
    assert response.headers["contextd-sequence"] == "3"
    assert response.headers["contextd-head-sequence"] == "3"
    assert response.headers["contextd-status"] == "streaming"
    assert response.headers["contextd-final"] == "false"
    assert response.headers["cache-control"] == "no-cache"
    reached = pen.api.get_content(pen.context_id, "out", from_sequence=1, to_sequence=2)
    assert reached.json()["content"] == "🦊"
    assert "immutable" in reached.headers["cache-control"]
    page = pen.api.chunks(pen.context_id, "out", from_sequence=1)
    assert [(c["sequence"], c["content"]) for c in page["chunks"]] == [(2, "🦊"), (3, "\n")]
    assert all(TIMESTAMP.fullmatch(c["created_at"]) for c in page["chunks"])
    assert (page["head_sequence"], page["status"], page["final"]) == (3, "streaming", False)
    etag = response.headers["etag"]
    ok(pen.complete())
    closed = pen.api.get_content(
        pen.context_id, "out", from_sequence=1, headers={**plain, "if-none-match": etag}
    )
    assert closed.status_code == 200
    assert closed.headers["contextd-final"] == "true"
    assert closed.headers["contextd-status"] == "completed"
    assert "immutable" in closed.headers["cache-control"]


def test_lists_hold_the_text_of_what_is_being_produced(pen: Pen) -> None:
    """include=content: exactly chunks 1 to content_sequence, of open and closed messages."""
    pen.write("a", "b")
    (item,) = pen.api.messages(pen.context_id, include="content")
    assert set(item) == MESSAGE_FIELDS | {"epoch", "content", "content_sequence"}
    assert (item["content"], item["content_sequence"], item["status"]) == ("ab", 2, "streaming")
    pen.write("c")
    ok(pen.complete())
    (item,) = pen.api.messages(pen.context_id, include="content")
    assert (item["content"], item["content_sequence"], item["final_sequence"]) == ("abc", 3, 3)


# Where nothing can be appended


def test_what_is_not_there_is_404(pen: Pen) -> None:
    """The message and the context by their own codes, on every route."""
    for each, code, fact in (
        (pen.other("no"), "message_not_found", ("message_id", "no")),
        (Pen(pen.api, "no-such"), "context_not_found", ("context_id", "no-such")),
    ):
        for response in (
            each.post({"content": "x"}),
            each.lines(b'{"content":"x"}\n'),
            each.complete(),
            each.fail(),
        ):
            assert problem(response, 404, code)[fact[0]] == fact[1]


def test_only_a_produced_message_can_be_appended_to(api: Api, context_id: str) -> None:
    """409 for a turn's open message and for closed ones of the server's; nothing is stored."""
    api.send(context_id, ENDLESS, message_id="sent")
    until(lambda: api.opened(context_id)["current_sequence"] == 3)
    reply = Pen(api, context_id, api.opened(context_id)["message_id"])
    sent = Pen(api, context_id, "sent")
    before = reply.held()
    for each in (reply, sent):
        for response in (
            each.post({"content": "x"}),
            each.post({"content": "x", "epoch": 1}),
            each.lines(b'{"content":"x"}\n'),
            each.complete(),
            each.fail(),
        ):
            assert response.status_code == 409, response.text
            assert response.json()["code"] in ("context_busy", "message_closed")
    assert reply.held() == before
    assert sent.texts() == [ENDLESS]
    api.cancel(context_id)
    problem(reply.post({"content": "x"}), 409, "message_closed")
