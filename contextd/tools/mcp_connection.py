"""One MCP server over its whole life: reached, listed, called, lost, reached again.

The SDK's client must be entered and left in one task, so each server has a task that does this and
nothing else. A call is a task of its own too. Whoever waits for it can go at once; the call then tells
the server that it is cancelled, which takes as long as the server takes to read.

A connection that is lost comes back with the next call; one that never came to be is tried again by
itself, because nothing can call tools that are not known. Between tries there is a pause that grows.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import httpx2
import mcp_types
import msgspec
import structlog
from mcp import Client, MCPError
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from contextd.core.values import JsonObject
from contextd.tools import Tool, ToolError
from contextd.tools.mcp_child import NOT_TAKEN
from contextd.tools.mcp_file import McpServer
from contextd.tools.mcp_limits import TOOLS_MAX, McpLimits, limit_said, wrong_with
from contextd.tools.mcp_naming import offered
from contextd.tools.mcp_result import as_text, let_misfits_pass
from contextd.tools.mcp_transport import reach

CONNECT_S = 60.0  # for one try: to start, to agree on a version, and to list the tools
LIST_S = 30.0
LIST_PAUSE_S = 0.5  # between two lists, however often the server says that they changed
PAGES_MAX = 100
NAME_CHARS_MAX, SCHEMA_BYTES_MAX = 1000, 64 * 1024  # of a tool; one with more is left out
PAUSE_INITIAL_S = 0.5
PAUSE_MAX_S = 30.0
CLOSE_S = 2.5  # a child that does not want to end takes 2 s (`mcp_child.py`)
CLOSE_CALLS_S = 0.2
CANCEL_S = 0.2
WORDS_CHARS_MAX = 500  # of a server, in an error
STOPPING = "contextd is stopping."

# What comes with HTTP 404 from a server that has forgotten the session. Either says that it ran nothing.
SESSION_UNKNOWN = (mcp_types.INVALID_REQUEST, -32001)

log = structlog.get_logger(__name__)


class Connection:
    """One server and its tools. `changed` is called when `tools` has become another list."""

    def __init__(self, server: McpServer, changed: Callable[[], None], limits: McpLimits) -> None:
        self.name = server.name
        self.tools: list[Tool] = []
        self.tried = asyncio.Event()  # once the first try to reach the server has ended
        self.answered = False  # the server has listed its tools at least once
        self._server = server
        self._changed = changed
        self._limits = limits
        self._life: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[mcp_types.CallToolResult]] = set()
        self._closing = False

        self._client: Client | None = None
        self._next_client: asyncio.Future[Client] = _future()
        self._wanted = asyncio.Event()  # a call waits for `_next_client`
        self._scope: anyio.CancelScope | None = None
        self._over = asyncio.Event()  # the session that runs is to end
        self._list_changed = asyncio.Event()
        self._opened_at: float | None = None
        self._refusal: int | None = None
        self._why_broken = ""  # of the last session, where it was we who did not listen any longer
        self._handshake = False

        self._failures = 0  # in a row
        self._retry_at = -math.inf

    def start(self) -> None:
        """Begins to reach the server."""
        self._life = asyncio.create_task(self._live(), name=f"mcp {self.name}")

    async def close(self) -> None:
        """Ends the session, its calls, and a child's process; bounded."""
        self._closing = True
        if self._client is None and self._scope is not None:
            self._scope.cancel()  # it is still being reached, or left
        self._end_session()
        self._wanted.set()
        if self._life is not None:
            await _stopped([self._life], CLOSE_S)
        await _stopped(self._calls, CLOSE_CALLS_S)
        self._reject(STOPPING)

    async def call(self, tool: str, arguments: JsonObject) -> str:
        """What the tool answers, as text. `tool` is the server's own name for it.

        Cancelling tells the server and returns at once. Raises `ToolError` with the tool's own error, or
        with what went wrong between; it says whether the tool may have run.
        """
        try:
            async with asyncio.timeout(self._server.timeout_s):
                result = await self._answer(tool, arguments)
        except TimeoutError:
            raise ToolError(
                f"The tool did not answer within {self._server.timeout_s:g} s and was cancelled. "
                "It may have had an effect."
            ) from None
        if result.is_error:
            raise ToolError(self._server.conceal(as_text(result)))
        return as_text(result)

    # What the way to the server tells us (`Listener`)

    def ended(self) -> None:
        """Nothing more comes from the server."""
        self._end_session()

    def refused(self, status: int) -> None:
        """It answered a message with this HTTP status."""
        self._refusal = status

    def broken(self, why: str) -> None:
        """What it said was too much."""
        self._why_broken = why
        self._end_session()

    def list_changed(self) -> None:
        """It has other tools now."""
        self._list_changed.set()

    # Calls

    async def _answer(self, tool: str, arguments: JsonObject) -> mcp_types.CallToolResult:
        """A server that has forgotten the session did not run the call, so it is sent once more."""
        with suppress(_ForgottenError):
            return await self._ask(await self._connected(), tool, arguments)
        with suppress(_ForgottenError):
            return await self._ask(await self._connected(), tool, arguments)
        raise self._refuse("it keeps no session.")

    async def _connected(self) -> Client:
        if self._client is not None:
            return self._client
        if self._closing:
            raise self._refuse(STOPPING)
        pause_s = self._retry_at - _now()
        if pause_s > 0:
            raise self._refuse(f"it is tried again in {math.ceil(pause_s)} s.")
        self._wanted.set()
        return await asyncio.shield(self._next_client)

    async def _ask(
        self, client: Client, tool: str, arguments: JsonObject
    ) -> mcp_types.CallToolResult:
        call = asyncio.create_task(client.call_tool(tool, arguments), name=f"mcp {self.name} call")
        self._calls.add(call)
        call.add_done_callback(self._forget)
        try:
            await asyncio.wait([call])
        finally:
            call.cancel()
        try:
            return call.result()
        except asyncio.CancelledError:
            raise ToolError(self._lost()) from None
        except MCPError as error:
            raise self._refusal_of(client, error) from None
        except Exception as error:  # what the SDK raises about answers is of no one kind
            if client is not self._client:
                raise ToolError(self._lost()) from None
            log.warning(
                "an MCP server's answer is of wrong form",
                server=self.name,
                kind=type(error).__name__,
            )
            raise ToolError(
                f"The MCP server {self.name} gave an answer of wrong form. The tool has run."
            ) from None

    def _forget(self, call: asyncio.Task[mcp_types.CallToolResult]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # nobody may be left to look at it

    def _refusal_of(self, client: Client, error: MCPError) -> Exception:
        if self._handshake and self._refusal == 404 and error.code in SESSION_UNKNOWN:
            self._drop(client)
            return _ForgottenError()
        limit = limit_said(error.message)
        if error.code == NOT_TAKEN or limit is not None:
            what = limit or self._words(error.message)
            return ToolError(f"The MCP server {self.name} sent {what}. The tool has run.")
        if error.code == mcp_types.CONNECTION_CLOSED:
            return ToolError(self._lost())
        words = self._words(error.message)
        return ToolError(f"The MCP server {self.name} refused the call: {words}")

    def _lost(self) -> str:
        why = f": {self._why_broken}" if self._why_broken else "."
        return (
            f"The connection to the MCP server {self.name} ended before the tool answered{why} "
            "The call may have had an effect."
        )

    def _refuse(self, why: str) -> ToolError:
        return ToolError(
            f"The MCP server {self.name} does not run: {why} The tool has not been called."
        )

    def _drop(self, client: Client) -> None:
        """The session is of no use any more; the next call waits for another."""
        if client is self._client:
            self._end_session()

    def _end_session(self) -> None:
        self._client = None
        self._over.set()
        self._list_changed.set()

    # The task that owns the session

    async def _live(self) -> None:
        while not self._closing:
            self._over.clear()
            self._list_changed.clear()
            self._refusal = self._opened_at = None
            reason = await self._session()
            self._client = self._scope = None
            self._note_end(reason)
            self.tried.set()
            if not self._closing:
                await self._wait_to_be_wanted()

    async def _session(self) -> str:
        """One session from start to end. Answers why it ended."""
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + CONNECT_S) as self._scope:
                async with self._make_client() as client, anyio.create_task_group() as tasks:
                    await self._list(client)
                    self._scope.deadline = math.inf
                    self._open(client)
                    tasks.start_soon(self._listen, client)
                    await self._follow_changes(client)
                    tasks.cancel_scope.cancel()
        except Exception as error:  # the SDK raises groups of whatever went wrong in its tasks
            return self._reason(error)
        if self._why_broken:
            return self._why_broken
        return "it closed the connection." if self._opened_at else "it does not answer."

    def _make_client(self) -> Client:
        """With or without a question for the newest protocol, before `initialize`.

        Some old servers quit at that question. So a try that fails is followed by one of the other kind,
        and a session by one of its own kind.
        """
        return Client(
            reach(self._server, self._limits, self),
            mode="legacy" if self._handshake else "auto",
            message_handler=self._hear,
            client_info=mcp_types.Implementation(name="contextd", version="1"),
            cache=None,
        )

    def _open(self, client: Client) -> None:
        self._handshake = client.protocol_version in HANDSHAKE_PROTOCOL_VERSIONS
        self._opened_at = _now()
        self._why_broken = ""
        self._refusal = None  # of the question for the newest protocol, if any
        if self._over.is_set():
            return
        let_misfits_pass(client.session)
        self._client = client
        self._wanted.clear()
        self._next_client.set_result(client)
        self._next_client = _future()
        self.tried.set()
        log.info("an MCP server is ready", server=self.name, tools=len(self.tools))

    async def _follow_changes(self, client: Client) -> None:
        while not self._over.is_set():
            await self._list_changed.wait()
            self._list_changed.clear()
            if self._over.is_set():
                return
            await self._list_again(client)
            with anyio.move_on_after(LIST_PAUSE_S):
                await self._over.wait()

    async def _list_again(self, client: Client) -> None:
        try:
            with anyio.fail_after(LIST_S):
                await self._list(client)
        except (MCPError, TimeoutError, ValueError) as error:
            log.warning(
                "an MCP server did not list its tools",
                server=self.name,
                reason=self._reason(error),
            )

    async def _list(self, client: Client) -> None:
        tools: dict[str, Tool] = {}
        listed = 0
        known: set[str] = set()  # of the names in the server's entry
        cursor: str | None = None
        for _ in range(PAGES_MAX):
            page = await client.list_tools(cursor=cursor)
            listed += len(page.tools)
            known |= {tool.name for tool in page.tools} & self._named
            self._warn_of_wrong(page.tools)
            for tool in filter(self._is_taken, page.tools):
                made = offered(self._server, tool, partial(self.call, tool.name))
                tools.setdefault(made.name, made)  # of two with one name, the first counts
            cursor = page.next_cursor
            if cursor is None or listed > TOOLS_MAX:
                break
        self._warn_of_unknown(self._named - known)
        self._take(list(tools.values()), listed)

    def _is_taken(self, tool: mcp_types.Tool) -> bool:
        allowed = self._server.tools
        allowed_here = allowed is None or tool.name in allowed
        return allowed_here and wrong_with(tool) is None and _is_bounded(tool)

    def _warn_of_wrong(self, tools: Sequence[mcp_types.Tool]) -> None:
        """One tool of wrong form costs that tool, and is named."""
        for tool in tools:
            if wrong := wrong_with(tool):
                log.warning(
                    "a tool of an MCP server is of wrong form and is left out",
                    server=self.name,
                    tool=tool.name[:100],
                    reason=wrong,
                )

    def _take(self, tools: list[Tool], listed: int) -> None:
        self.tools = tools[:TOOLS_MAX]
        few = self._server.tools is None and len(tools) < listed
        if few or len(tools) > TOOLS_MAX:
            log.warning("an MCP server's tools are left out", server=self.name, listed=listed)
        self.answered = True
        self._changed()

    @property
    def _named(self) -> set[str]:
        """The tools that the server's entry names."""
        approved = self._server.requires_approval
        named = {*self._server.idempotent, *(self._server.tools or ())}
        return named | (set(approved) if isinstance(approved, tuple) else set())

    def _warn_of_unknown(self, missing: set[str]) -> None:
        """The file names tools that the server does not have: a slip of the pen can be unsafe."""
        if missing:
            log.warning(
                "an MCP server does not have all tools that its entry names",
                server=self.name,
                missing=sorted(missing),
            )

    async def _hear(self, message: object) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            self._list_changed.set()

    async def _listen(self, client: Client) -> None:
        """Newer servers say that their list has changed only to who asks for it."""
        tools = client.server_capabilities.tools
        if self._handshake or tools is None or not tools.list_changed:
            return
        pause_s = PAUSE_INITIAL_S
        while True:
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    self._list_changed.set()  # it may have changed before we listened
                    async for _ in changes:
                        self._list_changed.set()
            except Exception as error:  # whatever it is, the tools can still be called
                if isinstance(error, MCPError) and error.code == mcp_types.METHOD_NOT_FOUND:
                    return
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    # Between sessions

    def _note_end(self, reason: str) -> None:
        if self._closing:
            return
        if self._opened_at is None:
            self._handshake = not self._handshake
        pause_s = self._pause_s()
        self._retry_at = _now() + pause_s
        never = self._opened_at is None
        event = "an MCP server cannot be reached" if never else "an MCP server is lost"
        log.warning(event, server=self.name, reason=reason, pause_s=pause_s)
        if never or pause_s > 0:
            self._reject(reason)
            self._wanted.clear()

    def _pause_s(self) -> float:
        """A session that lasted is followed by another at once, and so is the first that did not."""
        if self._opened_at is not None and _now() - self._opened_at > PAUSE_MAX_S:
            self._failures = 0
            return 0.0
        self._failures += 1
        pauses = self._failures - (self._opened_at is not None)
        return min(PAUSE_INITIAL_S * 2 ** (pauses - 1), PAUSE_MAX_S) if pauses else 0.0

    async def _wait_to_be_wanted(self) -> None:
        pause_s = None if self.answered else self._retry_at - _now()
        with anyio.move_on_after(pause_s):
            await self._wanted.wait()

    def _reject(self, why: str) -> None:
        """Whoever waits for the next session does not get it."""
        self._next_client.set_exception(self._refuse(why))
        self._next_client.exception()  # nobody may be waiting
        self._next_client = _future()

    def _reason(self, error: BaseException) -> str:
        if self._why_broken:
            return self._why_broken
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        status = "" if self._refusal is None else f"HTTP {self._refusal}: "
        match error:
            case MCPError(code=mcp_types.CONNECTION_CLOSED):
                return f"{status}it closed the connection."
            case MCPError():
                return f"{status}{self._words(error.message)}"
            case OSError(strerror=str(words)):
                path = self._server.conceal(str(error.filename or self._server.command))
                return f"it cannot be started: {words}: {path}."
            case httpx2.HTTPError():
                return f"it cannot be reached: {type(error).__name__}."
            case _:
                # Its text may hold anything that the server has said.
                return f"{status}{type(error).__name__}."

    def _words(self, text: str) -> str:
        """A server's own words, for one line of an error."""
        line = " ".join(self._server.conceal(text).split())
        return line[:WORDS_CHARS_MAX]


def _is_bounded(tool: mcp_types.Tool) -> bool:
    """Lists are kept for as long as the server is known."""
    schema = len(msgspec.json.encode(tool.input_schema))
    return len(tool.name) <= NAME_CHARS_MAX and schema <= SCHEMA_BYTES_MAX


class _ForgottenError(Exception):
    """The server does not know the session any more."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _future() -> asyncio.Future[Client]:
    return asyncio.get_running_loop().create_future()


async def _stopped(tasks: Iterable[asyncio.Task[Any]], timeout_s: float) -> None:
    """Waits for the tasks, cancels those that take too long, and does not wait for ever."""
    left = set(tasks)
    if left:
        _, left = await asyncio.wait(left, timeout=timeout_s)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=CANCEL_S)
