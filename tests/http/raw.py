"""Bytes on a socket, for what no client would send."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

HOST = b"Host: localhost\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\n" + HOST
DEADLINE_S = 20.0


@contextmanager
def connected(url: str, *sent: bytes) -> Iterator[socket.socket]:
    """A connection on which `sent` has been sent, as far as the server took it."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), DEADLINE_S) as connection:
        try:
            for piece in sent:
                connection.sendall(piece)
        except OSError:
            pass  # refused in the middle
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def said(url: str, *sent: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    with connected(url, *sent) as connection:
        return rest(connection)


def first_status(url: str, head: bytes) -> int:
    """The status of the answer to one request."""
    with connected(url, head) as connection:
        return int(connection.recv(65536).split(b" ", 2)[1])
