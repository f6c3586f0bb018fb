"""The agent loop: runs a turn from where it stands to its end (§6).

Theory of operation. A turn is a task of its own: no request and no viewer keeps it alive or ends it.
The loop holds no state of the turn in memory but what it is about to write: each step is committed by
`Steps`, and after a crash another run of the same loop goes on from the state that is stored. Chunks
are read from the provider into a short queue while the commit before is under way, and what has
gathered goes into the next one; a provider that is faster than the disk is slowed by that queue.

A turn that was cancelled, deleted or taken over by another process is noticed in three ways, whichever
comes first: the ledger says so (same process), the next write is refused, or its lease is not renewed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from itertools import groupby
from typing import TypeVar

import msgspec
import structlog

from contextd.core.errors import (
    ContextdError,
    ContextNotFound,
    MessageClosed,
    MessageNotFound,
    Overloaded,
    ShuttingDown,
    StaleProducer,
)
from contextd.core.machine import State
from contextd.core.message import TEXT, THINKING, Problem, Role, Usage
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    HistoryMessage,
    ModelRequest,
    Provider,
    ProviderError,
    TextDelta,
    ThinkingDelta,
    ToolCallRequest,
    TransientError,
    UsageReport,
)
from contextd.service import Ledger, Recovery, Steps, TurnListener, TurnLostError, TurnView
from contextd.service.recovery import RESPONDING
from contextd.settings import Settings
from contextd.store.appends import utf8_bytes
from contextd.store.notices import StartedTurn
from contextd.store.reader import Reader
from contextd.store.tail import LiveMessage
from contextd.store.writer import Unconfirmed

log = structlog.get_logger(__name__)

T = TypeVar("T")

INBOX_EVENTS_MAX = 1024  # read ahead of the commit; then the provider is slowed
RELEASE_S = 1.0
PROVIDER_CLOSE_S = 0.25  # §6: a stopped turn lets go of its provider within this
HISTORY_MESSAGES_MAX = 1000
STORE_RETRY_S = 0.5
LEASE_RENEWALS = 3  # in the time of one lease, so that one may be lost

UNCONFIRMED = Problem(
    type="unconfirmed", message="The database's answer was lost in the middle of this."
)

_LOST = (TurnLostError, MessageClosed, MessageNotFound, StaleProducer, ContextNotFound)


class _Ended(msgspec.Struct, frozen=True):
    """The provider's stream is over, with the error that ended it."""

    error: Exception | None


class Reply:
    """One answer of the model as it is being written: the open message and what is known so far."""

    def __init__(self) -> None:
        self.live: LiveMessage | None = None
        self.usage: Usage | None = None
        self.finish_reason: str | None = None


