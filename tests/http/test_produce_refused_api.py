"""§7 and §1 at the wire: what is no request of a producer, and what is too large."""

from typing import Any

import pytest
from producing import WORKER, Pen, numbered
from serving import Server
from wire import Api, Json, invalid, ok, problem

CHUNK_BYTES_MAX = 64 * 1024


@pytest.fixture
def fresh(api: Api, context_id: str) -> Pen:
    """A message that nobody has opened yet."""
    return Pen(api, context_id)


@pytest.fixture
def pen(fresh: Pen) -> Pen:
    """A message that was just opened, by `worker-1` in epoch 1."""
    fresh.open()
    return fresh


# Opening


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"producer": None}, "producer"),
        ({"producer": "worker-1"}, "producer"),
        ({"producer": {}}, "producer.id"),
        ({"producer": {"epoch": 1}}, "producer.id"),
        ({"producer": {"id": 5}}, "producer.id"),
        ({"producer": {"id": ""}}, "producer.id"),
        ({"producer": {"id": "a b"}}, "producer.id"),
        ({"producer": {"id": "a\n"}}, "producer.id"),
        ({"producer": {"id": "a" * 65}}, "producer.id"),
        ({"producer": {"id": "a", "colour": 1}}, "producer.colour"),
        ({"producer": {"id": "a", "epoch": 0}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": -1}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": 1.5}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": "1"}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": True}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": 2**53}}, "producer.epoch"),
        ({"producer": {"id": "a", "epoch": 10**30}}, "producer.epoch"),
        ({"role": "robot"}, "role"),
        ({"role": None}, "role"),
        ({"kind": ""}, "kind"),
        ({"kind": "Text"}, "kind"),
        ({"kind": "two words"}, "kind"),
        ({"kind": "text\n"}, "kind"),
        ({"kind": "x" * 65}, "kind"),
        ({"kind": 5}, "kind"),
        ({"kind": None}, "kind"),
        ({"branch": "a b"}, "branch"),
        ({"branch": 5}, "branch"),
        ({"parent_id": "a/b"}, "parent_id"),
        ({"media_type": 5}, "media_type"),
        ({"media_type": ""}, "media_type"),
        ({"media_type": "text/\u0000"}, "media_type"),
        ({"metadata": []}, "metadata"),
        ({"metadata": "x"}, "metadata"),
        ({"epoch": 1}, "epoch"),
        ({"content": "x"}, "content"),
    ],
)
def test_a_wrong_field_of_an_opening_is_named(fresh: Pen, body: Json, field: str) -> None:
    """400 with the field's path, and nothing is stored."""
    before = fresh.api.context(fresh.context_id)
    invalid(fresh.put(**body), field)
    assert fresh.api.context(fresh.context_id) == before


def test_an_opening_that_is_no_json_object_is_refused(fresh: Pen) -> None:
    """400 for other JSON and for none, 415 for another media type; a query parameter is named."""
    invalid(fresh.api.http.put(fresh.path, json={}), "producer")
    for content in (b"", b"{", b"[]", b"5", b'{"producer":{"id":"\\ud800"}}', b"\xff"):
        headers = {"content-type": "application/json"}
        response = fresh.api.http.put(fresh.path, content=content, headers=headers)
        problem(response, 400, "invalid_request")
    for type_ in ("text/plain", "application/x-ndjson", "application/xml"):
        response = fresh.api.http.put(
            fresh.path, content=b'{"producer":{"id":"a"}}', headers={"content-type": type_}
        )
        problem(response, 415, "unsupported_media_type")
    invalid(fresh.api.http.put(f"{fresh.path}?colour=x", json={"producer": WORKER}), "colour")
    assert fresh.api.context(fresh.context_id)["message_count"] == 0


