"""The client for scripts: `Client` without `await`.

The async client runs on an event loop in a thread of its own. Each method here hands its call over to
it and waits. What a method does, and its signature, is `Client`'s: nothing is written twice.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    contextmanager,
)
from functools import partial, update_wrapper
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack, overload

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from contextd.client.api import DEFAULT_URL, Client
from contextd.client.producing import ProducedMessage, ProduceOptions
from contextd.client.wrapping import whole
from contextd.core.message import Usage

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")


class _Bridged(Generic[A]):
    """`inner` is asynchronous; `portal` leads to the thread that it lives in."""

    def __init__(self, inner: A, portal: BlockingPortal | None) -> None:
        self._inner = inner
        self._portal = portal

    @property
    def _way(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("Use it as `with SyncClient(url) as client`.")
        return self._portal

    def _wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` comes to. Ctrl-C while it is waited for ends it."""
        future = self._way.start_task_soon(call)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class _Steps(Generic[T]):
    """An async generator step by step. One that was cancelled has ended before the next begins."""

    def __init__(self, items: AsyncGenerator[T]) -> None:
        self._items = items
        self._stepping = asyncio.Lock()

    async def next(self) -> tuple[T] | None:
        """The next item, or None after the last."""
        async with self._stepping:
            async for item in self._items:
                return (item,)
            return None

    async def close(self) -> None:
        """Ends the generator where it is."""
        async with self._stepping:
            await self._items.aclose()


