"""§1 at the wire: headers, paths and ids that could be read in two ways, or in none."""

import json

import pytest
from raw import HOST, LIVE, connected, first_status, said
from wire import Api, invalid, ok, problem

ODD_VALUES = [
    b"", b",", b";", b"*", b"q=1e999", b"text/plain;q=1e999", b"text/plain;q=nan", b"*/*;q=-1",
    b"a/b;q=1;;q=", b'"', b'W/"', b"\xff\xfe", b"a" * 20_000, b"bytes=9-1,,", b"application/json; charset=x",
    b"-1", b"1e3", b",".join([b"text/*;q=0.5"] * 1500),
]  # fmt: skip
HEADERS = [
    b"Accept", b"If-None-Match", b"Range", b"Content-Type", b"Content-Length", b"Content-Encoding",
    b"Last-Event-ID", b"Cookie", b"Origin", b"Expect", b"Authorization", b"Accept-Encoding",
    b"Access-Control-Request-Method", b"Transfer-Encoding", b"X-Forwarded-For", b"Upgrade",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_no_header_is_a_defect(api: Api, closed: tuple[str, str], header: bytes) -> None:
    """Whatever stands in it, on every kind of route."""
    content = "/contexts/{}/messages/{}/content".format(*closed)
    for path in ("/machine", "/contexts", content):
        for value in ODD_VALUES:
            asked = f"GET {path} HTTP/1.1\r\n".encode() + HOST + header + b": " + value
            assert first_status(api.url, asked + b"\r\n\r\n") < 500, (path, value[:40])


@pytest.mark.parametrize(
    ("accept", "type_"),
    [
        ("text/plain;q=0", "application/json"),
        ("text/*, application/json;q=0.9", "text/plain"),
        ("text/plain;q=0.1, */*", "application/json"),
        ("text/plain;q=1e999", "application/json"),
    ],
)
def test_qualities_decide_the_form(
    api: Api, closed: tuple[str, str], accept: str, type_: str
) -> None:
    """As RFC 9110 has it; a quality that is none is not wanted."""
    response = api.get_content(*closed, headers={"accept": accept})
    assert response.headers["content-type"].split(";")[0] == type_


@pytest.mark.parametrize(
    "header",
    [b"Host", b"Origin", b"Content-Type", b"Content-Length", b"Authorization", b"Last-Event-ID"],
)
def test_a_header_that_has_one_value_comes_once(api: Api, header: bytes) -> None:
    """400, also where both say the same."""
    value = b": http://localhost\r\n" if header == b"Origin" else b": localhost\r\n"
    twice = (header + (b": 0\r\n" if header == b"Content-Length" else value)) * 2
    asked = b"GET /health/live HTTP/1.1\r\n" + (b"" if header == b"Host" else HOST) + twice
    assert first_status(api.url, asked + b"\r\n") == 400


def test_trailers_are_no_headers(api: Api) -> None:
    """An origin that would be refused is nobody's when it comes after the body."""
    asked = b"POST /contexts HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    asked += b"Transfer-Encoding: chunked\r\n\r\n"
    with connected(
        api.url, asked + b"2\r\n{}\r\n0\r\nOrigin: http://evil\r\nHost: evil\r\n\r\n"
    ) as c:
        assert c.recv(100).startswith(b"HTTP/1.1 201")


@pytest.mark.parametrize(
    "path",
    [
        "//health/live", "/health//live", "/health/live/", "/health%2flive", "/health%2Flive",
        "/./health/live", "/contexts/../health/live", "/contexts/%2e%2e/health", "/contexts/.",
        "/contexts/..", "/contexts/%00", "/contexts/%ff", "/contexts/%ed%a0%80", "/contexts/",
    ],
)  # fmt: skip
def test_a_path_has_one_form(api: Api, path: str) -> None:
    """Everything that a proxy may turn into another path is 404."""
    asked = f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"Connection: close\r\n\r\n"
    head, _, body = said(api.url, asked).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert json.loads(body)["code"] == "not_found"


@pytest.mark.parametrize("id_", [".", ".."])
def test_dots_are_no_ids(api: Api, context_id: str, id_: str) -> None:
    """They could not be asked for: a path with them is another path."""
    invalid(api.http.post("/contexts", json={"id": id_}), "id")
    invalid(api.post_message(context_id, "x", message_id=id_), "message_id")
    invalid(api.http.post(f"/contexts/{context_id}/branches", json={"name": id_}), "name")
    ok(api.http.post("/contexts", json={"id": f"a{id_}"}), 201)
    api.http.delete(f"/contexts/a{id_}")
    problem(api.http.get("/contexts/..."), 404, "context_not_found")


@pytest.mark.parametrize("path", ["/contexts/x/ws", "/health/live"])
@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_another_protocol_is_not_spoken(api: Api, path: str, protocol: bytes) -> None:
    """The request is answered as any other, and the connection closes."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
    answer = said(api.url, f"GET {path} HTTP/1.1\r\n".encode() + HOST + upgrade)
    assert answer.startswith(b"HTTP/1.1 200" if path == "/health/live" else b"HTTP/1.1 404")


def test_an_upgrade_leaves_the_rest_unread(api: Api) -> None:
    """What follows may be in any protocol."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert said(api.url, LIVE + upgrade + LIVE + b"\r\n").count(b"HTTP/1.1 ") == 1
