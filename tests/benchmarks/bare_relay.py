"""A bare ASGI application that takes bodies of lines as contextd does, and keeps nothing but stamps.

Each piece of a body that has stamps in it is told to all readers at once and can be pulled from memory.
"""

import re
from typing import Any

from benchmarks.bare_hosting import host
from benchmarks.bare_stream import Stream, respond
from benchmarks.pacing import STAMP_DIGITS

_STAMP = re.compile(rb'"content":"(\d{%d})"' % STAMP_DIGITS)


class Relay(Stream):
    """The text comes from outside."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("/chunks"):
            await self._take(receive, send)
        elif scope["method"] == "PUT":
            await respond(send, 201, b"{}")
        else:
            await super().__call__(scope, receive, send)

    async def _take(self, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            found = _STAMP.findall(message.get("body", b""))
            if found:
                self.tell([stamp.decode() for stamp in found])
        await respond(send, 200, b"{}")


if __name__ == "__main__":
    relay = Relay()
    host(relay, before_exit=relay.close)
