"""§1 at the wire: what one connection may take, and that it takes nothing from the others."""

import json
import signal
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from raw import HOST, LIVE, connected, rest, said
from serving import Server
from wire import Api, ok, problem, until

POST = b"POST /contexts HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BOUNDS = {
    "head_timeout_s": 1,
    "body_timeout_s": 1,
    "keep_alive_s": 1,
    "slow_reader_s": 1,
    "waiting_pulls_max": 3,
}


@pytest.fixture(scope="module")
def bounded(make_server: Callable[..., Server]) -> Server:
    """A server without patience."""
    return make_server(**BOUNDS)


TOO_LARGE = {
    "one header": LIVE + b"X: " + b"a" * 33_000 + b"\r\n\r\n",
    "a header without end": LIVE + b"X: " + b"a" * 500_000,
    "many headers": LIVE + b"a: b\r\n" * 40_000,
    "a long line": b"GET /" + b"a" * 100_000,
    "empty lines": b"\r\n" * 50_000,
    "an extension of a chunk": CHUNKED + b"2;" + b"e" * 100_000,
    "trailers": CHUNKED + b"2\r\n{}\r\n0\r\n" + b"Origin: http://evil\r\n" * 5_000,
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_head_without_end_is_refused_and_closed(bounded: Server, what: str) -> None:
    """431 with a problem, and the connection closes; so does whatever else leads to nothing."""
    head, _, body = said(bounded.url, TOO_LARGE[what]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["limit_bytes"] == 32_768


def test_a_head_below_the_limit_is_taken(bounded: Server) -> None:
    """The limit is that of the head, not of a packet."""
    assert said(bounded.url, LIVE + b"X: " + b"a" * 32_000 + b"\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n", CHUNKED + b"zz\r\n"]
)
def test_what_is_no_http_is_refused_and_closed(bounded: Server, garbage: bytes) -> None:
    """400 with a problem, whatever was asked before it is answered first, and nothing is logged."""
    assert said(bounded.url, garbage).startswith(b"HTTP/1.1 400 ")
    both = said(bounded.url, LIVE + b"\r\n" + b"\x16\x03\x01\r\n\r\n")
    assert both.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in both
    assert "HTTP" not in bounded.log


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health",
        LIVE,
        POST + b"Content-Length: 9\r\n\r\n{",
        CHUNKED + b"2;",
    ],
)
def test_who_stops_in_the_middle_is_let_go(bounded: Server, sent: bytes) -> None:
    """A connection that says nothing, half a head or half a body closes, without an answer."""
    assert said(bounded.url, sent) == b""


def test_bytes_that_trickle_win_no_time(bounded: Server) -> None:
    """The head has one deadline, however often a byte comes."""
    with connected(bounded.url, LIVE) as connection:
        connection.settimeout(0.1)
        started = time.monotonic()
        while time.monotonic() - started < 10:
            try:
                connection.sendall(b"a: b\r\n")
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                pass
            except OSError:
                return
    raise AssertionError("the connection was kept")


def test_an_idle_connection_is_let_go(bounded: Server) -> None:
    """After an answer it may wait for a while only."""
    assert said(bounded.url, LIVE + b"\r\n").startswith(b"HTTP/1.1 200")


def test_a_refused_origin_is_logged_once(bounded: Server) -> None:
    """The operator hears of it, and a page that asks again and again does not fill the log."""
    origins = ["http://often.example", "http://other.example"]
    for origin in origins * 3:
        response = httpx.get(f"{bounded.url}/machine", headers={"origin": origin})
        problem(response, 403, "forbidden")
    for origin in origins:
        until(lambda origin=origin: origin in bounded.log, "a line")  # type: ignore[misc]
        assert bounded.log.count(origin) == 1


def test_requests_sent_ahead_are_answered_in_order(bounded: Server) -> None:
    """Many of them in one packet, of which a part is parsed only when those before are answered."""
    asked = b"".join(b"GET /nothing/%d HTTP/1.1\r\n" % n + HOST + b"\r\n" for n in range(2000))
    assert said(bounded.url, asked).count(b"HTTP/1.1 404") == 2000


