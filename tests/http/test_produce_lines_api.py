"""§7 at the wire: a body of NDJSON that stays open as long as the answer is being written."""

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from producing import APPEND_FIELDS, NDJSON, Pen, lines, numbered
from signal_rules import check_live
from wire import Api, Json, ok, problem, until

CHUNK_BYTES_MAX = 64 * 1024
OTHER = {"id": "worker-2", "epoch": 2}
MIB = 1024 * 1024


@pytest.fixture
def pen(api: Api, context_id: str) -> Pen:
    """A message that was just opened, by `worker-1` in epoch 1."""
    pen = Pen(api, context_id)
    pen.open()
    return pen


def refused_line(response: httpx.Response, status: int, code: str, line: int) -> Json:
    """A problem that says at which line the body was refused, and a sequence."""
    refusal = problem(response, status, code)
    assert refusal["line"] == line, refusal
    assert isinstance(refusal["sequence"], int), refusal
    return refusal


# Lines


def test_lines_are_chunks(pen: Pen) -> None:
    """The answer is that of an append, over all lines; the message stays open."""
    answer = ok(pen.lines(lines({"content": "He"}, {"content": "llo"})))
    assert answer == {"message_id": "out", "sequence": 2, "accepted": 2, "duplicates": 0}
    assert set(answer) == APPEND_FIELDS
    again = ok(pen.lines(lines({"epoch": 1}, *numbered(2, "llo", "!"))))
    assert (again["sequence"], again["accepted"], again["duplicates"]) == (3, 1, 1)
    assert pen.texts() == ["He", "llo", "!"]
    assert pen.message()["status"] == "streaming"


def test_a_last_line_completes(pen: Pen) -> None:
    """With finish_reason and usage, or with neither; the same body again is answered the same way."""
    ending = {"finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
    body = lines({"epoch": 1}, *numbered(1, "a", "b"), {"complete": ending})
    assert ok(pen.lines(body))["accepted"] == 2
    message = pen.message()
    assert (message["status"], message["final_sequence"]) == ("completed", 2)
    assert message["finish_reason"] == "stop"
    assert message["usage"] == ending["usage"]
    assert pen.api.context(pen.context_id)["state"] == "idle"
    again = ok(pen.lines(body))
    assert (again["sequence"], again["accepted"], again["duplicates"]) == (2, 0, 2)
    assert pen.message() == message
    other = pen.other("empty")
    other.open()
    assert ok(other.lines(lines({"complete": {}})))["sequence"] == 0
    assert (other.message()["status"], other.message()["final_sequence"]) == ("completed", 0)


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (b'{"content":"a"}\r\n{"content":"b"}\r\n', ["a", "b"]),
        (b'{"content":"a"}\n{"content":"b"}', ["a", "b"]),
        (b'{"content":"a"}\r\n{"content":"b"}\r', ["a", "b"]),
        (b'\n\r\n  \n{"content":"a"}\n\n \t\r\n{"content":"b"}\n\n', ["a", "b"]),
        (b' {"content" : "a"} \n\t{ "content":"b" }\t\n', ["a", "b"]),
        (b'\n{"epoch":1}\n\n{"content":"a"}\n', ["a"]),
        (b'{"epoch":1}\n', []),
        (b'{"content":"a"}\n{"complete":{}}\n\n\r\n', ["a"]),
        ('{"content":"a\u2028b\u2029c\u0085d\ufeff"}\n'.encode(), ["a\u2028b\u2029c\u0085d\ufeff"]),
        (b'{"content":"\\n\\r\\n"}\n', ["\n\r\n"]),
        (b'{"content":"\\ud83e\\udd8a"}\n', ["🦊"]),
    ],
)
def test_every_form_of_lines_is_read(pen: Pen, body: bytes, texts: list[str]) -> None:
    """Either line end, none at the last line, blank lines; only a line feed ends a line."""
    answer = ok(pen.lines(body))
    assert (answer["accepted"], answer["duplicates"]) == (len(texts), 0)
    assert pen.texts() == texts


