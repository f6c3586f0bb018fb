"""One answer of the model, written while it comes: text, thinking, and calls of tools (§6).

Chunks are read from the provider into a short queue while the commit before is under way, and what has
gathered goes into the next one; a provider that is faster than the disk is slowed by that queue. The
arguments of a call are chunks of a message of their own, so that a reader can watch them.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import groupby
from typing import TypeVar

import msgspec
import structlog

from contextd.core.errors import Overloaded
from contextd.core.message import TEXT, THINKING, Usage
from contextd.core.tool_call import TOOL_CALL
from contextd.core.values import JsonObject
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    ProviderError,
    SignOfLife,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFacts,
    TransientError,
    UsageReport,
)
from contextd.service import Ledger, Steps
from contextd.service.call_rows import split_text
from contextd.settings import Settings
from contextd.store.notices import StartedTurn
from contextd.store.tail import LiveMessage
from contextd.store.writer import Unconfirmed

log = structlog.get_logger(__name__)

T = TypeVar("T")

INBOX_EVENTS_MAX = 1024  # read ahead of the commit; then the provider is slowed
PROVIDER_CLOSE_S = 0.25  # §6: a stopped turn lets go of its provider within this
STORE_RETRY_S = 0.5


class AskedCall(msgspec.Struct, kw_only=True):
    """A call as the model wrote it: `arguments` is text that may not even be JSON.

    `refusal`: why it must not run. `attached`: what its provider wants back with it.
    """

    id: str
    name: str
    live: LiveMessage
    pieces: list[str]
    refusal: str | None = None
    attached: JsonObject = {}

    @property
    def arguments(self) -> str:
        """All that was written of them so far."""
        return "".join(self.pieces)


class Reply:
    """Reads a provider's events and writes them, several chunks to a commit.

    `is_whole` is false of an answer that was stopped before the model was through.
    """

    def __init__(self, ledger: Ledger, steps: Steps, settings: Settings, turn: StartedTurn) -> None:
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.is_whole = True
        self.calls: dict[str, AskedCall] = {}
        self.first_chunk_s: float | None = None
        self._asked_at = asyncio.get_running_loop().time()
        self._ledger = ledger
        self._steps = steps
        self._settings = settings
        self._turn = turn
        self._live: LiveMessage | None = None  # of text or thinking

    async def read(self, events: AsyncGenerator[Event, None]) -> None:
        """To the end of the stream. Raises `ProviderError`; what was written until then stays."""
        inbox: asyncio.Queue[Event | _Ended] = asyncio.Queue(INBOX_EVENTS_MAX)
        pump = asyncio.create_task(_pump(events, inbox), name=f"provider-{self._turn.id}")
        try:
            ended: _Ended | None = None
            while ended is None:
                batch = await self._next_events(inbox)
                if isinstance(batch[-1], _Ended):
                    ended = batch.pop()  # type: ignore[assignment]
                await self._write(batch)  # type: ignore[arg-type]
            if isinstance(ended.error, ProviderError):
                raise ended.error
            if ended.error is not None:
                log.error("the provider failed by a defect", exc_info=ended.error)
                raise FatalError("provider_error", "The provider failed by a defect.")
        finally:
            pump.cancel()
            await asyncio.wait([pump], timeout=PROVIDER_CLOSE_S)

    async def _next_events(self, inbox: "asyncio.Queue[Event | _Ended]") -> list["Event | _Ended"]:
        """What has gathered, one event at least. Raises `TransientError` when none comes in time.

        Signs of life put off that time, up to a limit of their own.
        """
        settings, clock = self._settings, asyncio.get_running_loop()
        last = clock.time() + settings.keep_alive_timeout_s
        batch: list[Event | _Ended] = []
        while not batch:
            try:
                async with asyncio.timeout_at(min(clock.time() + settings.token_timeout_s, last)):
                    event = await inbox.get()
            except TimeoutError:
                raise self._silence(clock.time() >= last) from None
            batch = [event] if not isinstance(event, SignOfLife) else []
        while not inbox.empty():
            batch.append(inbox.get_nowait())
        return [event for event in batch if not isinstance(event, SignOfLife)]

    def _silence(self, alive: bool) -> TransientError:
        if alive:
            limit_s = self._settings.keep_alive_timeout_s
            message = f"The model sent nothing but signs of life for {limit_s:g} s."
        else:
            message = f"The model sent nothing for {self._settings.token_timeout_s:g} s."
        return TransientError("provider_timeout", message)

    async def _write(self, events: Sequence[Event]) -> None:
        for (type_, call_id), group in groupby(events, key=_target):
            deltas = list(group)
            if type_ in (TextDelta, ThinkingDelta, ToolCallDelta):
                self._note_first_chunk()
            if type_ is ToolCallDelta:
                await self._write_call(call_id, deltas)  # type: ignore[arg-type]
            elif type_ in (TextDelta, ThinkingDelta):
                kind = TEXT if type_ is TextDelta else THINKING
                texts = self._chunks([delta.content for delta in deltas])  # type: ignore[union-attr]
                await self._write_text(kind, texts)
            else:
                for event in deltas:
                    self._note(event)

    def _note_first_chunk(self) -> None:
        if self.first_chunk_s is None:
            self.first_chunk_s = asyncio.get_running_loop().time() - self._asked_at

    async def _write_text(self, kind: str, texts: list[str]) -> None:
        if not texts:
            return
        live = self._live
        if live is None or live.kind != kind:
            self._live = await self._open(kind, texts)
        else:
            await self._append(live, texts, first=live.head + 1)

    async def _write_call(self, call_id: str, deltas: Sequence[ToolCallDelta]) -> None:
        texts = self._chunks([delta.content for delta in deltas])
        call = self.calls.get(call_id)
        if call is None:
            name = deltas[0].name
            metadata = {"name": name, "call_id": call_id}
            live = await self._open(TOOL_CALL, texts, metadata)
            self.calls[call_id] = AskedCall(id=call_id, name=name, live=live, pieces=texts)
            self._live = None  # text that follows is another message
        else:
            await self._append(call.live, texts, first=call.live.head + 1)
            call.pieces += texts

    async def _open(
        self, kind: str, texts: list[str], metadata: JsonObject | None = None
    ) -> LiveMessage:
        """Opens a message. Its id is made before, so that after a lost answer it can be looked for."""
        message_id = self._ledger.new_id()
        again = False
        while True:
            try:
                return await stored(
                    lambda: self._steps.open_message(
                        self._turn,
                        message_id=message_id,
                        kind=kind,
                        texts=texts,
                        metadata=metadata,
                        again=again,  # noqa: B023 - it is called before the next turn of the loop
                    )
                )
            except Unconfirmed:
                again = True
                await asyncio.sleep(STORE_RETRY_S)

    async def _append(self, live: LiveMessage, texts: list[str], first: int) -> None:
        """Stored or not, with its first sequence it can be said again: no answer is lost by that."""

        async def append() -> None:
            await self._ledger.append(live, fence=self._turn.fence, texts=texts, first=first)

        await stored(append, repeatable=True)

    def _chunks(self, contents: Sequence[str]) -> list[str]:
        """A model's deltas as chunks: no U+0000 (§3.1), none larger than the limit (§7)."""
        return [
            piece
            for content in contents
            for piece in split_text(
                content.replace("\x00", "\ufffd"), self._settings.chunk_bytes_max
            )
        ]

    def _note(self, event: Event) -> None:
        match event:
            case UsageReport(usage):
                self.usage = usage if self.usage is None else self.usage + usage
            case Finished(reason, whole):
                self.finish_reason, self.is_whole = reason, whole
            case ToolCallFacts():
                call = self.calls[event.id]
                call.refusal, call.attached = event.refusal, event.attached
            case _:
                raise AssertionError(event)


