"""Serves an application that is no contextd under uvicorn, with contextd's own options."""

import gc
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
import uvloop

# As in contextd.app, which a test checks: importing that here would make a bare server a heavy one.
BACKLOG = 4096
KEEP_ALIVE_S = 75
GC_THRESHOLDS = (50_000, 20, 1000)


def host(application: Any, *, before_exit: Callable[[], None] = lambda: None) -> None:
    """Serves on a free port, says which, and ends on SIGTERM; `before_exit` ends what is open."""
    uvloop.run(_serve(application, before_exit))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, before_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_exit = before_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        print(f"listens on http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_exit()
        await super().shutdown(sockets)


async def _serve(application: Any, before_exit: Callable[[], None]) -> None:
    config = uvicorn.Config(
        application,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    await _Server(config, before_exit).serve(sockets=[listening])
