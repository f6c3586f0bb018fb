"""An empty handler: what Litestar and uvicorn cost, before an application does anything."""

from litestar import Litestar, asgi
from litestar.types import Receive, Scope, Send

from benchmarks.bare_hosting import host

_BODY = b'{"content":""}'
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
]


@asgi("/", copy_scope=False)
async def answer_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The same few bytes for every request."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY, "more_body": False})


if __name__ == "__main__":
    host(Litestar(route_handlers=[answer_nothing], openapi_config=None, logging_config=None))