class _Ended(msgspec.Struct, frozen=True):
    """The provider's stream is over, with the error that ended it."""

    error: BaseException | None


def _target(event: Event) -> tuple[type[Event], str]:
    """Events that go to the same message, one after the other, go together."""
    return type(event), event.id if isinstance(event, ToolCallDelta) else ""


async def _pump(
    events: AsyncGenerator[Event, None], inbox: "asyncio.Queue[Event | _Ended]"
) -> None:
    """Reads the provider in a task of its own, so that its generator is closed where it runs."""
    error: BaseException | None = None
    try:
        async with aclosing(events) as stream:
            async for event in stream:
                await inbox.put(event)
    except BaseException as raised:
        task = asyncio.current_task()
        if task is None or task.cancelling():  # by who reads the inbox
            raise
        error = raised  # also a cancellation of its own making, which would end this task unheard
    await inbox.put(_Ended(error))


async def stored(write: Callable[[], Awaitable[T]], *, repeatable: bool = False) -> T:
    """Writes, and again for as long as the database does not take it: the turn's time bounds it.

    Raises `Unconfirmed` where nobody knows whether it was taken, unless it is `repeatable`: then it
    does the same a second time as once.
    """
    while True:
        try:
            return await write()
        except Unconfirmed:
            if not repeatable:
                raise
            await asyncio.sleep(STORE_RETRY_S)
        except Overloaded:
            await asyncio.sleep(STORE_RETRY_S)


async def stored_together(
    together: Callable[[], Awaitable[T]], first: Callable[[], Awaitable[T]]
) -> T:
    """Several steps in one transaction; where the database does not take that, only the `first` of them.

    Both do the same a second time as once.
    """
    try:
        return await together()
    except (Overloaded, Unconfirmed):
        return await stored(first, repeatable=True)
