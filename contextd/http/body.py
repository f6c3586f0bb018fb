"""Reading a request's body where no framework does."""

from litestar.types import HTTPScope, Receive

from contextd.core.errors import PayloadTooLarge


async def read_body(scope: HTTPScope, receive: Receive, bytes_max: int) -> bytes | None:
    """The whole body, or None when the client has gone. Raises `PayloadTooLarge`."""
    announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    if int(announced) > bytes_max:
        raise PayloadTooLarge(bytes_max)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message["body"])
        size += len(parts[-1])
        if size > bytes_max:
            raise PayloadTooLarge(bytes_max)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)