def test_a_body_byte_by_byte(pen: Pen) -> None:
    """However the bytes are cut: characters, line ends and numbers come out whole."""
    texts = ["Grüße ", "🦊", "…\n", "é\u0301"]
    documents = [{"epoch": 1}, *numbered(1, *texts)]
    body = b"".join(
        json.dumps(document, ensure_ascii=False).encode() + b"\r\n" for document in documents
    )
    with pen.body() as open_body:
        for n in range(len(body)):
            open_body.piece(body[n : n + 1])
        assert ok(open_body.end())["accepted"] == 4
    assert pen.texts() == texts


def test_more_lines_than_a_batch_may_have(pen: Pen) -> None:
    """A body has no limit of chunks: 5,000, in order, for who reads meanwhile too."""
    texts = [f"{n} " for n in range(5000)]
    body = lines({"epoch": 1}, *numbered(1, *texts), {"complete": {}})
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(Api(pen.api.url).text, pen.context_id, "out")
        assert ok(pen.lines(body))["accepted"] == 5000
        assert reading.result(timeout=20) == "".join(texts)
    assert pen.message()["final_sequence"] == 5000


@pytest.mark.parametrize(
    "type_",
    ["Application/X-NDJSON", "application/x-ndjson; charset=utf-8", "APPLICATION/X-NDJSON;"],
)
def test_the_media_type_is_read_as_http_says(pen: Pen, type_: str) -> None:
    """Without regard to case, with parameters."""
    assert ok(pen.lines(lines({"content": "a"}, {"content": "b"}), type_))["accepted"] == 2


def test_a_compressed_body_is_not_taken_for_text(pen: Pen) -> None:
    """Nothing here decodes a Content-Encoding: it is refused, whatever would have come out."""
    packed = gzip.compress(lines({"content": "a"}))
    response = pen.lines(packed, **{"content-encoding": "gzip"})
    assert response.status_code in (400, 415), response.text
    assert pen.texts() == []


# A body that is open


def test_lines_are_visible_while_the_body_is_open(pen: Pen) -> None:
    """Durable, signalled and pulled as they come; the answer comes at the end."""
    with pen.api.stream(pen.context_id, throttle_ms=0) as stream, pen.body() as body:
        frames = stream.current()
        body.line(epoch=1)
        for n, text in enumerate(("one ", "two ", "three"), 1):
            body.line(content=text)
            frames += stream.until(lambda f, n=n: f.get("current_sequence") == n)
            assert pen.pull(from_sequence=n - 1)["content"] == text
            assert not body.answered()
        body.line(complete={})
        frames += stream.until_state("idle")
        assert ok(body.end())["accepted"] == 3
        check_live(frames)
    assert pen.message()["status"] == "completed"


def test_a_character_that_is_cut_waits_for_its_rest(pen: Pen) -> None:
    """Two pieces, with a line before them that has been seen: half a line is never stored."""
    with pen.body() as body:
        first, second = '{"content":"ü"}\n'.encode().split(b"\xbc")
        body.piece(b'{"content":"a"}\n' + first)
        pen.reached(1)
        body.piece(b"\xbc" + second)
        pen.reached(2)
        assert pen.texts() == ["a", "ü"]
        assert ok(body.end())["sequence"] == 2


def test_the_connection_is_kept_after_an_answer(pen: Pen) -> None:
    """A producer that writes message after message needs one connection; curl waits for 100."""
    with pen.body(Expect="100-continue") as body:
        assert body.socket.recv(4096).startswith(b"HTTP/1.1 100 ")
        body.line(content="a")
        assert ok(body.end())["accepted"] == 1
        request = f"GET {pen.path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        body.socket.sendall(request.encode())
        assert ok(body.answer())["current_sequence"] == 1