def test_metadata_and_media_types_are_bounded(fresh: Pen) -> None:
    """413 for metadata that is too large; a media type that could break a header never gets there."""
    refusal = problem(fresh.put(metadata={"a": "x" * 70_000}), 413, "payload_too_large")
    assert refusal["limit_bytes"] == 65_536
    assert fresh.put(media_type="x" * 5000).status_code in (400, 413)
    evil = fresh.put(media_type="text/html\r\nX-Evil: 1")
    assert evil.status_code in (201, 400)
    if evil.status_code == 400:
        fresh.open(media_type="text/html")
    pulled = fresh.api.get_content(fresh.context_id, "out", headers={"accept": "text/plain"})
    assert pulled.headers["content-type"].startswith("text/plain")
    assert "x-evil" not in pulled.headers


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("", {"GET", "PUT"}),
        ("/chunks", {"GET", "POST"}),
        ("/complete", {"POST"}),
        ("/fail", {"POST"}),
    ],
)
def test_another_method_is_405_with_allow(fresh: Pen, path: str, allowed: set[str]) -> None:
    """Each path says by `Allow` what is possible there."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - allowed:
        response = fresh.api.http.request(method, fresh.path + path)
        problem(response, 405, "method_not_allowed")
        said = {name.strip() for name in response.headers["allow"].split(",")}
        assert allowed <= said <= allowed | {"OPTIONS", "HEAD"}, (method, said)
    options = fresh.api.http.options(fresh.path + path)
    assert options.status_code == 204
    assert allowed <= {name.strip() for name in options.headers["allow"].split(",")}


# Appending


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"chunks", "content"}),
        ({"epoch": 1}, {"chunks", "content"}),
        ({"chunks": []}, {"chunks"}),
        ({"chunks": {}}, {"chunks"}),
        ({"chunks": "x"}, {"chunks"}),
        ({"chunks": ["x"]}, {"chunks[0]"}),
        ({"chunks": [None]}, {"chunks[0]"}),
        ({"chunks": [{}]}, {"chunks[0].content"}),
        ({"chunks": [{"content": "x"}, {"content": ""}]}, {"chunks[1].content"}),
        ({"chunks": [{"content": 5}]}, {"chunks[0].content"}),
        ({"chunks": [{"content": None}]}, {"chunks[0].content"}),
        ({"chunks": [{"content": "a\u0000b"}]}, {"chunks[0].content"}),
        ({"chunks": [{"content": "x", "colour": 1}]}, {"chunks[0].colour"}),
        ({"chunks": [{"content": "x", "epoch": 1}]}, {"chunks[0].epoch"}),
        ({"chunks": [{"content": "x", "sequence": 0}]}, {"chunks[0].sequence"}),
        ({"chunks": [{"content": "x", "sequence": -1}]}, {"chunks[0].sequence"}),
        ({"chunks": [{"content": "x", "sequence": 1.5}]}, {"chunks[0].sequence"}),
        ({"chunks": [{"content": "x", "sequence": "1"}]}, {"chunks[0].sequence"}),
        ({"chunks": [{"content": "x", "sequence": True}]}, {"chunks[0].sequence"}),
        ({"chunks": [{"content": "x", "sequence": 2**53}]}, {"chunks[0].sequence"}),
        ({"content": ""}, {"content"}),
        ({"content": "\u0000"}, {"content"}),
        ({"content": ["x"]}, {"content"}),
        ({"content": "x", "sequence": 0}, {"sequence"}),
        ({"content": "x", "sequence": 10**30}, {"sequence"}),
        ({"content": "x", "epoch": 0}, {"epoch"}),
        ({"content": "x", "epoch": -1}, {"epoch"}),
        ({"content": "x", "epoch": "1"}, {"epoch"}),
        ({"content": "x", "epoch": 1.5}, {"epoch"}),
        ({"content": "x", "epoch": 2**53}, {"epoch"}),
        ({"content": "x", "colour": 1}, {"colour"}),
        ({"content": "x", "complete": {}}, {"complete"}),
        ({"content": "x", "chunks": [{"content": "y"}]}, {"chunks", "content"}),
        ({"sequence": 1, "chunks": [{"content": "y"}]}, {"chunks", "sequence"}),
        ({"sequence": 1}, {"content", "chunks", "sequence"}),
    ],
)
def test_a_wrong_field_of_an_append_is_named(pen: Pen, body: Json, fields: set[str]) -> None:
    """400 with the field's path, or one of those that do not go together; nothing is stored."""
    errors = problem(pen.post(body), 400, "invalid_request")["errors"]
    named = {error["field"] for error in errors}
    assert named & fields, errors
    assert pen.texts() == []


def test_an_append_that_is_no_json_object_is_refused(pen: Pen) -> None:
    """400 for other JSON, half a surrogate and no UTF-8; 415 for another media type."""
    surrogates = (b'{"content":"\\ud800"}', b'{"chunks":[{"content":"x\\udc00y"}]}')
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b'"x"', b'{"content":"\xff"}', b"[" * 5000, *surrogates):
        response = pen.api.http.post(f"{pen.path}/chunks", content=content, headers=json_type)
        problem(response, 400, "invalid_request")
    for type_ in ("text/plain", "application/xml", "application/x-ndjsonx", "ndjson"):
        problem(pen.lines(b'{"content":"x"}', type_), 415, "unsupported_media_type")
    response = pen.api.http.post(f"{pen.path}/chunks?colour=red", json={"content": "x"})
    invalid(response, "colour")
    assert pen.texts() == []
    assert ok(pen.lines(b'{"content":"x"}', "Application/JSON; charset=utf-8"))["accepted"] == 1


