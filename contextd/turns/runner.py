"""The agent loop: runs a turn from where it stands to its end (§6).

Theory of operation. A turn is a task of its own: no request and no viewer keeps it alive or ends it.
The loop holds no state of the turn in memory but what it is about to write: each step is committed by
`Steps`, and after a crash another run of the same loop goes on from the state that is stored. Chunks
are read from the provider into a short queue while the commit before is under way, and what has
gathered goes into the next one; a provider that is faster than the disk is slowed by that queue.

A turn that was cancelled, deleted or taken over by another process is noticed in three ways, whichever
comes first: the ledger says so (same process), the next write is refused, or a look does not find it.

What the ledger says can be lost, with the answer of a commit. So each look compares the turns that are
this process's with the tasks that run. A turn without a task gets one, in the order of the commits, and a
task under an older fence is stopped by its successor: no turn ever has two.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import msgspec
import structlog
from prometheus_client import Histogram

from contextd.core.errors import (
    ContextdError,
    ContextNotFound,
    MessageClosed,
    MessageNotFound,
    ShuttingDown,
    StaleProducer,
    defect_in,
)
from contextd.core.machine import RESPONDING_STATES, WAITING_STATES, State
from contextd.core.message import Problem, Usage
from contextd.provider import (
    FatalError,
    InputTooLongError,
    ModelRequest,
    Provider,
    ProviderError,
    ToolOffer,
    TransientError,
)
from contextd.service import (
    CallSteps,
    Ledger,
    Payloads,
    Recovery,
    Steps,
    Toolset,
    TurnListener,
    TurnLostError,
    TurnView,
)
from contextd.settings import Settings, environment_name
from contextd.store.history import History, Told
from contextd.store.notices import StartedTurn
from contextd.store.writer import Unconfirmed
from contextd.turns.budget import Budget, Fitted
from contextd.turns.executing import Executing
from contextd.turns.history import build_history
from contextd.turns.reply import PROVIDER_CLOSE_S, STORE_RETRY_S, Reply, stored, stored_together

log = structlog.get_logger(__name__)

RELEASE_S = 1.0
HISTORY_MESSAGES_MAX = 1000
DEFECT_WAIT_S, DEFECT_WAIT_MAX_S = 1.0, 60.0  # before a turn that failed by a defect goes on

BROKEN_OFF = Problem(type="interrupted", message="The server lost hold of this while it came.")

_LOST = (TurnLostError, MessageClosed, MessageNotFound, StaleProducer, ContextNotFound)


class _Work(NamedTuple):
    """A turn, by the fence under which its task writes."""

    turn: StartedTurn
    task: asyncio.Task[None]


class Turns(TurnListener):
    """Runs turns. `jitter` is in [0, 1); tests own it as they own the clock."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        steps: Steps,
        calls: CallSteps,
        toolset: Toolset,
        executing: Executing,
        payloads: Payloads,
        recovery: Recovery,
        history: History,
        providers: Mapping[str, Provider],
        settings: Settings,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._ledger = ledger
        self._steps = steps
        self._calls = calls
        self._toolset = toolset
        self._executing = executing
        self._payloads = payloads
        self._recovery = recovery
        self._history = history
        self._providers = providers
        self._settings = settings
        self._jitter = jitter
        self._budget = Budget(settings.context_tokens_max)
        self._tasks: dict[str, _Work] = {}
        self._doubt = asyncio.Event()
        self._closing = False
        self.retries = 0
        self.first_chunk = Histogram(
            "contextd_first_chunk_seconds",
            "From a request to the model to its first chunk",
            registry=None,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        ledger.listener = self
        ledger.writer.on_doubt.append(self.look_soon)

    @property
    def running(self) -> int:
        """Turns that this process works on."""
        return len(self._tasks)

    def turn_started(self, turn: StartedTurn) -> None:
        """Starts the turn's task, unless it has one. One under an older fence is stopped."""
        before = self._tasks.get(turn.id)
        if self._closing or (before is not None and before.turn.fence >= turn.fence):
            return
        if before is not None:
            before.task.cancel()
        task = asyncio.create_task(self._run(turn, before and before.task), name=f"turn-{turn.id}")
        self._tasks[turn.id] = _Work(turn, task)
        task.add_done_callback(lambda _: self._forget(turn.id, task))

    def turn_stopped(self, turn_id: str) -> None:
        """Stops the turn's task where it is."""
        work = self._tasks.get(turn_id)
        if work is not None:
            work.task.cancel()

    def leave_all(self) -> None:
        """Another database: what is run here belongs to the one before."""
        for work in tuple(self._tasks.values()):
            work.task.cancel()

    async def look(self) -> bool:
        """Compares the turns that are this process's with the tasks that run, and goes on with what
        a process that is gone has left. Says whether there is nothing more to do.
        """
        held = list(self._tasks.values())
        found = await self._recovery.look()
        for work in held:
            # Its start was committed before the look, so what the look has not found is over.
            if found.mine.get(work.turn.key) != work.turn.fence and not work.task.done():
                self._ledger.tail.drop_streaming(work.turn.context_id)
                work.task.cancel()
        fences = {work.turn.key: work.turn.fence for work in self._tasks.values()}
        idle = [key for key, fence in found.mine.items() if fences.get(key, 0) < fence]
        if idle:
            await self._recovery.take_up(idle)
        return await self._recovery.recover(found)

    def look_soon(self) -> None:
        """Something may have been stored that nobody was told of."""
        self._doubt.set()

    async def keep(self) -> None:
        """Background task: looks every so often, at once where something is in doubt."""
        pause_s = 0.0  # the first look, at the start, may have left something
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._doubt.wait()
            self._doubt.clear()
            try:
                done = await self.look()
                await self._fail_overdue()
                pause_s = self._settings.poll_s if done else 0.0
            except ShuttingDown:
                return
            except Exception as error:
                log.warning("looking after the turns failed", exc_info=defect_in(error))
                pause_s = self._settings.poll_s

    async def close(self) -> None:
        """Stops all tasks where they are; the turns stay as stored and are recovered later."""
        self._closing = True
        tasks = [work.task for work in self._tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PROVIDER_CLOSE_S * 2)
        # Only a courtesy to other processes: without it they wait for the lease to run out.
        with suppress(ContextdError, TimeoutError):
            async with asyncio.timeout(RELEASE_S):
                await self._recovery.leases.give_back()

    def _forget(self, turn_id: str, task: asyncio.Task[None]) -> None:
        work = self._tasks.get(turn_id)
        if work is not None and work.task is task:
            del self._tasks[turn_id]

    async def _fail_overdue(self) -> None:
        if self._settings.waiting_timeout_s:
            await self._recovery.fail_overdue(round(self._settings.waiting_timeout_s * 1000))

    async def _run(self, turn: StartedTurn, before: asyncio.Task[None] | None) -> None:
        """The turn's one task: it goes on until the turn has ended, waits, or is another's."""
        with structlog.contextvars.bound_contextvars(context_id=turn.context_id, turn_id=turn.id):
            if before is not None:  # under an older fence: it lets go of its model and its tools
                await asyncio.wait([before], timeout=PROVIDER_CLOSE_S * 2)
            try:
                await self._persist(turn)
            except _LOST:
                # Closed elsewhere: what the tail says of its messages is out of date.
                self._ledger.tail.drop_streaming(turn.context_id)
                log.info("the turn was taken away")
            except ShuttingDown:
                pass

    async def _persist(self, turn: StartedTurn) -> None:
        """However often it fails by a defect, the turn is taken up again from what is stored."""
        again, pause_s = False, DEFECT_WAIT_S
        while True:
            try:
                await self._run_or_fail(turn, again=again)
                return
            except (*_LOST, ShuttingDown):
                raise
            except Exception as error:
                what = "the turn could not be ended; it is tried again"
                log.error(what, exc_info=defect_in(error))
            await asyncio.sleep(pause_s)
            again, pause_s = True, min(2 * pause_s, DEFECT_WAIT_MAX_S)

    async def _run_or_fail(self, turn: StartedTurn, *, again: bool) -> None:
        limit: asyncio.Timeout | None = None
        try:
            view = await (self._look_again(turn) if again else self._take_up(turn))
            left_s = self._settings.turn_timeout_s - view.worked_ms / 1000
            async with asyncio.timeout(max(0.0, left_s)) as limit:
                await self._drive(turn, view, limit, again=again)
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
        except Exception as cause:
            log.error("the turn failed by a defect", exc_info=defect_in(cause))
            error = Problem(type="internal_error", message="Something went wrong on the server.")
        await self._fail(turn, error, None)

    async def _take_up(self, turn: StartedTurn) -> TurnView:
        """The first look, and the first step with it."""
        return await stored_together(
            lambda: self._steps.take_up(turn), lambda: self._steps.view(turn)
        )

    async def _look_again(self, turn: StartedTurn) -> TurnView:
        return await stored(lambda: self._steps.view(turn), repeatable=True)

    async def _drive(
        self, turn: StartedTurn, view: TurnView, limit: asyncio.Timeout, *, again: bool
    ) -> None:
        """From the state that is stored, step by step, to the end.

        A step whose answer was lost with the database's connection was done, or it was not: the turn
        goes on from what is stored.
        """
        current: TurnView | None = view
        if again and view.state in RESPONDING_STATES:
            current = await self._break_off(turn, view)
        while current is not None:
            try:
                current = await self._advance(turn, current, limit)
            except Unconfirmed:
                await asyncio.sleep(STORE_RETRY_S)
                current = await self._look_again(turn)

    async def _advance(
        self, turn: StartedTurn, view: TurnView, limit: asyncio.Timeout
    ) -> TurnView | None:
        """One step of the turn. None when it has ended."""
        if view.paths:  # at its start, or of a turn that is retried and had not come to it
            await stored(lambda: self._payloads.attach(turn, view.paths))
            view = msgspec.structs.replace(view, paths=[])
        match view.state:
            case State.PROCESSING_USER_MESSAGE:
                return await stored(lambda: self._steps.request_llm(turn))
            case State.TRANSIENT_FAILURE:
                return await self._try_again(turn, view)
            case State.AWAITING_LLM_RESPONSE:
                return await self._respond(turn, view, limit)
            case State.STREAMING_LLM_RESPONSE:
                return await self._break_off(turn, view)
            case State.PROCESSING_LLM_RESPONSE:
                return _moved(view, await stored(lambda: self._calls.dispatch(turn)))
            case State.EXECUTING_TOOLS:
                await self._executing.run(turn)
                return _moved(view, await stored(lambda: self._calls.collect(turn)))
            case State.PROCESSING_TOOL_RESULTS:
                asked = await stored(lambda: self._calls.proceed(turn))
                return asked or _moved(view, State.IDLE)
            case _:
                raise RuntimeError(f"no turn of this process stands in {view.state}")

    async def _break_off(self, turn: StartedTurn, view: TurnView) -> TurnView:
        """An answer that somebody began to read and nobody reads any more costs its attempt."""
        await stored(
            lambda: self._steps.fail_transiently(turn, BROKEN_OFF, wait_ms=0, usage=None),
            repeatable=True,
        )
        return _at(view, State.TRANSIENT_FAILURE)

    async def _try_again(self, turn: StartedTurn, view: TurnView) -> TurnView | None:
        if view.attempt >= self._settings.attempts_max:
            error = Problem(
                type="attempts_exhausted",
                message=f"The model did not answer in {view.attempt} attempts.",
            )
            await self._fail(turn, error, None)
            return None
        self.retries += 1
        return await stored(lambda: self._steps.request_llm(turn))

    async def _respond(
        self, turn: StartedTurn, view: TurnView, limit: asyncio.Timeout
    ) -> TurnView | None:
        """One request to the model. None when the turn has ended."""
        reply = Reply(self._ledger, self._steps, self._settings, turn)
        try:
            await self._ask(turn, view, reply)
        except TransientError as error:
            return await self._back_off(turn, view, reply, error, limit)
        except FatalError as error:
            await self._fail(turn, _problem(error), reply.usage)
            return None
        finally:
            if reply.first_chunk_s is not None:
                self.first_chunk.observe(reply.first_chunk_s)
        calls = await self._executing.check(view.context, reply)
        end = partial(
            self._calls.end_stream,
            turn,
            finish_reason=reply.finish_reason,
            usage=reply.usage,
            calls=calls,
        )
        return _moved(view, await stored_together(partial(end, go_on=True), end))

    async def _ask(self, turn: StartedTurn, view: TurnView, reply: Reply) -> None:
        """Asks, and once more with less of the conversation where the model does not take all of it.

        Raises `ProviderError`.
        """
        provider = self._provider(view)
        request, fitted = await stored(lambda: self._request(turn, view))
        try:
            await reply.read(provider.stream(request))
            return
        except InputTooLongError as error:
            if reply.first_chunk_s is not None:
                raise
            refusal = error
        sent_tokens = await asyncio.to_thread(
            self._budget.count,
            fitted.told,
            model=request.model,
            system_prompt=request.system_prompt,
            offers=request.tools,
        )
        self._budget.learn(request.model, sent_tokens=sent_tokens, told_max=refusal.tokens_max)
        shorter, fitted_again = await stored(lambda: self._request(turn, view))
        if len(fitted_again.told) == len(fitted.told):
            raise _too_long(refusal)
        log.warning("the model does not take the whole conversation; the oldest turns are left out")
        try:
            await reply.read(provider.stream(shorter))
        except InputTooLongError as error:
            raise _too_long(error) from None

    async def _back_off(
        self,
        turn: StartedTurn,
        view: TurnView,
        reply: Reply,
        error: TransientError,
        limit: asyncio.Timeout,
    ) -> TurnView | None:
        wait_s = self._wait_s(view.attempt, error.retry_after_s)
        ends_at = limit.when()
        is_too_late = ends_at is not None and asyncio.get_running_loop().time() + wait_s >= ends_at
        if view.attempt >= self._settings.attempts_max or is_too_late:
            await self._fail(turn, _problem(error), reply.usage)
            return None
        await stored(
            lambda: self._steps.fail_transiently(
                turn, _problem(error), wait_ms=round(wait_s * 1000), usage=reply.usage
            ),
            repeatable=True,
        )
        await asyncio.sleep(wait_s)
        return _at(view, State.TRANSIENT_FAILURE)

    def _wait_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Doubles with each attempt, with jitter, so that many turns do not come back together."""
        settings = self._settings
        ceiling = min(settings.backoff_max_s, settings.backoff_initial_s * 2.0 ** (attempt - 1))
        return max(ceiling * (0.5 + self._jitter() / 2), retry_after_s or 0.0)

    async def _fail(self, turn: StartedTurn, error: Problem, usage: Usage | None) -> None:
        await stored(lambda: self._steps.fail(turn, error, usage=usage), repeatable=True)
        log.warning("the turn failed", error_type=error.type)

    def _provider(self, view: TurnView) -> Provider:
        name = view.context.provider or self._settings.provider
        provider = self._providers.get(name)
        if provider is None:
            raise FatalError("unknown_provider", f"This server has no provider {name!r}.")
        return provider

    async def _request(self, turn: StartedTurn, view: TurnView) -> tuple[ModelRequest, Fitted]:
        told, results = await self._history.read(
            turn.context_id,
            view.branch,
            turn.key,
            messages_max=HISTORY_MESSAGES_MAX,
            bytes_max=self._settings.history_bytes_max,
        )
        model = view.context.model or self._settings.model
        system_prompt = view.context.system_prompt or self._settings.system_prompt
        offers = self._toolset.offers(view.context)
        fitted = await self._fit(told, model, system_prompt, offers)
        if fitted.left_out is not None:
            await self._steps.note_left_out(turn, fitted.left_out)
        request = ModelRequest(
            context_id=turn.context_id,
            turn_id=turn.id,
            attempt=view.attempt,
            system_prompt=system_prompt,
            model=model,
            history=build_history(fitted.told, results),
            tools=offers,
        )
        return request, fitted

    async def _fit(
        self,
        told: list[Told],
        model: str | None,
        system_prompt: str | None,
        offers: Sequence[ToolOffer],
    ) -> Fitted:
        """Tokens are counted only where there is a limit to them."""
        if not self._budget.tokens_max(model):
            return Fitted(told=told, left_out=None)
        return await asyncio.to_thread(
            self._budget.fit, told, model=model, system_prompt=system_prompt, offers=offers
        )


def _too_long(error: InputTooLongError) -> FatalError:
    name = environment_name("context_tokens_max")
    words = error.message.rstrip(".")
    message = f"{words}. What is left of the conversation is too long; {name} can bound it."
    return FatalError(error.type, message)


def _problem(error: ProviderError) -> Problem:
    return Problem(type=error.type, message=error.message)


def _at(view: TurnView, state: State) -> TurnView:
    return msgspec.structs.replace(view, state=state)


def _moved(view: TurnView, state: State) -> TurnView | None:
    """The turn after a step; None where it has ended, or waits for somebody outside."""
    return None if state is State.IDLE or state in WAITING_STATES else _at(view, state)