def test_two_bodies_at_once_share_one_numbering(pen: Pen) -> None:
    """Unfenced and unnumbered: every line once, each writer's in its order."""

    def write(name: str) -> Json:
        documents = [{"content": f"{name}{n} "} for n in range(200)]
        return ok(pen.lines(lines(*documents)))

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(write, "abc"))
    assert [answer["accepted"] for answer in answers] == [200] * 3
    texts = pen.texts()
    assert len(texts) == 600
    for name in "abc":
        assert [text for text in texts if text[0] == name] == [f"{name}{n} " for n in range(200)]


# A body that breaks


def test_what_was_committed_before_a_break_stays(pen: Pen) -> None:
    """Half a line is not stored; GET tells where to go on, and another body goes on there."""
    with pen.body() as body:
        body.piece(lines({"epoch": 1}, *numbered(1, "a", "b")) + b'{"sequence":3,"content":"ha')
        pen.reached(2)
        body.cut()
    assert pen.message()["current_sequence"] == 2
    assert ok(pen.lines(lines({"epoch": 1}, *numbered(2, "b", "whole"))))["accepted"] == 1
    assert pen.texts() == ["a", "b", "whole"]
    assert pen.message()["status"] == "streaming"


def test_a_body_shorter_than_it_said_stores_no_half_line(pen: Pen) -> None:
    """With a Content-Length that does not come true: as any broken connection."""
    whole = lines({"content": "a"})
    with pen.body(Content_Length="500", Transfer_Encoding=None) as body:
        body.socket.sendall(whole + b'{"content":"h')
        pen.reached(1)
        body.cut()
    assert ok(pen.post({"content": "b", "sequence": 2}))["accepted"] == 1
    assert pen.texts() == ["a", "b"]


# Bad lines


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"nonsense",
        b"[]",
        b'"x"',
        b"5",
        b"null",
        b"{}",
        b'{"content":""}',
        b'{"content":5}',
        b'{"content":null}',
        b'{"content":"\\u0000"}',
        b'{"content":"\\ud800"}',
        b'{"content":"\xff"}',
        b'{"content":"a\x01"}',
        b'{"content":"x","sequence":0}',
        b'{"content":"x","sequence":"3"}',
        b'{"content":"x","sequence":3.5}',
        b'{"content":"x","colour":"red"}',
        b'{"content":"x","complete":{}}',
        b'{"content":"x","epoch":1}',
        b'{"sequence":3}',
        b'{"epoch":1}',
        b'{"complete":null}',
        b'{"complete":{"colour":1}}',
        b'{"complete":{"finish_reason":5}}',
        b'{"complete":{"usage":"much"}}',
        b'{"content":"x"} {"content":"y"}',
        b'{"content":"x"},',
        b"[" * 5000,
    ],
)
def test_a_bad_line_ends_the_body(pen: Pen, line: bytes) -> None:
    """400 with its number; what came before it stays, what comes after it is not looked at."""
    body = lines(*numbered(1, "a", "b")) + line + b"\n" + lines(*numbered(3, "c"))
    refusal = refused_line(pen.lines(body), 400, "invalid_request", 3)
    assert refusal["errors"]
    assert pen.texts() == ["a", "b"]
    assert pen.message()["status"] == "streaming"


@pytest.mark.parametrize(
    "line", [b'{"epoch":0}', b'{"epoch":"1"}', b'{"epoch":1,"content":"x"}', b"x"]
)
def test_a_bad_first_line_stores_nothing(pen: Pen, line: bytes) -> None:
    """An epoch stands by itself, and is one."""
    refused_line(pen.lines(line + b"\n" + lines({"content": "x"})), 400, "invalid_request", 1)
    assert pen.texts() == []