# Ending


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"epoch": 0}, "epoch"),
        ({"epoch": "1"}, "epoch"),
        ({"epoch": 2**53}, "epoch"),
        ({"final_sequence": -1}, "final_sequence"),
        ({"final_sequence": 1.5}, "final_sequence"),
        ({"final_sequence": "1"}, "final_sequence"),
        ({"final_sequence": 2**53}, "final_sequence"),
        ({"finish_reason": 5}, "finish_reason"),
        ({"finish_reason": "a\u0000"}, "finish_reason"),
        ({"usage": 5}, "usage"),
        ({"usage": []}, "usage"),
        ({"usage": {"prompt_tokens": "x"}}, "usage.prompt_tokens"),
        ({"usage": {"prompt_tokens": 1.5}}, "usage.prompt_tokens"),
        ({"usage": {"prompt_tokens": -1}}, "usage.prompt_tokens"),
        ({"usage": {"colour": 1}}, "usage.colour"),
        ({"error": {"type": "x", "message": "y"}}, "error"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(pen: Pen, body: Json, field: str) -> None:
    """400 with the field's path, and the message stays open."""
    invalid(pen.complete(**body), field)
    assert pen.message()["status"] == "streaming"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "error"),
        ({"error": None}, "error"),
        ({"error": "x"}, "error"),
        ({"error": {"message": "x"}}, "error.type"),
        ({"error": {"type": "x"}}, "error.message"),
        ({"error": {"type": 5, "message": "x"}}, "error.type"),
        ({"error": {"type": "x", "message": "a\u0000"}}, "error.message"),
        ({"error": {"type": "x", "message": "y", "colour": 1}}, "error.colour"),
        ({"error": {"type": "x", "message": "y"}, "epoch": 0}, "epoch"),
        ({"error": {"type": "x", "message": "y"}, "final_sequence": 1}, "final_sequence"),
        ({"error": {"type": "x", "message": "y"}, "colour": 1}, "colour"),
    ],
)
def test_a_wrong_field_of_a_failure_is_named(pen: Pen, body: Json, field: str) -> None:
    """400 with the field's path, and the message stays open."""
    invalid(pen.post(body, "fail"), field)
    assert pen.message()["status"] == "streaming"


@pytest.mark.parametrize("what", ["complete", "fail"])
def test_an_end_that_is_no_json_object_is_refused(pen: Pen, what: str) -> None:
    """400 for other JSON, 415 for another media type, a query parameter is named."""
    path = f"{pen.path}/{what}"
    for content in (b"{", b"[]", b"5"):
        headers = {"content-type": "application/json"}
        problem(pen.api.http.post(path, content=content, headers=headers), 400, "invalid_request")
    for type_ in ("text/plain", "application/x-ndjson"):
        response = pen.api.http.post(path, content=b"{}", headers={"content-type": type_})
        problem(response, 415, "unsupported_media_type")
    body = {"error": {"type": "x", "message": "y"}} if what == "fail" else {}
    invalid(pen.api.http.post(f"{path}?colour=x", json=body), "colour")
    assert pen.message()["status"] == "streaming"


# Limits


def test_a_chunk_is_at_most_64_kib_of_utf_8(pen: Pen) -> None:
    """Counted in bytes of UTF-8, not in characters and not as they are escaped."""
    for text in (
        "x" * CHUNK_BYTES_MAX,
        "ü" * (CHUNK_BYTES_MAX // 2),
        "🦊" * (CHUNK_BYTES_MAX // 4),
    ):
        assert pen.write(text)["accepted"] == 1
        for body in (
            {"content": text + "x"},
            {"chunks": [{"content": "a"}, {"content": text + "x"}]},
        ):
            refusal = problem(pen.post(body), 413, "payload_too_large")
            assert refusal["limit_bytes"] == CHUNK_BYTES_MAX
    assert pen.message()["current_sequence"] == 3
    assert len(pen.pull()["content"].encode()) == 3 * CHUNK_BYTES_MAX


def test_a_batch_is_at_most_1000_chunks(pen: Pen) -> None:
    """One more is 413, and nothing of it is stored."""
    texts = [f"{n} " for n in range(1001)]
    problem(pen.batch(*numbered(1, *texts), epoch=1), 413, "payload_too_large")
    assert pen.message()["current_sequence"] == 0
    assert ok(pen.batch(*numbered(1, *texts[:1000]), epoch=1))["accepted"] == 1000
    assert ok(pen.batch(*numbered(1, *texts[:1000]), epoch=1))["duplicates"] == 1000
    assert pen.pull()["content"] == "".join(texts[:1000])


@pytest.fixture(scope="module")
def narrow(make_server: Any) -> Api:
    """A server with small limits of a request and a chunk."""
    server: Server = make_server(request_bytes_max=4000, chunk_bytes_max=100)
    return Api(server.url)


def test_the_limits_are_settings(narrow: Api) -> None:
    """A request and a chunk, each with its own limit in the answer; the server lives on."""
    pen = Pen(narrow, narrow.create())
    pen.open()
    for response in (
        pen.batch(*[{"content": "x" * 99} for _ in range(50)]),
        pen.put(metadata={"a": "x" * 5000}),
        pen.complete(finish_reason="x" * 5000),
    ):
        assert problem(response, 413, "payload_too_large")["limit_bytes"] == 4000
    assert problem(pen.post({"content": "x" * 101}), 413, "payload_too_large")["limit_bytes"] == 100
    refusal = problem(pen.lines(b'{"content":"%b"}\n' % (b"x" * 101)), 413, "payload_too_large")
    assert refusal["limit_bytes"] == 100
    assert pen.message()["current_sequence"] == 0
    assert pen.write("x" * 100)["sequence"] == 1
