"""Storing an `application/x-ndjson` body while it comes in (§7).

One append is under way at a time. What arrives meanwhile is gathered and becomes the next one, so a
slow producer has a commit for each line and a fast one a commit for a thousand. When enough has
gathered the body is not read on, and TCP slows the producer down to what the database takes.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import cast

from litestar.types import HTTPScope, Receive, ReceiveMessage, Send

from contextd.core.errors import ContextdError, Overloaded, ShuttingDown
from contextd.core.producing import AppendAnswer, CompleteRequest, Ending
from contextd.http.connection import Connection
from contextd.http.lines import Gathered, LineReader
from contextd.http.problems import send_problem
from contextd.service import Producers
from contextd.settings import Settings
from contextd.store.appends import Appended
from contextd.store.tail import LiveMessage

LINES_TYPE = "application/x-ndjson"
GATHERED_BYTES_MAX = 1024 * 1024  # beside one piece of the body: the producer waits beyond this
LINGER_S = 2.0
LINGER_CLOSING_S = 0.2


class LineBodies:
    """Stores bodies of lines, of which `line_bodies_max` may be open."""

    def __init__(self, producers: Producers, settings: Settings) -> None:
        self._producers = producers
        self._settings = settings
        self._open = 0

    async def store(self, scope: HTTPScope, receive: Receive, send: Send) -> AppendAnswer | None:
        """Stores a body's lines; None when it broke off, or was refused, which has been answered."""
        body = LineBody(self._producers, self._settings, receive)
        self._open += 1
        try:
            if self._open > self._settings.line_bodies_max:
                raise Overloaded("More bodies of lines are open than the server takes on.")
            live = await self._producers.find(**scope["path_params"])
            _let_stay_open(scope)
            await body.store(live)
        except ContextdError as error:
            if body.line:
                error.facts |= {"line": body.line, "sequence": body.sequence}
            await self._refuse(send, body, error)
            return None
        finally:
            self._open -= 1
            body.let_go()
        return None if body.gone else body.answer()

    async def _refuse(self, send: Send, body: "LineBody", error: ContextdError) -> None:
        """The answer, which may come before the body's end; then nothing more is read of it (§7)."""
        if body.ended:
            await send_problem(send, error)
            return
        await send_problem(send, error, {"connection": "close"}, last=False)
        closing = self._producers.closing.is_set()
        await body.drain(LINGER_CLOSING_S if closing else LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _let_stay_open(scope: HTTPScope) -> None:
    """Lines may come for as long as the answer is written; `LineBody` bounds the silence."""
    connection = scope.get("contextd.connection")  # None under another server
    if connection is not None:
        cast("Connection", connection).keep_open()


class LineBody:
    """One body. After `store` has raised, `line` and `sequence` say where; `line` 0: before any."""

    _live: LiveMessage

    def __init__(self, producers: Producers, settings: Settings, receive: Receive) -> None:
        self.gone = False
        self.ended = False
        self.line = 0
        self.sequence = 0
        self._producers = producers
        self._receive = receive
        self._silence_s = settings.producer_silence_s
        self._heard_at = asyncio.get_running_loop().time()  # of a chunk, not of half a line
        self._batch_chunks_max = settings.batch_chunks_max
        self._reader = LineReader(chunk_bytes_max=settings.chunk_bytes_max)
        self._head = 0
        self._accepted = 0
        self._duplicates = 0
        self._checked = False
        self._completed = False
        self._batch = Gathered()
        self._appending: asyncio.Task[Appended] | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._closing = asyncio.ensure_future(producers.closing.wait())

    async def store(self, live: LiveMessage) -> None:
        """Until the body has ended and all is durable, or it is `gone`. Raises what refused it."""
        self._live, self._head = live, live.head
        reader = self._reader
        while not self.gone:
            if self._appending is not None:
                if self._wants_more():
                    await self._something()
                else:
                    await self._appended(self._appending)
            elif reader.gathered:
                self._appending = self._append()
            elif reader.ending is not None and not self._completed:
                await self._complete(reader.ending)
            elif reader.error is not None:
                raise self._at(reader.error, reader.number, reader.sequence)
            elif reader.epoch is not None and not self._checked:
                await self._check()
            elif self.ended:
                return
            else:
                await self._something()

    def answer(self) -> AppendAnswer:
        """What became of the body."""
        return AppendAnswer(
            message_id=self._live.message_id,
            sequence=self._head,
            accepted=self._accepted,
            duplicates=self._duplicates,
        )

    async def drain(self, limit_s: float) -> None:
        """Throws the rest of the body away, for a while.

        A connection that is closed with bytes unread is reset, and the answer may be lost with it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                if self._receiving is not None:
                    await self._receiving
                while not (self.gone or self.ended):
                    self._note_end(await self._receive())

    def let_go(self) -> None:
        """Waits for nothing any more; an append that is under way ends by itself."""
        self._closing.cancel()
        if self._receiving is not None:
            self._receiving.cancel()
        if self._appending is not None:
            self._appending.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _wants_more(self) -> bool:
        gathered = self._reader.gathered
        return not (
            self.ended
            or self._reader.error is not None
            or len(gathered) >= self._batch_chunks_max
            or sum(gathered.sizes) >= GATHERED_BYTES_MAX
        )

    async def _something(self) -> None:
        """The next piece of the body, the end of the append, or the end of the server."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._receive_piece())
        waiting: set[asyncio.Future[object]] = {self._receiving, self._closing}  # type: ignore[arg-type]
        if self._appending is not None:
            waiting.add(self._appending)  # type: ignore[arg-type]
        await asyncio.wait(
            waiting, timeout=max(0.0, self._left_s()), return_when=asyncio.FIRST_COMPLETED
        )
        if self._appending is not None and (self._appending.done() or self._closing.done()):
            await self._appended(self._appending)
        if self._closing.done():
            raise self._at(ShuttingDown(), self._reader.number + 1)
        if self._receiving.done():
            self._receiving.result()
            self._receiving = None
        if self._left_s() <= 0 and self._appending is None:
            self._heard_at = asyncio.get_running_loop().time()
            await self._check()  # its message may be gone: it must not keep its place for ever

    def _left_s(self) -> float:
        return self._heard_at + self._silence_s - asyncio.get_running_loop().time()

    async def _receive_piece(self) -> None:
        message = await self._receive()
        self._note_end(message)
        if not self.gone:
            self._reader.feed(message["body"], last=self.ended)  # type: ignore[typeddict-item]

    def _note_end(self, message: ReceiveMessage) -> None:
        self.gone = message["type"] != "http.request"
        self.ended = not self.gone and not message.get("more_body")

    async def _check(self) -> None:
        """Whether the producer may write, where there is no chunk to find it out with."""
        self._checked = True
        try:
            await self._producers.check(self._live, self._reader.epoch)
        except ContextdError as error:
            raise self._at(error, max(1, self._reader.number)) from None

    def _append(self) -> asyncio.Task[Appended]:
        self._checked = True
        self._batch = self._reader.gathered.take(self._batch_chunks_max)
        return asyncio.create_task(self._store(self._batch))

    async def _store(self, batch: Gathered) -> Appended:
        return await self._producers.append(
            self._live,
            epoch=self._reader.epoch,
            texts=batch.texts,
            sizes=batch.sizes,
            sequences=batch.sequences,
        )

    async def _appended(self, appending: asyncio.Task[Appended]) -> None:
        """The append's outcome. Of one that was refused, what comes before the bad line is stored."""
        rest, self._appending = self._batch, None
        refusal = await self._count(appending)
        while refusal is not None and refusal.index:
            first = rest.take(refusal.index)
            refused_now = await self._count(self._store(first))
            if refused_now is None:
                break
            rest, refusal = first, refused_now  # something happened in between
        if refusal is not None:
            raise self._at(refusal, rest.numbers[0], rest.sequences[0])

    async def _count(self, appending: Awaitable[Appended]) -> ContextdError | None:
        try:
            appended = await appending
        except ContextdError as error:
            return error
        self._heard_at = asyncio.get_running_loop().time()
        self._head = appended.head
        self._accepted += len(appended.texts)
        self._duplicates += appended.duplicates
        return None

    async def _complete(self, ending: Ending) -> None:
        request = CompleteRequest(
            epoch=self._reader.epoch,
            finish_reason=ending.finish_reason,
            usage=ending.usage,
        )
        try:
            await self._producers.complete(self._live.context_id, self._live.message_id, request)
        except ContextdError as error:
            raise self._at(error, self._reader.number) from None
        self._completed = True

    def _at(self, error: ContextdError, line: int, sequence: int | None = None) -> ContextdError:
        self.line = line
        self.sequence = self._head + 1 if sequence is None else sequence
        return error