@pytest.mark.parametrize("after", [{"content": "x"}, {"complete": {}}, {"epoch": 1}, 5])
def test_nothing_follows_the_completing_line(pen: Pen, after: object) -> None:
    """400: `complete` is the last line; what came before stays."""
    body = lines({"content": "a"}, {"complete": {}}, after)
    refused_line(pen.lines(body), 400, "invalid_request", 3)
    assert pen.texts() == ["a"]


def test_blank_lines_count_as_lines(pen: Pen) -> None:
    """`line` is the one that an editor would show."""
    refused_line(pen.lines(b'\n\n{"content":"a"}\r\n\r\nbad\n'), 400, "invalid_request", 5)
    assert pen.texts() == ["a"]


# Refused lines


@pytest.mark.parametrize(
    ("chunk", "code", "fact"),
    [
        ({"sequence": 7, "content": "x"}, "sequence_gap", ("expected_sequence", 6)),
        ({"sequence": 2, "content": "B"}, "sequence_conflict", ("sequence", 2)),
    ],
)
def test_a_refused_line_is_refused_alone(
    pen: Pen, chunk: Json, code: str, fact: tuple[str, int]
) -> None:
    """Its own 409 with the facts; though they came together, the lines before it stay."""
    body = lines({"epoch": 1}, *numbered(1, *"abcde"), chunk, *numbered(6, "f"))
    refusal = refused_line(pen.lines(body), 409, code, 7)
    assert refusal[fact[0]] == fact[1]
    assert pen.texts() == list("abcde")


def test_a_stale_epoch_is_refused_at_once(pen: Pen) -> None:
    """With the current one, also where nothing follows it; nothing is stored."""
    ok(pen.put(producer={"id": "worker-2", "epoch": 4}))
    refusal = refused_line(pen.lines(lines({"epoch": 1})), 409, "stale_producer", 1)
    assert refusal["epoch"] == 4
    with pen.body() as body:
        body.piece(lines({"epoch": 1}, {"content": "x"}))
        refusal = problem(body.answer(), 409, "stale_producer")
        assert refusal["epoch"] == 4
        assert refusal["line"] in (1, 2)
    assert pen.texts() == []


def test_a_refusal_comes_before_the_body_ends(pen: Pen) -> None:
    """And closes the connection, since the rest of the body would be taken for a request."""
    with pen.body() as bad, pen.body() as refused:
        bad.piece(lines({"content": "a"}) + b"bad\n")
        refused.piece(lines({"content": "a"}, *numbered(9, "x")))
        for body, status in ((bad, 400), (refused, 409)):
            response = body.answer()
            assert response.status_code == status
            assert response.json()["line"] == 2
            assert response.headers["connection"] == "close"
        assert bad.is_closed()
        assert refused.is_closed()


def test_a_refusal_can_be_read_by_a_client_that_sends_on(pen: Pen) -> None:
    """The answer is there although the client wrote more: no reset on the way to it."""
    rest = lines(*numbered(2, *["x" * 1000] * 64))
    with pen.body() as body:
        body.piece(lines(*numbered(1, "a")) + b"bad\n")
        for _ in range(32):
            body.try_piece(rest)
        refused_line(body.answer(), 400, "invalid_request", 2)

    def pieces() -> Iterator[bytes]:
        yield lines(*numbered(5, "x"))
        for _ in range(100):
            yield rest

    path, type_ = f"{pen.path}/chunks", {"content-type": NDJSON}
    response = pen.api.http.post(path, content=pieces(), headers=type_)
    assert refused_line(response, 409, "sequence_gap", 1)["expected_sequence"] == 2
    assert pen.texts() == ["a"]


def test_a_refusal_always_names_its_line(pen: Pen) -> None:
    """Also where a take-over comes between a batch that has a hole and what stands before it."""
    for n in range(20):
        each = pen.other(f"m{n}")
        each.open()
        body = lines({"epoch": 1}, *[{"content": "x"}] * 300, *numbered(999, "hole"))
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(Pen(Api(pen.api.url), pen.context_id, f"m{n}").put, producer=OTHER)
            refusal = each.lines(body).json()
            ok(taking.result())
        head = each.message()["current_sequence"]
        assert (refusal["line"], refusal["sequence"]) == {
            "sequence_gap": (302, 999),
            "stale_producer": (head + 2, head + 1),
        }[refusal["code"]]


