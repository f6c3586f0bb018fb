"""A producer at the wire: the requests of §7 by name, and a body that is sent piece by piece."""

import json
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import httpx
from wire import DEADLINE_S, Api, Json, ok, until

NDJSON = "application/x-ndjson"
APPEND_FIELDS = {"message_id", "sequence", "accepted", "duplicates"}
WORKER = {"id": "worker-1", "epoch": 1}
ERROR = {"type": "out_of_memory", "message": "The worker died."}


def numbered(first: int, *texts: str) -> list[Json]:
    """Chunks with their sequences, from `first` on."""
    return [{"sequence": first + n, "content": text} for n, text in enumerate(texts)]


def lines(*documents: Any) -> bytes:
    """An NDJSON body."""
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


class Pen:
    """One produced message, and its producer's requests; those that end in a Response are unchecked."""

    def __init__(self, api: Api, context_id: str, message_id: str = "out") -> None:
        self.api = api
        self.context_id = context_id
        self.message_id = message_id
        self.path = f"/contexts/{context_id}/messages/{message_id}"

    def other(self, message_id: str) -> "Pen":
        """Of another message of the same context."""
        return Pen(self.api, self.context_id, message_id)

    def put(self, **body: Any) -> httpx.Response:
        return self.api.http.put(self.path, json={"producer": WORKER, **body})

    def open(self, **body: Any) -> Json:
        """A new message."""
        return ok(self.put(**body), 201)

    def post(self, body: Any, what: str = "chunks") -> httpx.Response:
        return self.api.http.post(f"{self.path}/{what}", json=body)

    def batch(self, *chunks: Json, **more: Any) -> httpx.Response:
        return self.post({"chunks": list(chunks), **more})

    def write(self, *texts: str, epoch: int = 1) -> Json:
        """Appends without sequences."""
        return ok(self.post({"epoch": epoch, "chunks": [{"content": text} for text in texts]}))

    def lines(self, body: bytes, type_: str = NDJSON, **headers: str) -> httpx.Response:
        """An NDJSON body that is sent whole."""
        fields = {"content-type": type_, **headers}
        return self.api.http.post(f"{self.path}/chunks", content=body, headers=fields)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post(body, "complete")

    def fail(self, **body: Any) -> httpx.Response:
        return self.post({"error": ERROR, **body}, "fail")

    def message(self) -> Json:
        return self.api.message(self.context_id, self.message_id)

    def texts(self) -> list[str]:
        """Its chunks, each by itself."""
        return self.api.texts(self.context_id, self.message_id)

    def pull(self, **params: Any) -> Json:
        return self.api.pull(self.context_id, self.message_id, **params)

    def reached(self, sequence: int) -> None:
        """Waits until that much can be seen."""
        until(lambda: self.message()["current_sequence"] >= sequence, f"chunk {sequence}")

    def held(self) -> tuple[Json, Json, list[str]]:
        """All that a refused request must leave as it is."""
        return self.api.context(self.context_id), self.message(), self.texts()

    @contextmanager
    def body(self, **headers: str | None) -> Iterator["OpenBody"]:
        """An NDJSON request whose body is still open; a header is left out where it is None."""
        body = OpenBody(self.api.url, f"{self.path}/chunks", headers)
        try:
            yield body
        finally:
            body.close()


class OpenBody:
    """A POST over a socket of its own, whose body goes in pieces, each an HTTP chunk."""

    def __init__(self, url: str, path: str, headers: dict[str, str | None]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_bytes = 0
        fields = {
            "Host": f"{host}:{port}",
            "Content-Type": NDJSON,
            "Transfer-Encoding": "chunked",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        said = {name: value for name, value in fields.items() if value is not None}
        head = "".join(f"{name}: {value}\r\n" for name, value in said.items())
        self.socket.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())

    def piece(self, data: bytes) -> None:
        """One HTTP chunk, in one segment if it is short."""
        self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        self.sent_bytes += len(data)

    def line(self, **fields: Any) -> None:
        """One line."""
        self.piece(lines(fields))

    def try_piece(self, data: bytes) -> bool:
        """Sends on, whatever the server has done by now; whether it could be sent."""
        try:
            self.piece(data)
        except OSError:
            return False
        return True

    def answered(self) -> bool:
        """Whether there is something to read."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def answer(self) -> httpx.Response:
        """What the server answers, read with or without the body's end."""
        response = HTTPResponse(self.socket, method="POST")
        response.begin()
        content = response.read()
        headers = [(name, value) for name, value in response.getheaders()]
        return httpx.Response(response.status, headers=headers, content=content)

    def end(self) -> httpx.Response:
        """Ends the body; the answer."""
        self.socket.sendall(b"0\r\n\r\n")
        return self.answer()

    def is_closed(self) -> bool:
        """Reads on to the end of the connection; fails at the deadline if the server keeps it."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def cut(self) -> None:
        """Breaks the connection, as a crash of the producer's machine would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Repeatable."""
        self.socket.close()
