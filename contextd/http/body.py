"""Reading a request's body, within its route's limits.

Decoding JSON takes the loop, and no other thread can do it meanwhile: a long text is read at a gigabyte a
second, but a million small values take a second. So what counts is what a body has beside its long
strings. It is counted piece by piece while the body comes in, and never of bodies that are small.
"""

import msgspec
from litestar.types import HTTPScope, Receive

from contextd.core.errors import PayloadTooLarge
from contextd.settings import Settings

LONG_STRING_BYTES = 256


class BodyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The largest body, and the most of it that is not in long strings; in bytes."""

    bytes_max: int
    structure_bytes_max: int

    @classmethod
    def of(cls, settings: Settings, *, long_text: bool) -> "BodyLimits":
        """Of a route; `long_text`: whether its bodies have a text of any length."""
        whole, structure = settings.request_bytes_max, settings.json_bytes_max
        least = min(whole, structure)
        return cls(bytes_max=whole if long_text else least, structure_bytes_max=least)


async def read_body(scope: HTTPScope, receive: Receive, limits: BodyLimits) -> bytes | None:
    """The whole body, or None when the client has gone. Raises `PayloadTooLarge`."""
    announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    if int(announced) > limits.bytes_max:
        raise PayloadTooLarge(limits.bytes_max)
    parts: list[bytes] = []
    structure = Structure(limits.structure_bytes_max)
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message["body"])
        size += len(parts[-1])
        if size > limits.bytes_max:
            raise PayloadTooLarge(limits.bytes_max)
        if size > limits.structure_bytes_max:
            structure.count(parts)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


class Structure:
    """Counts the bytes of JSON that are not in long strings."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._counted = 0  # parts
        self._escape = b""  # whose other half is in the next part
        self._inside = 0  # 1 within a string
        self._string_bytes = 0  # of that string so far

    def count(self, parts: list[bytes]) -> None:
        """Counts the parts that are new since the last call. Raises `PayloadTooLarge`."""
        for part in parts[self._counted :]:
            self._count(part)
            if self._bytes > self._bytes_max:
                raise PayloadTooLarge(self._bytes_max, "what is not in long texts")
        self._counted = len(parts)

    def _count(self, part: bytes) -> None:
        plain = (self._escape + part).replace(rb"\\", b"__").replace(rb"\"", b"__")
        self._escape = b"\\" if plain.endswith(b"\\") else b""
        lengths = [len(piece) for piece in plain.split(b'"')]
        lengths[0] += self._string_bytes
        strings = lengths[1 - self._inside :: 2]
        self._bytes += sum(lengths[self._inside :: 2]) + len(lengths) - 1
        self._inside = (len(lengths) - 1 + self._inside) % 2
        self._string_bytes = strings.pop() if self._inside else 0
        self._bytes += sum(size for size in strings if size < LONG_STRING_BYTES)
