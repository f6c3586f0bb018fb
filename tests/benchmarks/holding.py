"""A client that opens many streams over many contexts and keeps them, for whoever looks at the server.

It says when all are open, and then waits for its standard input or all of its streams to end.
"""

import asyncio
import sys
from typing import Any

import msgspec
import uvloop

from benchmarks.watching import Take, Watcher, attach, newest_delta
from benchmarks.wire import WAIT_S, create_context, send_text


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the client is told. Every context gets `text` once the streams are open, unless it is empty."""

    url: str
    streams: int
    contexts: int
    text: str = ""


class Listening:
    """Notices when every stream has heard of something."""

    def __init__(self, streams: int) -> None:
        self._silent = set(range(streams))
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def taker(self, number: int) -> Take:
        """What this stream calls."""

        def take(data: bytes, _: int) -> None:
            if number in self._silent and newest_delta(data) is not None:
                self._silent.discard(number)
                if not self._silent:
                    self.complete.set_result(None)

        return take


async def hold(options: Options) -> dict[str, Any]:
    """Opens, says so, and waits; at last says how many streams were given a proper end."""
    names = [f"hold-{number}" for number in range(options.contexts)]
    for name in names:
        create_context(options.url, name)
    paths = [
        f"/contexts/{names[number % len(names)]}/stream?heartbeat=60"
        for number in range(options.streams)
    ]
    listening = Listening(options.streams)
    watchers = await attach(options.url, paths, listening.taker)
    if options.text:
        for name in names:
            send_text(options.url, name, options.text)
        await asyncio.wait_for(listening.complete, WAIT_S)
    print(msgspec.json.encode({"open": len(watchers)}).decode(), flush=True)
    await _end(watchers)
    proper = sum(watcher.gone.done() and watcher.gone.result() for watcher in watchers)
    return {"ended": proper}


async def _end(watchers: list[Watcher]) -> None:
    """Returns when nobody holds the standard input any more, or every stream has ended."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)  # nothing is ever written there: it is the end
    gone = asyncio.gather(*(watcher.gone for watcher in watchers))
    gone.add_done_callback(lambda _: over.set())
    await over.wait()
    loop.remove_reader(sys.stdin.fileno())


def main() -> None:
    """The client."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    print(msgspec.json.encode(uvloop.run(hold(options))).decode(), flush=True)


if __name__ == "__main__":
    main()
