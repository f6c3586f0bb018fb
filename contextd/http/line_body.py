"""Storing an `application/x-ndjson` body while it comes in (§7).

One append is under way at a time. What arrives meanwhile is gathered and becomes the next one, so a
slow producer has a commit for each line and a fast one a commit for a thousand. When enough has
gathered the body is not read on, and TCP slows the producer down to what the database takes.
"""

import asyncio
from contextlib import suppress

from litestar.types import Receive, ReceiveMessage, Send

from contextd.core.errors import ContextdError, Overloaded, ShuttingDown
from contextd.core.producing import AppendAnswer, CompleteRequest, Ending
from contextd.http.lines import Gathered, LineReader
from contextd.http.problems import send_problem
from contextd.service import Producers
from contextd.settings import Settings
from contextd.store.appends import Appended
from contextd.store.tail import LiveMessage

LINES_TYPE = "application/x-ndjson"
GATHERED_BYTES_MAX = 1024 * 1024  # beside one piece of the body: the producer waits beyond this
LINGER_S = 2.0


class LineBodies:
    """Stores bodies of lines, of which `line_bodies_max` may be open."""

    def __init__(self, producers: Producers, settings: Settings) -> None:
        self._producers = producers
        self._settings = settings
        self._open = 0

    async def store(self, live: LiveMessage, receive: Receive, send: Send) -> AppendAnswer | None:
        """Stores a body's lines; None when it broke off, or was refused, which has been answered."""
        if self._open >= self._settings.line_bodies_max:
            raise Overloaded("More bodies of lines are open than the server takes on.")
        self._open += 1
        body = LineBody(self._producers, self._settings, live, receive)
        try:
            await body.store()
        except ContextdError as error:
            error.facts |= {"line": body.line, "sequence": body.sequence}
            await _refuse(send, body, error)
            return None
        finally:
            self._open -= 1
            body.let_go()
        return None if body.gone else body.answer()


class LineBody:
    """One body. After `store` has raised, `line` and `sequence` say where."""

    def __init__(
        self, producers: Producers, settings: Settings, live: LiveMessage, receive: Receive
    ) -> None:
        self.gone = False
        self.ended = False
        self.line = 0
        self.sequence = 0
        self._producers = producers
        self._live = live
        self._receive = receive
        self._reader = LineReader(chunk_bytes_max=settings.chunk_bytes_max)
        self._batch_chunks_max = settings.batch_chunks_max
        self._head = live.head
        self._accepted = 0
        self._duplicates = 0
        self._completed = False
        self._batch = Gathered()
        self._appending: asyncio.Task[Appended] | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._closing = asyncio.ensure_future(producers.closing.wait())

    async def store(self) -> None:
        """Until the body has ended and all is durable, or it is `gone`. Raises what refused it."""
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
                raise self._at(reader.error, reader.number)
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

    async def drain(self) -> None:
        """Throws the rest of the body away, for a while.

        A connection that is closed with bytes unread is reset, and the answer may be lost with it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
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
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._appending is not None and (self._appending.done() or self._closing.done()):
            await self._appended(self._appending)
        if self._closing.done():
            raise self._at(ShuttingDown(), self._reader.number + 1)
        if self._receiving.done():
            self._receiving.result()
            self._receiving = None

    async def _receive_piece(self) -> None:
        message = await self._receive()
        self._note_end(message)
        if not self.gone:
            self._reader.feed(message["body"], last=self.ended)  # type: ignore[typeddict-item]

    def _note_end(self, message: ReceiveMessage) -> None:
        self.gone = message["type"] != "http.request"
        self.ended = not self.gone and not message.get("more_body")

    def _append(self) -> asyncio.Task[Appended]:
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
        """The append's outcome; of one that was refused, what comes before the bad line is stored."""
        batch, self._appending = self._batch, None
        try:
            self._count(await appending)
        except ContextdError as error:
            if error.index:
                self._count(await self._store(batch.take(error.index)))
            raise self._at(error, batch.numbers[0], batch.sequences[0]) from None

    def _count(self, appended: Appended) -> None:
        self._head = appended.head
        self._accepted += len(appended.texts)
        self._duplicates += appended.duplicates

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


async def _refuse(send: Send, body: LineBody, error: ContextdError) -> None:
    """The answer, which may come before the body's end; then nothing more is read of it (§7)."""
    if body.ended:
        await send_problem(send, error)
        return
    await send_problem(send, error, {"connection": "close"}, last=False)
    await body.drain()
    await send({"type": "http.response.body", "body": b"", "more_body": False})
