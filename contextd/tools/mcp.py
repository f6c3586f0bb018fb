"""Tools of MCP servers, over stdio and streamable HTTP (§8), by way of the official SDK.

    async with McpServers(read_mcp_file(path)) as servers:
        servers.tools

Which servers there are, and how far they are trusted, is in the file (`mcp_file.py`). What their tools
are called is in `mcp_naming.py`, what becomes of their answers in `mcp_result.py`. A server may come
late, go and come back (`mcp_connection.py`): its tools are offered from when it first listed them, also
while it is away.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog

from contextd.tools import Tool
from contextd.tools.mcp_connection import Connection
from contextd.tools.mcp_file import McpServer, read_mcp_file
from contextd.tools.mcp_limits import McpLimits

__all__ = ["McpLimits", "McpServer", "McpServers", "read_mcp_file"]

# The SDK logs whole messages, also as errors, and they hold arguments and answers.
SILENT_LOGGERS = ("client", "mcp")
# What these say below a warning holds addresses and headers.
QUIET_LOGGERS = ("httpcore2", "httpx2")

log = structlog.get_logger(__name__)


class McpServers:
    """All MCP servers of one process.

    `start_wait_s` bounds how long `open` waits for servers; who is late is waited for in the background.
    `changed` is called with all tools whenever a server has listed its own, from the event loop and
    without a pause in between: it must not block.
    """

    def __init__(
        self,
        servers: Sequence[McpServer],
        *,
        start_wait_s: float = 10.0,
        limits: McpLimits = McpLimits(),  # noqa: B008 - it is frozen
        changed: Callable[[list[Tool]], None] | None = None,
    ) -> None:
        self._servers = list(servers)
        self._start_wait_s = start_wait_s
        self._limits = limits
        self._changed = changed
        self._connections: list[Connection] = []

    @property
    def tools(self) -> list[Tool]:
        """Those of every server that has answered, in the file's order. Names are unique."""
        return [tool for connection in self._connections for tool in connection.tools]

    @property
    def missing(self) -> list[str]:
        """The names of servers that have not listed their tools since `open`."""
        return [connection.name for connection in self._connections if not connection.answered]

    async def open(self) -> list[Tool]:
        """Starts all servers at once and answers the tools there are after at most `start_wait_s`.

        To be called once. A server that does not start is reported in the log, never raised.
        """
        _keep_quiet()
        self._connections = [
            Connection(server, self._tell, self._limits) for server in self._servers
        ]
        for connection in self._connections:
            connection.start()
        try:
            await self._wait_for_first_tries()
        except BaseException:
            await self.close()
            raise
        if self.missing:
            log.warning("MCP servers are missing", servers=self.missing)
        return self.tools

    async def close(self) -> None:
        """Ends every session and every process that was started; takes at most about 3 s.

        Calls that run end as `ToolError`, and so does every later one. Closing again does nothing.
        """
        await asyncio.gather(*(connection.close() for connection in self._connections))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _wait_for_first_tries(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._start_wait_s):
                for connection in self._connections:
                    await connection.tried.wait()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed(self.tools)


def _keep_quiet() -> None:
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for name in QUIET_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
