"""An MCP server as a child process: lines of JSON over its standard input and output (§8).

In place of the SDK's own transport, which puts a line together however long it is, looks at every
notification of a flood, and takes 4 s to end a child that does not want to.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TextIO

import anyio
import mcp_types
import msgspec
from anyio.abc import Process
from mcp.client.stdio import get_default_environment
from mcp.os.posix.utilities import terminate_posix_process_tree
from mcp.shared.message import SessionMessage
from msgspec import UNSET

from contextd.tools.mcp_file import McpServer
from contextd.tools.mcp_limits import (
    LIST_CHANGED,
    EndlessLineError,
    Lines,
    McpLimits,
    TooLong,
    TooManyError,
    answered_id,
    is_heard,
    readable,
)

UNASKED_PER_S_MAX = 100  # requests and notifications of the server; more are dropped

FLUSH_S = 0.5  # for what is still to be written, before its input is closed
LEAVE_S = 1.0  # to leave by itself after that; then SIGTERM
TERMINATE_S = 0.5  # then SIGKILL
_POLL_S = 0.01
_READ_BYTES = 64 * 1024

# Of errors that are made here, in place of an answer that could not be taken.
NOT_TAKEN = -32098

_ENDED = (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError, OSError)


class _Envelope(msgspec.Struct):
    id: Any = UNSET
    method: Any = UNSET


@asynccontextmanager
async def child(
    server: McpServer,
    command: str,
    errors: TextIO,
    *,
    limits: McpLimits,
    list_changed: Callable[[], None],
    broken: Callable[[str], None],
) -> AsyncGenerator[tuple[Any, Any]]:
    """A transport for the SDK's client. Raises `OSError` where the command cannot be started.

    `broken` is told why nothing more is read. On leaving the child's input is closed; after `LEAVE_S` it
    and its own children get SIGTERM, and after `TERMINATE_S` more SIGKILL.
    """
    process = await anyio.open_process(
        [command, *server.args],
        env=get_default_environment() | server.env,
        stderr=errors,
        cwd=server.cwd,
        start_new_session=True,
    )
    wire = _Wire(process, limits=limits, list_changed=list_changed, broken=broken)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wire.read)
        tasks.start_soon(wire.write)
        try:
            yield wire.incoming, wire.outgoing
        finally:
            # Also when the caller is cancelled: a child must not be left behind.
            with anyio.CancelScope(shield=True):
                await wire.close()
            tasks.cancel_scope.cancel()


class _Wire:
    """One child's pipes, as streams of messages."""

    def __init__(
        self,
        process: Process,
        *,
        limits: McpLimits,
        list_changed: Callable[[], None],
        broken: Callable[[str], None],
    ) -> None:
        self._process = process
        self._input: Any = process.stdin  # both are pipes
        self._output: Any = process.stdout
        self._limits = limits
        self._list_changed = list_changed
        self._broken = broken
        self._second = 0
        self._unasked = 0
        self._read_to, self.incoming = anyio.create_memory_object_stream[Any](0)
        self.outgoing, self._write_from = anyio.create_memory_object_stream[SessionMessage](0)
        self._written = anyio.Event()

    async def read(self) -> None:
        """What the child says, message by message, until it or we have had enough."""
        with suppress(*_ENDED):
            async with self._read_to:
                await self._read_lines()

    async def _read_lines(self) -> None:
        lines = Lines(self._limits.message_bytes_max)
        try:
            while True:
                for line in lines.take(await self._output.receive(_READ_BYTES)):
                    message = self._message(line)
                    if message is not None:
                        await self._read_to.send(message)
        except _UnansweredError:
            self._broken(f"it sent {self._limits.too_long}.")
        except EndlessLineError:
            self._broken(f"it sent {self._limits.too_long}, without an end.")

    def _message(self, line: bytes | TooLong) -> SessionMessage | None:
        """None for what nobody needs."""
        if isinstance(line, TooLong):
            if line.answers is None:
                raise _UnansweredError
            return _not_taken(line.answers, self._limits.too_long)
        try:
            envelope = msgspec.json.decode(line, type=_Envelope)
            if envelope.method is not UNSET and not self._is_heard(envelope):
                return None
            return SessionMessage(
                mcp_types.jsonrpc_message_adapter.validate_json(readable(line), by_name=False)
            )
        except TooManyError as error:
            id_ = answered_id(line)
            return None if id_ is None else _not_taken(id_, str(error))
        except (ValueError, RecursionError):
            # Not logged: it may be anything. Whoever waits for it need not wait in vain.
            id_ = answered_id(line)
            return None if id_ is None else _not_taken(id_, "an answer that cannot be read")

    def _is_heard(self, envelope: _Envelope) -> bool:
        """Of what the server says unasked: whether the SDK's client is to see it."""
        method = str(envelope.method)
        if envelope.id is UNSET and not is_heard(method):
            return False
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._unasked = second, 0
        self._unasked += 1
        if self._unasked <= UNASKED_PER_S_MAX:
            return True
        if method == LIST_CHANGED:
            self._list_changed()
        return False

    async def write(self) -> None:
        """What we say. Where it cannot be said the session ends: nobody would answer."""
        try:
            async with self._write_from:
                async for message in self._write_from:
                    said = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await self._input.send(said.encode() + b"\n")
        except _ENDED:
            await self._read_to.aclose()
        finally:
            self._written.set()

    async def close(self) -> None:
        """Ends the child, whatever it does; takes at most about 2 s."""
        self.incoming.close()
        self.outgoing.close()
        with anyio.move_on_after(FLUSH_S):
            await self._written.wait()
        with suppress(*_ENDED):
            await self._input.aclose()
        if not await self._has_left(LEAVE_S):
            await terminate_posix_process_tree(self._process, TERMINATE_S)
            await self._has_left(TERMINATE_S)
        with suppress(*_ENDED):
            await self._output.aclose()
        _release(self._process)

    async def _has_left(self, within_s: float) -> bool:
        """Polled: `wait` would also wait for whoever has inherited the pipes."""
        with anyio.move_on_after(within_s):
            while self._process.returncode is None:  # noqa: ASYNC110 - nothing else tells
                await anyio.sleep(_POLL_S)
        return self._process.returncode is not None


class _UnansweredError(Exception):
    """A message is too long, and it cannot be told which call it was for."""


def _not_taken(id_: int | str, what: str) -> SessionMessage:
    error = mcp_types.ErrorData(code=NOT_TAKEN, message=what)
    return SessionMessage(mcp_types.JSONRPCError(jsonrpc="2.0", id=id_, error=error))


def _release(process: Process) -> None:
    """Closes the loop's own transport: it stays open while a grandchild holds a pipe's end."""
    transport = getattr(getattr(process, "_process", None), "_transport", None)
    if transport is not None:
        with suppress(PermissionError):
            transport.close()