class Turns(TurnListener):
    """Runs turns. `jitter` is in [0, 1); tests own it as they own the clock."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        steps: Steps,
        recovery: Recovery,
        reader: Reader,
        providers: Mapping[str, Provider],
        settings: Settings,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._ledger = ledger
        self._steps = steps
        self._recovery = recovery
        self._reader = reader
        self._providers = providers
        self._settings = settings
        self._jitter = jitter
        self._tasks: dict[str, tuple[StartedTurn, asyncio.Task[None]]] = {}
        self._closing = False
        self.outcomes: Counter[str] = Counter()
        self.retries = 0
        ledger.listener = self

    @property
    def running(self) -> int:
        """Turns that this process works on."""
        return len(self._tasks)

    def turn_started(self, turn: StartedTurn) -> None:
        """Starts the turn's task."""
        if self._closing:
            return
        task = asyncio.create_task(self._run(turn), name=f"turn-{turn.id}")
        self._tasks[turn.id] = turn, task
        task.add_done_callback(lambda _: self._forget(turn.id, task))

    def turn_stopped(self, turn_id: str) -> None:
        """Stops the turn's task where it is."""
        _, task = self._tasks.get(turn_id, (None, None))
        if task is not None and task.cancel():
            self.outcomes["cancelled"] += 1

    async def recover(self) -> None:
        """Goes on with what a process that is gone has left."""
        await self._recovery.recover()

    async def keep(self) -> None:
        """Forever: renews the leases of running turns, and claims turns whose owner is gone."""
        while True:
            await asyncio.sleep(self._settings.lease_s / LEASE_RENEWALS)
            try:
                await self._renew()
                await self._recovery.recover()
            except ShuttingDown:
                return
            except Exception:
                log.exception("looking after the turns failed; the next round tries again")

    async def close(self) -> None:
        """Stops all tasks where they are; the turns stay as stored and are recovered later."""
        self._closing = True
        tasks = [task for _, task in self._tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PROVIDER_CLOSE_S * 2)
        with suppress(ContextdError, TimeoutError):
            # Only a courtesy to other processes: without it they wait for the leases to run out.
            async with asyncio.timeout(RELEASE_S):
                await self._recovery.release_leases()

    def _forget(self, turn_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(turn_id, (None, None))[1] is task:
            del self._tasks[turn_id]

    async def _renew(self) -> None:
        mine = {turn.key: turn for turn, _ in self._tasks.values()}
        if not mine:
            return
        for key in mine.keys() - await self._recovery.renew_leases(list(mine)):
            self._ledger.tail.drop_streaming(mine[key].context_id)
            self.turn_stopped(mine[key].id)

    async def _run(self, turn: StartedTurn) -> None:
        """The turn's one task: whatever happens, it ends in a step or leaves the turn to recovery."""
        with structlog.contextvars.bound_contextvars(context_id=turn.context_id, turn_id=turn.id):
            try:
                await self._run_or_fail(turn)
            except _LOST:
                # Closed elsewhere: what the tail says of its messages is out of date.
                self._ledger.tail.drop_streaming(turn.context_id)
                log.info("the turn was taken away")
            except ShuttingDown:
                pass
            except Exception:
                log.exception("the turn could not be ended; recovery will look after it")

    async def _run_or_fail(self, turn: StartedTurn) -> None:
        limit: asyncio.Timeout | None = None
        try:
            view = await self._stored(lambda: self._steps.view(turn))
            left_s = self._settings.turn_timeout_s - view.worked_ms / 1000
            async with asyncio.timeout(max(0.0, left_s)) as limit:
                await self._drive(turn, view)
            return
        except TimeoutError:
            if limit is None or not limit.expired():
                raise  # another's, and no word on how long the turn took
            error = Problem(
                type="turn_timeout",
                message=f"The turn took longer than {self._settings.turn_timeout_s:g} s.",
            )
        except (*_LOST, ShuttingDown):
            raise
        except Exception:
            log.exception("the turn failed by a defect")
            error = Problem(type="internal_error", message="Something went wrong on the server.")
        await self._fail(turn, error, None)

    async def _drive(self, turn: StartedTurn, view: TurnView) -> None:
        """From the state that is stored, step by step, to the end."""
        current: TurnView | None = view
        uncertain = False
        while current is not None:
            try:
                if uncertain:
                    current = await self._look_again(turn)
                    uncertain = False
                current = await self._advance(turn, current)
            except Unconfirmed:
                uncertain = True

    async def _advance(self, turn: StartedTurn, view: TurnView) -> TurnView | None:
        """One step of the turn. None when it has ended."""
        match view.state:
            case State.PROCESSING_USER_MESSAGE:
                return await self._stored(lambda: self._steps.request_llm(turn))
            case State.TRANSIENT_FAILURE:
                return await self._try_again(turn, view)
            case State.AWAITING_LLM_RESPONSE:
                return await self._respond(turn, view)
            case State.PROCESSING_LLM_RESPONSE:
                await self._stored(lambda: self._steps.finish(turn))
                self.outcomes["completed"] += 1
                return None
            case _:
                raise RuntimeError(f"no turn of this process stands in {view.state}")

    async def _look_again(self, turn: StartedTurn) -> TurnView:
        """A step's answer was lost with the database's connection: it was done, or it was not.

        The turn goes on from what is stored. An answer that was being read is asked for again.
        """
        await asyncio.sleep(STORE_RETRY_S)
        view = await self._stored(lambda: self._steps.view(turn))
        if view.state in RESPONDING:
            await self._steps.fail_transiently(turn, UNCONFIRMED, wait_ms=0, usage=None)
            view = msgspec.structs.replace(view, state=State.TRANSIENT_FAILURE)
        return view

    async def _try_again(self, turn: StartedTurn, view: TurnView) -> TurnView | None:
        if view.attempt >= self._settings.attempts_max:
            error = Problem(
                type="attempts_exhausted",
                message=f"The model did not answer in {view.attempt} attempts.",
            )
            await self._fail(turn, error, None)
            return None
        self.retries += 1
        return await self._stored(lambda: self._steps.request_llm(turn))

    async def _respond(self, turn: StartedTurn, view: TurnView) -> TurnView | None:
        """One request to the model. None when the turn has ended."""
        reply = Reply()
        try:
            await self._stream(turn, view, reply)
        except TransientError as error:
            return await self._back_off(turn, view, reply, error)
        except FatalError as error:
            await self._fail(turn, _problem(error), reply.usage)
            return None
        await self._stored(
            lambda: self._steps.end_stream(
                turn, finish_reason=reply.finish_reason, usage=reply.usage
            )
        )
        return msgspec.structs.replace(view, state=State.PROCESSING_LLM_RESPONSE)

    async def _back_off(
        self, turn: StartedTurn, view: TurnView, reply: Reply, error: TransientError
    ) -> TurnView | None:
        if view.attempt >= self._settings.attempts_max:
            await self._fail(turn, _problem(error), reply.usage)
            return None
        wait_s = self._wait_s(view.attempt, error.retry_after_s)
        await self._stored(
            lambda: self._steps.fail_transiently(
                turn, _problem(error), wait_ms=round(wait_s * 1000), usage=reply.usage
            )
        )
        await asyncio.sleep(wait_s)
        return msgspec.structs.replace(view, state=State.TRANSIENT_FAILURE)

    def _wait_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Doubles with each attempt, with jitter, so that many turns do not come back together."""
        settings = self._settings
        ceiling = min(settings.backoff_max_s, settings.backoff_initial_s * 2.0 ** (attempt - 1))
        return max(ceiling * (0.5 + self._jitter() / 2), retry_after_s or 0.0)

    async def _fail(self, turn: StartedTurn, error: Problem, usage: Usage | None) -> None:
        await self._stored(lambda: self._steps.fail(turn, error, usage=usage))
        self.outcomes["failed"] += 1
        log.warning("the turn failed", error_type=error.type)

    async def _stream(self, turn: StartedTurn, view: TurnView, reply: Reply) -> None:
        """Reads the provider's events and writes them, several chunks to a commit."""
        provider = self._provider(view)
        events = provider.stream(await self._stored(lambda: self._request(turn, view)))
        inbox: asyncio.Queue[Event | _Ended] = asyncio.Queue(INBOX_EVENTS_MAX)
        pump = asyncio.create_task(_pump(events, inbox), name=f"provider-{turn.id}")
        try:
            ended: _Ended | None = None
            while ended is None:
                batch = await self._next_events(inbox)
                if isinstance(batch[-1], _Ended):
                    ended = batch.pop()  # type: ignore[assignment]
                await self._write(turn, reply, batch)  # type: ignore[arg-type]
            if isinstance(ended.error, ProviderError):
                raise ended.error
            if ended.error is not None:
                log.error("the provider failed by a defect", exc_info=ended.error)
                raise FatalError("provider_error", "The provider failed by a defect.")
        finally:
            pump.cancel()
            await asyncio.wait([pump], timeout=PROVIDER_CLOSE_S)

    async def _next_events(self, inbox: asyncio.Queue[Event | _Ended]) -> list[Event | _Ended]:
        """What has gathered, one event at least. Raises `TransientError` when none comes in time."""
        try:
            async with asyncio.timeout(self._settings.token_timeout_s):
                batch = [await inbox.get()]
        except TimeoutError:
            raise TransientError(
                "provider_timeout",
                f"The model sent nothing for {self._settings.token_timeout_s:g} s.",
            ) from None
        while not inbox.empty():
            batch.append(inbox.get_nowait())
        return batch

    async def _write(self, turn: StartedTurn, reply: Reply, events: Sequence[Event]) -> None:
        for type_, group in groupby(events, key=type):
            if type_ is TextDelta or type_ is ThinkingDelta:
                kind = TEXT if type_ is TextDelta else THINKING
                texts = [
                    piece
                    for delta in group
                    for piece in _chunks(delta.content, self._settings.chunk_bytes_max)  # type: ignore[union-attr]
                ]
                if texts:
                    await self._write_chunks(turn, reply, kind, texts)
                continue
            for event in group:
                self._note(reply, event)

    async def _write_chunks(
        self, turn: StartedTurn, reply: Reply, kind: str, texts: list[str]
    ) -> None:
        live = reply.live
        if live is None or live.kind != kind:
            reply.live = await self._stored(
                lambda: self._steps.open_message(turn, kind=kind, texts=texts)
            )
            return
        await self._append(turn, live, texts, first=live.head + 1)

    async def _append(
        self, turn: StartedTurn, live: LiveMessage, texts: list[str], first: int
    ) -> None:
        try:
            await self._ledger.append(live, fence=turn.fence, texts=texts, first=first)
        except Overloaded:
            # Stored or not, with its first sequence it can be said again.
            await asyncio.sleep(STORE_RETRY_S)
            await self._append(turn, live, texts, first)

    def _note(self, reply: Reply, event: Event) -> None:
        match event:
            case UsageReport(usage):
                reply.usage = usage if reply.usage is None else reply.usage + usage
            case Finished(reason):
                reply.finish_reason = reason
            case ToolCallRequest(name=name):
                raise FatalError(
                    "tools_unavailable", f"The model asked for the tool {name!r}; there is none."
                )
            case _:
                raise AssertionError(event)

    def _provider(self, view: TurnView) -> Provider:
        name = view.provider or self._settings.provider
        provider = self._providers.get(name)
        if provider is None:
            raise FatalError("unknown_provider", f"This server has no provider {name!r}.")
        return provider

    async def _request(self, turn: StartedTurn, view: TurnView) -> ModelRequest:
        found = await self._reader.history(
            turn.context_id,
            view.branch,
            messages_max=HISTORY_MESSAGES_MAX,
            bytes_max=self._settings.history_bytes_max,
        )
        return ModelRequest(
            context_id=turn.context_id,
            turn_id=turn.id,
            attempt=view.attempt,
            system_prompt=view.system_prompt or self._settings.system_prompt,
            model=view.model or self._settings.model,
            history=[HistoryMessage(role=Role(row.role), content=text) for row, text in found],
        )

    async def _stored(self, write: Callable[[], Awaitable[T]]) -> T:
        """Writes, and again for as long as the database does not take it: the turn's time bounds it.

        Raises `Unconfirmed` where nobody knows whether it was taken.
        """
        while True:
            try:
                return await write()
            except Unconfirmed:
                raise
            except Overloaded:
                await asyncio.sleep(STORE_RETRY_S)


def _problem(error: ProviderError) -> Problem:
    return Problem(type=error.type, message=error.message)


async def _pump(events: AsyncGenerator[Event, None], inbox: asyncio.Queue[Event | _Ended]) -> None:
    """Reads the provider in a task of its own, so that its generator is closed where it runs."""
    error: Exception | None = None
    try:
        async with aclosing(events) as stream:
            async for event in stream:
                await inbox.put(event)
    except Exception as raised:
        error = raised
    await inbox.put(_Ended(error))


def _chunks(content: str, bytes_max: int) -> Iterator[str]:
    """A model's delta as chunks: no U+0000 (§3.1), none larger than the limit (§7)."""
    content = content.replace("\x00", "\ufffd")
    if utf8_bytes(content) <= bytes_max:
        if content:
            yield content
        return
    step = bytes_max // 4 or 1  # a character is four bytes at most
    for start in range(0, len(content), step):
        yield content[start : start + step]
