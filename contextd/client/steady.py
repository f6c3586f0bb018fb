"""An httpx client whose requests may be cancelled at any moment.

httpcore protects its cleaning up from the cancellation of anyio, but not from that of asyncio: a task
that was cancelled while an answer was being closed left the connection in the pool for ever, in use by
nobody. So each step of an exchange runs in a task of its own. Whoever is cancelled while it waits for a
step has it ended in anyio's way, and goes on when it has ended.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import httpx

T = TypeVar("T")

_leaving: set["asyncio.Task[None]"] = set()  # asyncio itself does not keep tasks alive


class SteadyClient(httpx.AsyncClient):
    """An `httpx.AsyncClient` that leaves no connection in use behind, whenever it is cancelled."""

    async def send(
        self, request: httpx.Request, *, stream: bool = False, **options: Any
    ) -> httpx.Response:
        """As `httpx.AsyncClient.send`, on which all other methods stand."""
        send = partial(super().send, request, stream=stream, **options)
        response = await steadily(send, undo=httpx.Response.aclose)
        if stream and isinstance(response.stream, httpx.AsyncByteStream):
            response.stream = _SteadyStream(response.stream)
        return response


class _SteadyStream(httpx.AsyncByteStream):
    """A body that is read and closed in steady steps."""

    def __init__(self, inner: httpx.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._inner)
        while (part := await steadily(lambda: _next(parts))) is not None:
            yield part

    async def aclose(self) -> None:
        await steadily(self._inner.aclose)


async def _next(parts: AsyncIterator[bytes]) -> bytes | None:
    return await anext(parts, None)


async def _nothing(_: Any) -> None:
    pass


async def steadily(
    step: Callable[[], Awaitable[T]], *, undo: Callable[[T], Awaitable[None]] = _nothing
) -> T:
    """What `step` comes to. A cancelled caller leaves when `step` has ended and cleaned up.

    `undo` is for a result that came too late for a caller that was cancelled.
    """
    scope = anyio.CancelScope()
    task = asyncio.create_task(_scoped(step, scope))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        leaving = asyncio.create_task(_leave(task, scope, undo))
        _leaving.add(leaving)
        leaving.add_done_callback(_leaving.discard)
        await asyncio.wait([leaving])
        raise
    return task.result()


async def _scoped(step: Callable[[], Awaitable[T]], scope: anyio.CancelScope) -> T:
    with scope:
        return await step()
    raise asyncio.CancelledError


async def _leave(
    task: "asyncio.Task[T]", scope: anyio.CancelScope, undo: Callable[[T], Awaitable[None]]
) -> None:
    scope.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and task.exception() is None:
        await undo(task.result())