def _waiting(
    method: Callable[Concatenate[A, P], Awaitable[T]],
) -> Callable[Concatenate[_Bridged[A], P], T]:
    """`method`, waited for."""

    def call(self: _Bridged[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(partial(method, self._inner, *args, **kwargs))

    update_wrapper(call, method)
    return call


def _iterating(
    method: Callable[Concatenate[A, P], AsyncGenerator[T]],
) -> Callable[Concatenate[_Bridged[A], P], Generator[T, None, None]]:
    """`method` as an iterator."""

    def call(self: _Bridged[A], /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        steps = _Steps(method(self._inner, *args, **kwargs))
        try:
            while found := self._wait(steps.next):
                yield found[0]
        finally:
            self._wait(steps.close)

    update_wrapper(call, method)
    return call


def _producing(
    method: Callable[Concatenate[A, P], AbstractAsyncContextManager[ProducedMessage]],
) -> Callable[Concatenate[_Bridged[A], P], AbstractContextManager["SyncProducedMessage"]]:
    """`method` as a context manager."""

    def call(
        self: _Bridged[A], /, *args: P.args, **kwargs: P.kwargs
    ) -> AbstractContextManager[SyncProducedMessage]:
        return _entered(self, method(self._inner, *args, **kwargs), self._way)

    update_wrapper(call, method)
    return call


@contextmanager
def _entered(
    way: "_Bridged[Any]",
    opened: AbstractAsyncContextManager[ProducedMessage],
    portal: BlockingPortal,
) -> Iterator["SyncProducedMessage"]:
    block = _Block(opened)
    try:
        message = way._wait(block.enter)
        yield SyncProducedMessage(message, portal)
    except BaseException as error:
        way._wait(partial(block.leave, error))
        raise
    way._wait(partial(block.leave, None))


class _Block:
    """An async `with` in two calls. An entry that Ctrl-C ended has ended before it is left."""

    def __init__(self, opened: AbstractAsyncContextManager[ProducedMessage]) -> None:
        self._opened = opened
        self._stepping = asyncio.Lock()
        self._is_entered = False

    async def enter(self) -> ProducedMessage:
        async with self._stepping:
            message = await self._opened.__aenter__()
            self._is_entered = True
            return message

    async def leave(self, error: BaseException | None) -> None:
        """Raises what leaving raises, other than `error`."""
        async with self._stepping:
            if not self._is_entered:
                return
            self._is_entered = False
            try:
                trace = error.__traceback__ if error else None
                await self._opened.__aexit__(type(error) if error else None, error, trace)
            except BaseException as raised:
                if raised is not error:
                    raise


class SyncProducedMessage(_Bridged[ProducedMessage]):
    """A `ProducedMessage` without `await`."""

    write = _waiting(ProducedMessage.write)
    flush = _waiting(ProducedMessage.flush)
    complete = _waiting(ProducedMessage.complete)
    fail = _waiting(ProducedMessage.fail)
    stored_text = _waiting(ProducedMessage.stored_text)

    @property
    def id(self) -> str:
        """The message's."""
        return self._inner.id

    @property
    def context_id(self) -> str:
        """Where it is."""
        return self._inner.context_id

    @property
    def epoch(self) -> int:
        """In which it is written."""
        return self._inner.epoch

    @property
    def sequence(self) -> int:
        """How many chunks are durable: where the stored text ends."""
        return self._inner.sequence

    @property
    def finish_reason(self) -> str | None:
        """Goes with the completion."""
        return self._inner.finish_reason

    @finish_reason.setter
    def finish_reason(self, reason: str | None) -> None:
        self._inner.finish_reason = reason

    @property
    def usage(self) -> Usage | None:
        """Goes with the completion."""
        return self._inner.usage

    @usage.setter
    def usage(self, usage: Usage | None) -> None:
        self._inner.usage = usage


class SyncClient(_Bridged[Client]):
    """One server's contexts, as `with SyncClient(url) as client`.

    Methods are those of `Client`, with the same arguments, results and errors. It may be used by
    several threads at once.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout_s: float = 10.0,
        heartbeat_s: float = 15.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        client = Client(base_url, timeout_s=timeout_s, heartbeat_s=heartbeat_s, transport=transport)
        super().__init__(client, None)
        self.base_url = base_url
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._stack.callback(self._wait, self._inner.aclose)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._portal = None

    create_context = _waiting(Client.create_context)
    get_context = _waiting(Client.get_context)
    update_context = _waiting(Client.update_context)
    delete_context = _waiting(Client.delete_context)
    list_contexts = _waiting(Client.list_contexts)
    contexts = _iterating(Client.contexts)
    send = _waiting(Client.send)
    get_message = _waiting(Client.get_message)
    message_pages = _iterating(Client.message_pages)
    messages = _iterating(Client.messages)
    pull = _waiting(Client.pull)
    pull_range = _waiting(Client.pull_range)
    get_turn = _waiting(Client.get_turn)
    turns = _iterating(Client.turns)
    transitions = _iterating(Client.transitions)
    cancel = _waiting(Client.cancel)
    retry = _waiting(Client.retry)
    retry_turn = _waiting(Client.retry_turn)
    tool_calls = _iterating(Client.tool_calls)
    decide = _waiting(Client.decide)
    approve = _waiting(Client.approve)
    deny = _waiting(Client.deny)
    post_result = _waiting(Client.post_result)
    workflows = _iterating(Client.workflows)
    branches = _iterating(Client.branches)
    get_branch = _waiting(Client.get_branch)
    create_branch = _waiting(Client.create_branch)
    delete_branch = _waiting(Client.delete_branch)
    merge = _waiting(Client.merge)
    signals = _iterating(Client.signals)
    follow = _iterating(Client.follow)
    produce = _producing(Client.produce)

    @overload
    def wrap(
        self,
        context_id: str,
        source: Iterable[str],
        *,
        text: None = None,
        **options: Unpack[ProduceOptions],
    ) -> Generator[str, None, None]: ...
    @overload
    def wrap(
        self,
        context_id: str,
        source: Iterable[T],
        *,
        text: Callable[[T], str | None],
        **options: Unpack[ProduceOptions],
    ) -> Generator[T, None, None]: ...
    def wrap(
        self,
        context_id: str,
        source: Iterable[Any],
        *,
        text: Callable[[Any], str | None] | None = None,
        **options: Unpack[ProduceOptions],
    ) -> Generator[Any, None, None]:
        """As `Client.wrap`, for a source that is iterated here, in the caller's thread."""
        pick = text or whole
        items = iter(source)
        with self.produce(context_id, **options) as message:
            try:
                for item in items:
                    if found := pick(item):
                        message.write(found)
                    yield item
            finally:
                if isinstance(items, Generator):
                    items.close()