def test_a_reader_that_takes_nothing_is_cut_off(bounded: Server) -> None:
    """Answers that nobody takes are not kept for ever."""
    api = Api(bounded.url)
    context_id = api.create()
    text = "x" * 1_000_000
    message_id = api.send(context_id, text, respond=False)["message_id"]
    path = f"/contexts/{context_id}/messages/{message_id}/content"
    asked = f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    with connected(bounded.url, asked * 20) as connection:
        time.sleep(3)  # nothing tells a reader that reads nothing
        assert len(rest(connection)) < 20 * len(text)
    api.close()


def test_a_pull_whose_client_left_gives_its_place_back(bounded: Server) -> None:
    """Long before its wait is over."""
    api = Api(bounded.url)
    context_id = api.create()
    ok(api.http.put(f"/contexts/{context_id}/messages/m", json={"producer": {"id": "p"}}), 201)
    path = f"/contexts/{context_id}/messages/m/content"
    asked = f"GET {path}?wait=30 HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    for ahead in (b"", b"", LIVE + b"\r\n"):
        with connected(bounded.url, asked + ahead):
            pass
    until(lambda: api.http.get(path, params={"wait": 0.1}).status_code == 200, "a free place")
    api.close()


def test_one_connection_too_many_is_refused(make_server: Callable[..., Server]) -> None:
    """503, and those that are there go on."""
    server = make_server(connections_max=2)
    with connected(server.url), connected(server.url):
        assert said(server.url).startswith(b"HTTP/1.1 503 ")


MANY_VALUES = {
    "keys": b'{"metadata":{' + b",".join(b'"%x":0' % n for n in range(400_000)) + b"}}",
    "objects": b'{"metadata":{"a":[' + b"{}," * 1_500_000 + b"0]}}",
    "names": b'{"tools":[' + b'"aaaa",' * 700_000 + b'"a"]}',
    "escapes": b'{"metadata":{' + b",".join(rb'"\\%x":0' % n for n in range(400_000)) + b"}}",
}


@pytest.mark.parametrize("what", MANY_VALUES)
def test_json_of_many_values_is_refused_unread(bounded: Server, what: str) -> None:
    """Only a long text makes a body long."""
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{bounded.url}/contexts", content=MANY_VALUES[what], headers=headers)
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 512 * 1024


@pytest.mark.parametrize("text", ["x" * 8_000_000, '"\\\n' * 1_000_000, "é🦊" * 700_000])
def test_long_texts_are_taken(bounded: Server, text: str) -> None:
    """Whatever has to be escaped in them, and wherever a piece of the body ends."""
    api = Api(bounded.url)
    api.send(api.create(), text, respond=False)
    api.close()


def test_small_routes_have_a_small_limit(bounded: Server) -> None:
    """A cancel has no long text, so a long one is refused by its length alone."""
    api = Api(bounded.url)
    body = {"turn_id": "x" * 600_000}
    response = api.http.post(f"/contexts/{api.create()}/cancel", json=body)
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 512 * 1024
    api.close()


ATTACKS = {
    "heads": LIVE + b"X: " + b"a" * 20_000,
    "bodies": POST + b"Content-Length: 900\r\n\r\n{",
    "ahead": (b"GET /contexts/x/stream HTTP/1.1\r\n" + HOST + b"\r\n") * 2000,
    "chunks": CHUNKED + b"2\r\n{ \r\n" * 2000,
}


@pytest.fixture
def hang_up_counts() -> Iterator[None]:
    """A process that was told to ignore SIGHUP, as by `nohup`, hands that on; the server honours it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_counts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_attacks_keep_nobody_waiting_and_the_server_stops(
    make_server: Callable[..., Server], number: int
) -> None:
    """Health is answered beside each attack, a stop is clean, and no traceback tells of them."""
    server = make_server(shutdown_s=0.5)
    api = Api(server.url)
    message = api.send(api.create(id="large"), "x" * 1_000_000, respond=False)["message_id"]
    path = f"GET /contexts/large/messages/{message}/content HTTP/1.1\r\n".encode()
    api.close()
    attacks = [*ATTACKS.values(), (path + HOST + b"\r\n") * 20]  # the last reads no answer
    with httpx.Client(base_url=server.url) as client:
        opened = [connected(server.url, attack) for attack in attacks for _ in range(5)]
        for one in opened:
            one.__enter__()
        for _ in range(20):
            assert client.get("/health/live").status_code == 200
    assert server.stop(number) == 0
    for one in opened:
        one.__exit__(None, None, None)
    assert "Traceback" not in server.log
    assert "ASGI" not in server.log
