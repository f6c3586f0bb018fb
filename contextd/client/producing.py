"""Writing a message from outside (§7): what `Client.produce` gives.

From its opening to its end one task, the sender, does all requests of a message. So chunks go out in
order with one request under way, and whatever is written meanwhile gathers in the outbox and is the
next batch. Each request repeats without harm, because chunks carry their sequence and every request
but the first its epoch. A request is repeated while the server is away, writers wait when the outbox
is full, and what ends the sender is raised to all who write or wait.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypedDict, TypeVar

import anyio
import msgspec

from contextd.client.errors import (
    ApiError,
    ClientError,
    MessageClosedError,
    TakenOverError,
    persistently,
)
from contextd.client.outbox import Outbox, pieces
from contextd.client.wire import Wire, path_of
from contextd.core.message import Message, Pull, Usage
from contextd.core.producing import AppendAnswer, ChunkInput
from contextd.core.text import TextPieces, storable
from contextd.core.values import LABEL_CHARS_MAX

PATIENCE_S = 300.0  # of a server that is away
SIGN_OF_LIFE_S = 30.0  # a quarter of the silence that a server bears by default
FAREWELL_S = 5.0  # to say that the message failed, for one that is cancelled
ERROR_CHARS_MAX = 2_000  # of an exception's text
STORED_WAIT_S = 1.0  # a pull for what is known to be there is held on so long
CANCELLED = "cancelled"
LEFT = (asyncio.CancelledError, GeneratorExit)
GONE = frozenset({"context_not_found", "message_not_found"})
IS_CLOSED = "The message was completed or failed here already."

T = TypeVar("T")


class ProduceOptions(TypedDict, total=False):
    """The options of `Client.produce`, for what passes them on."""

    message_id: str | None
    role: str
    kind: str
    producer_id: str | None
    epoch: int | None
    branch: str | None
    parent_id: str | None
    media_type: str | None
    metadata: Mapping[str, Any] | None
    patience_s: float
    sign_of_life_s: float
    reveal_errors: bool


class PullAfter(Protocol):
    """`Client.pull`."""

    async def __call__(
        self, context_id: str, message_id: str, from_sequence: int = 0, *, wait_s: float = 0
    ) -> Pull: ...


class _Opened(msgspec.Struct):
    """What matters in the answer to the opening."""

    epoch: int
    current_sequence: int


class _BehindError(ClientError):
    """A pull found less than is known to be stored: another process may not have it yet."""

    passing = True


class ProducedMessage:
    """One open message and its only writer. Made by `Client.produce`.

    `finish_reason` and `usage` may be set at any time; they go with the completion. Every method
    raises `MessageClosedError` (`CancelledByViewerError` among them) or `TakenOverError` once
    somebody else decided about the message, `UnreachableError` when patience ran out, and `ApiError`
    for other refusals; after that, the same error again.
    """

    def __init__(
        self,
        wire: Wire,
        pull: PullAfter,
        context_id: str,
        message_id: str,
        *,
        producer: Mapping[str, Any],
        opening: Mapping[str, Any],
        is_own_id: bool,
        patience_s: float,
        sign_of_life_s: float,
        reveal_errors: bool,
    ) -> None:
        self.context_id = context_id
        self.id = message_id
        self.epoch = 0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._wire = wire
        self._pull = pull
        self._producer = producer
        self._opening = opening
        self._is_own_id = is_own_id
        self._patience_s = patience_s
        self._sign_of_life_s = sign_of_life_s
        self._reveal = reveal_errors
        self._text = TextPieces()
        self._outbox = Outbox(0)
        self._writing = asyncio.Lock()
        self._grown = asyncio.Event()
        self._settled = asyncio.Condition()
        self._sender: asyncio.Task[None] | None = None
        self._is_closing = False
        self._error: Exception | None = None
        self._closed: Message | None = None

    @property
    def sequence(self) -> int:
        """How many chunks are durable: where the stored text ends."""
        return self._outbox.head

    async def write(self, text: str) -> None:
        """Adds `text`. It is on its way then, not yet durable.

        A text is one chunk, of more than 64 KiB several, an empty one none. Half a surrogate pair at
        its end waits for the next; what no text may hold becomes U+FFFD (§3.1). Waits while some
        4 MiB or 10,000 chunks are not durable yet.
        """
        async with self._writing:
            for piece in pieces(self._text.add(text)):
                await self._until(lambda: not self._outbox.is_full)
                self._add(piece)
        await asyncio.sleep(0)  # a source that never waits would leave the sender no turn

    async def flush(self) -> None:
        """Returns when all that was written is durable."""
        async with self._writing:
            self._add_rest()
        await self._durable()

    async def complete(
        self, *, finish_reason: str | None = None, usage: Usage | None = None
    ) -> Message:
        """Flushes and closes the message for good."""
        self.finish_reason = finish_reason or self.finish_reason
        self.usage = usage or self.usage
        await self._finish()
        ending = {"finish_reason": self.finish_reason, "usage": self.usage}
        told = {name: value for name, value in ending.items() if value is not None}
        return await self._close("complete", final_sequence=self.sequence, **told)

    async def fail(self, error_type: str, message: str = "") -> Message:
        """Flushes and marks the message failed, with an error that readers see."""
        await self._finish()
        return await self._close("fail", error=_problem(error_type, message or error_type))

    async def stored_text(self) -> str:
        """The text of chunks 1 to `sequence`, pulled: what one who goes on finds there."""
        texts: list[str] = []
        held, head = 0, self.sequence
        while held < head:
            answer = await persistently(partial(self._more, held), self._patience_s)
            texts.append(answer.content)
            held = answer.sequence
        return "".join(texts)

    async def _more(self, held: int) -> Pull:
        answer = await self._pull(self.context_id, self.id, held, wait_s=STORED_WAIT_S)
        if answer.sequence <= held:
            raise _BehindError(f"The server has {answer.head_sequence} chunks, fewer than it said.")
        return answer

    def _add_rest(self) -> None:
        if rest := self._text.rest():
            self._add(rest)

    async def _durable(self) -> None:
        last = self._outbox.last
        await self._until(lambda: self._outbox.head >= last)

    def _add(self, piece: str) -> None:
        if self._is_closing:
            raise RuntimeError(IS_CLOSED)
        self._outbox.add(piece)
        self._grown.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Waits for `condition`, which the sender brings about. Raises what ended the sender."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._is_over() or condition())
        if self._error:
            raise self._error
        if not condition():
            raise RuntimeError(IS_CLOSED)

    def _is_over(self) -> bool:
        return self._error is not None or self._sender is None or self._sender.done()

    # The sender.

    async def _open(self) -> None:
        answer = await persistently(self._put, self._patience_s)
        self._outbox = Outbox(answer.current_sequence)
        self._sender = asyncio.create_task(self._send())

    async def _send(self) -> None:
        """Sends until it is stopped or refused for good."""
        try:
            while True:
                if batch := self._outbox.batch():
                    await self._append(batch)
                elif await self._is_silent():
                    await self._live()
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._error = error
        finally:
            await self._tell()

    async def _is_silent(self) -> bool:
        """Waits for the next text; true if none came for so long that a sign of life is due."""
        self._grown.clear()
        try:
            async with asyncio.timeout(self._sign_of_life_s):
                await self._grown.wait()
        except TimeoutError:
            return True
        return False

    async def _live(self) -> None:
        """Says that this producer lives."""
        try:
            await persistently(self._put, self._patience_s)
        except TakenOverError as error:
            if not await self._is_own(error.epoch):
                raise

    async def _append(self, batch: list[ChunkInput]) -> None:
        await self._post("chunks", AppendAnswer, chunks=batch)
        self._outbox.settle(batch)
        await self._tell()

    async def _tell(self) -> None:
        async with self._settled:
            self._settled.notify_all()

    async def _stop(self) -> None:
        if self._sender:
            self._sender.cancel()
            await asyncio.wait([self._sender])

    # The requests.

    async def _put(self, epoch: int | None = None) -> _Opened:
        """Opens the message, takes it over, or says that its producer lives (§7)."""
        epoch = epoch or self.epoch
        producer = {**self._producer, "epoch": epoch} if epoch else self._producer
        path = path_of(self.context_id, "messages", self.id)
        answer = await self._wire.ask(
            "PUT", path, _Opened, body={"producer": producer, **self._opening}
        )
        self.epoch = answer.epoch
        return answer

    async def _post(self, verb: str, type_: type[T], **body: Any) -> T:
        """One request of this epoch, again until it is answered."""
        path = path_of(self.context_id, "messages", self.id, verb)
        while True:
            told = {"epoch": self.epoch, **body}
            ask = partial(self._wire.ask, "POST", path, type_, body=told)
            try:
                return await persistently(ask, self._patience_s)
            except TakenOverError as error:
                if not await self._is_own(error.epoch):
                    raise

    async def _is_own(self, epoch: int) -> bool:
        """Whether a higher epoch is this producer's own; then it goes on in it.

        A first PUT whose answer was lost may be carried out long after its repeat, and takes the
        message over once more. Only for a producer id that nobody else has can that be told.
        """
        if not self._is_own_id or epoch <= self.epoch:
            return False
        try:
            await persistently(partial(self._put, epoch), self._patience_s)
        except (TakenOverError, MessageClosedError):
            return False
        return True

    # The end.

    async def _finish(self) -> None:
        """Flushes, and takes nothing more."""
        if self._closed:
            raise RuntimeError(IS_CLOSED)
        async with self._writing:
            self._add_rest()
            await self._durable()
            self._is_closing = True

    async def _close(self, verb: str, **body: Any) -> Message:
        self._is_closing = True
        await self._stop()
        try:
            self._closed = await self._post(verb, Message, **body)
        except ClientError as error:
            self._error = error
            raise
        return self._closed

    async def _leave(self) -> None:
        if self._closed is None:
            await self.complete()

    async def _part(self, error: BaseException) -> None:
        """The last words of a block that raised `error`: as patient as ever, but brief if cancelled."""
        if self._closed or self._is_lost():
            return
        brief = self._error is not None or not isinstance(error, Exception)
        with anyio.move_on_after(FAREWELL_S if brief else None, shield=brief) as scope:
            await self._tell_failed(error)
        if scope.cancelled_caught:
            error.add_note(f"contextd: the server did not answer within {FAREWELL_S:g} s.")

    async def _tell_failed(self, error: BaseException) -> None:
        """What goes wrong here must not hide `error`, so it becomes a note of it."""
        name = CANCELLED if isinstance(error, LEFT) else type(error).__name__
        try:
            await self.flush()
        except Exception as trouble:
            error.add_note(f"contextd: not all text is stored: {trouble}")
        try:
            await self._close("fail", error=_problem(name, str(error) if self._reveal else name))
        except ClientError as trouble:
            error.add_note(f"contextd: the message is not marked failed: {trouble}")

    def _is_lost(self) -> bool:
        """Whether somebody else decided about the message, or it is gone."""
        error = self._error
        if isinstance(error, MessageClosedError | TakenOverError):
            return True
        return isinstance(error, ApiError) and error.code in GONE


@asynccontextmanager
async def opened(message: ProducedMessage) -> AsyncGenerator[ProducedMessage]:
    """`message` while it is open: completed by leaving, failed by an exception."""
    try:
        await message._open()
        try:
            yield message
            await message._leave()
        except BaseException as error:
            await message._part(error)
            raise
    finally:
        await message._stop()


def _problem(error_type: str, message: str) -> dict[str, str]:
    """As §7 takes it: bounded, and of characters that can be stored."""
    return {
        "type": storable(error_type)[:LABEL_CHARS_MAX],
        "message": storable(message)[:ERROR_CHARS_MAX],
    }
