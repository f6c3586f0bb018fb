"""Just enough HTTP for the clients of a benchmark, so that they cost little next to the servers."""

import http.client
import re
import time
from urllib.parse import urlsplit

import msgspec

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
WAIT_S = 60


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def get_request(url: str, path: str, accept: str = "application/json") -> bytes:
    """The bytes of a GET on a connection that stays open."""
    host, port = address(url)
    head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: {accept}\r\n\r\n"
    return head.encode()


def connect(url: str) -> http.client.HTTPConnection:
    """A blocking connection, for what is not measured and for single large answers."""
    return http.client.HTTPConnection(*address(url), timeout=WAIT_S)


def get(connection: http.client.HTTPConnection, path: str) -> bytes:
    """The body of an answer, which must be a success."""
    connection.request("GET", path)
    return _body(connection, path)


def post(url: str, path: str, body: object) -> bytes:
    """Posts JSON; the body of the answer, which must be a success."""
    return _ask(url, "POST", path, body)


def put(url: str, path: str, body: object) -> bytes:
    """Puts JSON; the body of the answer, which must be a success."""
    return _ask(url, "PUT", path, body)


def create_context(url: str, context_id: str) -> None:
    """A context with nothing in it."""
    post(url, "/contexts", {"id": context_id})


def message_path(context_id: str, message_id: str) -> str:
    """Where a message is."""
    return f"/contexts/{context_id}/messages/{message_id}"


def open_produced(url: str, context_id: str, message_id: str) -> None:
    """A new context, and a message in it that a producer may write."""
    create_context(url, context_id)
    put(url, message_path(context_id, message_id), {"producer": {"id": "bench"}})


def send_text(url: str, context_id: str, content: str) -> None:
    """A text, which starts a turn."""
    body = {"payload": {"type": "text", "content": content}}
    post(url, f"/contexts/{context_id}/messages", body)


def finished_answer(url: str, context_id: str) -> str:
    """Asks until the answer to a text is closed; its message id."""
    connection = connect(url)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        listed = msgspec.json.decode(get(connection, f"/contexts/{context_id}/messages"))
        for message in listed["items"]:
            if message["role"] == "assistant" and message["final_sequence"]:
                connection.close()
                return str(message["id"])
    raise RuntimeError(f"no answer in {context_id} within {WAIT_S} s")


def content_path(context_id: str, message_id: str, from_sequence: int) -> str:
    """Where the text after a position is pulled from."""
    return f"{message_path(context_id, message_id)}/content?from_sequence={from_sequence}"


def _ask(url: str, method: str, path: str, body: object) -> bytes:
    connection = connect(url)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, msgspec.json.encode(body), headers)
    found = _body(connection, path)
    connection.close()
    return found


def _body(connection: http.client.HTTPConnection, path: str) -> bytes:
    answer = connection.getresponse()
    body = answer.read()
    if not 200 <= answer.status < 300:
        raise RuntimeError(f"{path} answered {answer.status}: {body[:200]!r}")
    return body