def test_a_take_over_ends_the_body(pen: Pen) -> None:
    """The next line is refused with the new epoch, before the body ends; an unfenced one goes on."""
    with pen.body() as fenced, pen.body() as unfenced:
        fenced.piece(lines({"epoch": 1}, {"content": "a"}))
        pen.reached(1)
        ok(pen.put(producer={"id": "worker-2", "epoch": 2}))
        ok(pen.post({"epoch": 2, "content": "b"}))
        fenced.line(content="x")
        refusal = refused_line(fenced.answer(), 409, "stale_producer", 3)
        assert refusal["epoch"] == 2
        unfenced.line(content="c")
        assert ok(unfenced.end())["sequence"] == 3
    assert pen.texts() == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["cancel", "complete", "fail"])
def test_a_close_by_another_ends_the_body(pen: Pen, how: str) -> None:
    """The next line gets 409 message_closed, before the body ends; what was written stays."""
    with pen.body() as body:
        body.piece(lines({"epoch": 1}, {"content": "a"}))
        pen.reached(1)
        if how == "cancel":
            pen.api.cancel(pen.context_id)
        else:
            ok(pen.complete() if how == "complete" else pen.fail())
        body.line(content="b")
        refusal = refused_line(body.answer(), 409, "message_closed", 3)
        assert refusal["message_status"] == pen.message()["status"]
        assert refusal["final_sequence"] == 1
    assert pen.texts() == ["a"]


def test_a_deleted_context_ends_the_body(pen: Pen) -> None:
    """404 at the next line, before the body ends."""
    with pen.body() as body:
        body.line(content="a")
        pen.reached(1)
        assert pen.api.http.delete(f"/contexts/{pen.context_id}").status_code == 204
        body.line(content="b")
        problem(body.answer(), 404, "context_not_found")


# Limits


def test_a_line_may_be_as_long_as_a_chunk_escaped(pen: Pen) -> None:
    """64 KiB of UTF-8, though every character takes six bytes of JSON; one more is 413."""
    escaped = '{"content":"' + "\\u0041" * CHUNK_BYTES_MAX + '"}\n'
    assert ok(pen.lines(escaped.encode()))["accepted"] == 1
    assert pen.texts() == ["A" * CHUNK_BYTES_MAX]
    for stored, characters in ((2, CHUNK_BYTES_MAX + 1), (3, 1_000_000)):
        body = lines({"content": "a"}, {"content": "x" * characters}, {"content": "b"})
        refusal = refused_line(pen.lines(body), 413, "payload_too_large", 2)
        assert refusal["limit_bytes"] == CHUNK_BYTES_MAX
        assert pen.message()["current_sequence"] == stored


@pytest.mark.parametrize("filling", [b"x", b" ", b"\r"])
def test_a_line_without_an_end_is_bounded(pen: Pen, filling: bytes) -> None:
    """The server gives up long before its memory does, and says so while the body is open."""
    with pen.body() as body:
        body.line(content="a")
        body.piece(b'{"content":"')
        until(lambda: body.answered() or not body.try_piece(filling * 65_536), "a refusal")
        response = body.answer()
        assert response.status_code in (400, 413), response.text
        assert response.json()["line"] == 2
        assert body.sent_bytes < 24 * MIB
    assert pen.texts() == ["a"]


def test_endless_blank_lines_cost_nothing(pen: Pen) -> None:
    """They are skipped one by one, however many."""
    with pen.body() as body:
        for _ in range(20):
            body.piece(b"\n" * 10_000)
        body.line(content="a")
        assert ok(body.end())["accepted"] == 1
