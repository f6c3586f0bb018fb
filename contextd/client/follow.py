"""The exact reader of §4.4: from signals to text.

A task reads the signals and keeps only levels: per message the newest position that was signalled
(its goal), the newest state, whether the reader is current. `events` takes all levels at once and
works in rounds: it pulls every message of the round until its goal is reached, then tells the state
that was signalled with them. So a message never has two pulls in flight, a state is told after the
text that was signalled before it, and with a slow consumer levels merge where a queue would grow.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TypeAlias, assert_never

import msgspec

from contextd.client.errors import ApiError, ClientError, Tries
from contextd.client.events import (
    Closed,
    Current,
    Disconnected,
    Event,
    Restarted,
    StateChange,
    Text,
)
from contextd.core import signal
from contextd.core.message import Pull

PULLS_MAX = 8  # at once, each of another message
GONE = frozenset({"context_not_found", "message_not_found"})

PullFrom: TypeAlias = Callable[[str, int], Awaitable[Pull]]
Watch: TypeAlias = "asyncio.Task[None]"


class _BehindError(ClientError):
    """A pull gave less than was signalled: the one who answered will have it soon."""

    passing = True


class _Goal(msgspec.Struct, kw_only=True):
    """How far a message was signalled. `check`: pull even if that much is held already."""

    position: int
    closing: bool
    check: bool
    role: str
    kind: str


class Levels:
    """What was signalled and not told yet. `pull_from` gets a message's id and what is held of it.

    Memory: a goal for each message signalled since the last round, a number for each message seen.
    """

    def __init__(self, held: Mapping[str, int], pull_from: PullFrom) -> None:
        self._held = dict(held)
        self._pull_from = pull_from
        self._closed: set[str] = set()
        self._goals: dict[str, _Goal] = {}
        self._state: StateChange | None = None
        self._lost: Disconnected | None = None
        self._current = False
        self._attached = False
        self._failed: ClientError | None = None
        self._changed = asyncio.Event()

    async def watch(self, signals: AsyncGenerator[signal.Signal | Disconnected]) -> None:
        """Notes signals until they end or fail; runs as a task beside `events`."""
        try:
            async with aclosing(signals):
                async for told in signals:
                    self._note(told)
                    self._changed.set()
        finally:
            self._changed.set()

    async def events(self, watch: Watch) -> AsyncGenerator[Event]:
        """Tells what `watch` notes; ends with it, or raises what it raised."""
        told_state: StateChange | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            finished = watch.done()  # before the levels are taken: none is left behind
            goals, state, current = self._take()
            async with aclosing(self._reach(goals, watch)) as reached:
                async for event in reached:
                    yield event
            if state and state != told_state:
                told_state = state
                yield state
            if current:
                yield Current()
            if finished:
                watch.result()
                return

    def _note(self, told: signal.Signal | Disconnected) -> None:
        match told:
            case signal.ContentDelta():
                self._aim(told, told.current_sequence, closing=False)
            case signal.MessageCompleted():
                self._aim(told, told.final_sequence, closing=True)
            case signal.StateChanged():
                self._state = StateChange(state=told.new_state, revision=told.revision)
            case signal.Heartbeat():
                self._current = self._current or not self._attached
                self._attached = True
            case Disconnected():
                self._lost, self._current, self._attached = told, False, False
            case _:
                assert_never(told)

    def _aim(
        self, told: signal.ContentDelta | signal.MessageCompleted, position: int, *, closing: bool
    ) -> None:
        """A position below what is held may be late, or the server lost text: pull and see."""
        message_id, held = told.message_id, self._held.get(told.message_id, 0)
        if position == held and (message_id in self._closed or not closing):
            return
        earlier = self._goals.get(message_id)
        closing = closing or (earlier is not None and earlier.closing)
        check = closing or position < held
        self._goals[message_id] = _Goal(
            position=position, closing=closing, check=check, role=told.role, kind=told.kind
        )

    def _take(self) -> tuple[dict[str, _Goal], StateChange | None, bool]:
        goals = {
            message_id: goal
            for message_id, goal in self._goals.items()
            if goal.check or goal.position > self._held.get(message_id, 0)
        }
        taken = goals, self._state, self._current
        self._goals, self._state, self._current = {}, None, False
        return taken

    async def _reach(self, goals: dict[str, _Goal], watch: Watch) -> AsyncGenerator[Event]:
        """One round: pulls until every goal is reached, or until nothing can come any more."""
        tries = Tries()
        while goals or self._lost:
            if self._lost:
                lost, self._lost = self._lost, None
                yield lost
                continue
            before = len(goals)
            events = await self._pull_each(goals)
            for event in events:
                yield event
            if events or len(goals) < before:
                tries.succeeded()
                continue
            if watch.done():
                return
            await asyncio.sleep(tries.pause_s(self._failed or _BehindError()))
            self._aim_anew(goals)

    def _aim_anew(self, goals: dict[str, _Goal]) -> None:
        """A goal may have become unreachable (a server with an older database): take the newest."""
        for message_id in goals.keys() & self._goals.keys():
            goals[message_id] = self._goals.pop(message_id)

    async def _pull_each(self, goals: dict[str, _Goal]) -> list[Event]:
        """One pull for each of the first goals, at once. Removes the goals that are reached."""
        self._failed = None
        batch = list(goals)[:PULLS_MAX]
        pulls = (self._pull_from(message_id, self._held.get(message_id, 0)) for message_id in batch)
        answers = await asyncio.gather(*pulls, return_exceptions=True)
        events: list[Event] = []
        for message_id, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Pull):
                events += self._append(message_id, goals[message_id], answer)
                done = self._is_reached(message_id, goals[message_id])
            else:
                done = self._is_gone(answer)
                events += self._forget(message_id, answer) if done else []
            if done:
                del goals[message_id]
        return events

    def _append(self, message_id: str, goal: _Goal, answer: Pull) -> list[Event]:
        held = self._held.get(message_id, 0)
        if answer.from_sequence != held:  # somebody else's answer, from a cache gone wrong
            return []
        if answer.head_sequence < held:
            goal.position = answer.head_sequence
            return self._start_over(message_id)
        self._held[message_id] = answer.sequence
        events: list[Event] = []
        if answer.sequence > held:
            text = Text(
                message_id=message_id,
                role=goal.role,
                kind=goal.kind,
                from_sequence=held,
                sequence=answer.sequence,
                content=answer.content,
            )
            events.append(text)
        if answer.final and message_id not in self._closed:
            self._closed.add(message_id)
            closed = Closed(
                message_id=message_id,
                role=goal.role,
                kind=goal.kind,
                status=answer.status.value,
                final_sequence=answer.sequence,
            )
            events.append(closed)
        return events

    def _is_reached(self, message_id: str, goal: _Goal) -> bool:
        closed = message_id in self._closed
        return self._held.get(message_id, 0) >= goal.position and (closed or not goal.closing)

    def _is_gone(self, error: BaseException) -> bool:
        """True for what no longer exists, false for what may pass; anything else is raised."""
        if isinstance(error, ApiError) and error.code in GONE:
            return True
        if not isinstance(error, ClientError) or not error.passing:
            raise error
        if self._failed is None or error.retry_after_s >= self._failed.retry_after_s:
            self._failed = error
        return False

    def _forget(self, message_id: str, error: BaseException) -> list[Event]:
        """A missing context is the stream's to tell; a missing message was in a lost database."""
        if isinstance(error, ApiError) and error.code == "message_not_found":
            return self._start_over(message_id)
        return []

    def _start_over(self, message_id: str) -> list[Event]:
        self._closed.discard(message_id)
        told = self._held.pop(message_id, 0) > 0
        return [Restarted(message_id=message_id)] if told else []
