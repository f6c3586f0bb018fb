"""A small contextd that misbehaves when told to: raw ASGI, in memory, as much of the contract as needed.

Tests change `faults` and call `append`, `close` and `set_state`; what was asked is in `pulls` and
`streams`. A send plays `script`, or answers `You said: …` a word a chunk.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
from fake_producing import FakeProducing
from fake_wire import (
    AT,
    CutError,
    FakeContext,
    FakeMessage,
    FakeTurn,
    Faults,
    Request,
    context_json,
    entry_json,
    message_json,
    signal_json,
    state_json,
    turn_json,
)


class FakeContextd:
    def __init__(self) -> None:
        self.url = ""
        self.contexts: dict[str, FakeContext] = {}
        self.faults = Faults()
        self.producing = FakeProducing(self)
        self.script: list[tuple[str, str]] | None = None
        self.rate_s = 0.0
        self.sends: dict[str, dict[str, Any]] = {}
        self.pulls: list[tuple[str, int]] = []
        self.pulling: dict[str, int] = {}
        self.pulling_max: dict[str, int] = {}
        self.streams: list[str | None] = []
        self.requests: list[tuple[str, str]] = []
        self.queries: list[dict[str, list[str]]] = []
        self.page_limit = 100
        self.page_chunks_max = 1_000_000
        self.noted = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    # What a test does to it.

    def add(self, context_id: str, **fields: Any) -> FakeContext:
        self.contexts[context_id] = context = FakeContext(context_id, **fields)
        return context

    def append(self, context: FakeContext, id_: str, *texts: str, **fields: Any) -> FakeMessage:
        message = context.messages.get(id_)
        if message is None:
            message = FakeMessage(id_, fields.pop("role", "assistant"), fields.pop("kind", "text"))
            message.turn_id = fields.pop("turn_id", None)
            context.messages[id_] = message
            self._touch(context, message)
        message.chunks += texts
        self._tell(context, signal_json(context, message))
        return message

    def close(self, context: FakeContext, id_: str, status: str = "completed") -> None:
        message = context.messages[id_]
        message.status = status
        self._touch(context, message)
        self._tell(context, signal_json(context, message))

    def set_state(self, context: FakeContext, state: str) -> None:
        context.state = state
        self._touch(context)
        self._tell(context, state_json(context))

    def delete(self, context: FakeContext) -> None:
        del self.contexts[context.id]
        self.set_state(context, "deleted")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.noted:
            await self.noted.wait_for(condition)

    # The wire.

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        body = b""
        while (part := await receive())["type"] == "http.request":
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        path = [unquote(part) for part in scope["raw_path"].decode().split("/")[1:]]
        query = parse_qs(scope["query_string"].decode())
        self.requests.append((scope["method"], scope["raw_path"].decode()))
        self.queries.append(query)
        request = Request(scope, path, query, json.loads(body) if body else {}, send, receive)
        async with self.noted:
            self.noted.notify_all()
        await self._route(request)

    async def _route(self, request: "Request") -> None:
        match request.method, request.path:
            case "GET", ["contexts"]:
                await self._list(request)
            case "POST", ["contexts"]:
                context = self.add(request.body.get("id", f"c{len(self.contexts)}"))
                context.title = request.body.get("title")
                await request.answer(201, context_json(context))
            case _, ["contexts", id_, *_] if id_ not in self.contexts:
                await request.refuse(404, "context_not_found", "There is no such context here.")
            case _, ["contexts", id_, *rest]:
                await self._route_context(request, self.contexts[id_], rest)
            case _:
                await request.refuse(404, "not_found", "Not found")

    async def _route_context(
        self, request: "Request", context: FakeContext, rest: list[str]
    ) -> None:
        match request.method, rest:
            case "GET", []:
                await request.answer(200, context_json(context))
            case "PATCH", []:
                for name, value in request.body.items():
                    setattr(context, name, value)
                await request.answer(200, context_json(context))
            case "DELETE", []:
                self.delete(context)
                await request.answer(204, None)
            case "GET", ["stream"]:
                await self._stream(request, context)
            case "GET", ["messages"]:
                await self._messages(request, context)
            case "POST", ["messages"]:
                await self._send(request, context)
            case "GET", ["messages", id_, *_] if id_ not in context.messages:
                await request.refuse(404, "message_not_found", "There is no such message here.")
            case "GET", ["messages", id_]:
                await request.answer(200, message_json(context, context.messages[id_]))
            case "GET", ["messages", id_, "content"]:
                await self._content(request, context, context.messages[id_])
            case "PUT" | "POST", ["messages", id_, *verb]:
                await self.producing.answer(request, context, id_, *verb)
            case "GET", ["turns"]:
                items = [turn_json(context, turn) for turn in context.turns.values()]
                await request.answer(200, {"items": items, "next_cursor": None})
            case "GET", ["turns", id_]:
                await request.answer(200, turn_json(context, context.turns[id_]))
            case "GET", ["transitions"]:
                await request.answer(200, {"items": [entry_json(context)], "next_cursor": None})
            case "POST", ["cancel"]:
                await request.answer(200, self.cancel(context, None))
            case "POST", ["turns", id_, "cancel"]:
                await request.answer(200, self.cancel(context, id_))
            case "POST", ["retry"]:
                answer = {"turn_id": "t-again", "state": "awaiting_llm_response", "revision": 9}
                await request.answer(202, answer)
            case "POST", ["turns", id_, "retry"]:
                answer = {"turn_id": f"{id_}-again", "state": "processing_user_message"}
                await request.answer(202, answer | {"revision": 9})
            case _:
                await request.refuse(405, "method_not_allowed", "Not here")

    async def _list(self, request: "Request") -> None:
        wanted = request.query.get("state")
        every = [c for c in self.contexts.values() if not wanted or c.state in wanted]
        items, next_cursor = self._page(request, every)
        found = [context_json(context) for context in items]
        await request.answer(200, {"items": found, "next_cursor": next_cursor})

    async def _messages(self, request: "Request", context: FakeContext) -> None:
        items, next_cursor = self._page(request, list(context.messages.values()))
        page = {
            "items": [message_json(context, message) for message in items],
            "next_cursor": next_cursor,
            "revision": context.revision,
            "stream_cursor": f"f-{context.revision}",
        }
        if request.query.get("include") == ["content"]:
            for item, message in zip(page["items"], items, strict=True):
                some = message.chunks[: self.page_chunks_max]
                item |= {"content": "".join(some), "content_sequence": len(some)}
        await request.answer(200, page)

    def _page(self, request: "Request", every: list[Any]) -> tuple[list[Any], str | None]:
        start = int(request.query.get("cursor", ["0"])[0])
        limit = min(int(request.query.get("limit", ["100"])[0]), self.page_limit)
        more = start + limit < len(every)
        return every[start : start + limit], str(start + limit) if more else None

    async def _send(self, request: "Request", context: FakeContext) -> None:
        if self.faults.refuse_sends:
            # Stored all the same: an answer that is lost is the reason why a send is repeated.
            self._receive(request.body, context)
            status = self.faults.refuse_sends.pop(0)
            await request.refuse(status, "overloaded", "Busy", self.faults.retry_after)
            return
        turn_id = self._receive(request.body, context)
        answer = {
            "context_id": context.id,
            "message_id": request.body["message_id"],
            "turn_id": turn_id,
            "state": context.state,
            "revision": context.revision,
            "stream_cursor": f"f-{context.revision}",
            "queued": False,
        }
        await request.answer(202, answer)

    def _receive(self, body: dict[str, Any], context: FakeContext) -> str:
        id_, text = body["message_id"], body["payload"]["content"]
        turn_id = f"turn-{id_}"
        if id_ not in self.sends:
            self.sends[id_] = body
            context.turns[turn_id] = FakeTurn(turn_id, text)
            message = FakeMessage(id_, "user", "text", turn_id, [text], "completed")
            context.messages[id_] = message
            context.turns[turn_id].message_ids.append(id_)
            self._touch(context, message)
            self.set_state(context, "processing_user_message")
            task = asyncio.create_task(self._play(context, context.turns[turn_id]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return turn_id

    async def _play(self, context: FakeContext, turn: FakeTurn) -> None:
        turn.status = "running"
        words = re.findall(r"\S+\s*|\s+", f"You said: {turn.text}")
        steps = self.script or [("text", word) for word in words]
        current = ""
        for step, (kind, text) in enumerate(steps):
            await asyncio.sleep(self.rate_s)
            if turn.status != "running":
                return
            if kind == "error":
                self._end(context, turn, "failed", current, text)
                return
            if kind in {"interrupt", "wait"}:
                if kind == "interrupt":
                    self.close(context, current, "interrupted")
                    current = ""
                continue
            if not current or context.messages[current].kind != kind:
                if current:
                    self.close(context, current)
                current = f"{turn.id}-{step}"
                turn.message_ids.append(current)
            self.append(context, current, text, kind=kind, turn_id=turn.id)
            self.set_state(context, "streaming_llm_response")
        self._end(context, turn, "completed", current)

    def _end(
        self, context: FakeContext, turn: FakeTurn, status: str, last: str, error: str = ""
    ) -> None:
        turn.status = status
        if error:
            turn.error = {"type": "model_error", "message": error}
        if last and context.messages[last].status == "streaming":
            self.close(context, last, status)
        self.set_state(context, "failed" if status == "failed" else "idle")

    def cancel(self, context: FakeContext, turn_id: str | None) -> dict[str, Any]:
        running = next((t for t in context.turns.values() if t.status == "running"), None)
        if running is None or turn_id not in {None, running.id}:
            return {"state": context.state, "cancelled_turn_id": None}
        self._end(context, running, "cancelled", running.message_ids[-1])
        return {"state": context.state, "cancelled_turn_id": running.id}

    async def _content(
        self, request: "Request", context: FakeContext, message: FakeMessage
    ) -> None:
        held = int(request.query.get("from_sequence", ["0"])[0])
        self.pulls.append((message.id, held))
        self.pulling[message.id] = self.pulling.get(message.id, 0) + 1
        most = max(self.pulling_max.get(message.id, 0), self.pulling[message.id])
        self.pulling_max[message.id] = most
        async with self.noted:
            self.noted.notify_all()
        if self.faults.hold_pulls:
            await self.faults.hold_pulls.wait()
        self.pulling[message.id] -= 1
        if self.faults.refuse_pulls:
            status = self.faults.refuse_pulls.pop(0)
            await request.refuse(status, "overloaded", "Busy", self.faults.retry_after)
            return
        answer = self._pull(context, message, held, request.query)
        if self.faults.cut_pulls:
            self.faults.cut_pulls -= 1
            await request.begin(200, "application/json", {"content-length": "100000"})
            await request.more(json.dumps(answer).encode())
            raise CutError
        await request.answer(200, answer)

    def _pull(
        self, context: FakeContext, message: FakeMessage, held: int, query: dict[str, list[str]]
    ) -> dict[str, Any]:
        chunks = message.chunks[held : held + self.faults.chunks_per_pull]
        sequence = held + len(chunks)
        status = "streaming" if self.faults.stale_pulls else message.status
        self.faults.stale_pulls = max(0, self.faults.stale_pulls - 1)
        answer = {
            "context_id": context.id,
            "message_id": message.id,
            "from_sequence": held,
            "sequence": sequence,
            "content": "".join(chunks),
        }
        if "to_sequence" in query:
            sequence = min(sequence, int(query["to_sequence"][0]))
            return answer | {
                "sequence": sequence,
                "content": "".join(message.chunks[held:sequence]),
            }
        return answer | {
            "head_sequence": len(message.chunks),
            "status": status,
            "final": status != "streaming" and sequence == len(message.chunks),
            "some_field_of_the_future": True,
        }

    async def _stream(self, request: "Request", context: FakeContext) -> None:
        cursor = request.header("last-event-id")
        self.streams.append(cursor)
        if self.faults.refuse_streams:
            status = self.faults.refuse_streams.pop(0)
            await request.refuse(status, "overloaded", "Busy", self.faults.retry_after)
            return
        await request.begin(200, "text/event-stream")
        await request.more(b": hello\n\n")
        if self.faults.silent_streams:
            self.faults.silent_streams -= 1
            await request.gone()
            return
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        context.readers.add(queue)
        gone = asyncio.create_task(self._until_gone(request, queue))
        try:
            await self._frames(request, context, cursor, queue)
        finally:
            gone.cancel()
            context.readers.discard(queue)

    async def _until_gone(
        self, request: "Request", queue: "asyncio.Queue[dict[str, Any] | None]"
    ) -> None:
        await request.gone()
        queue.put_nowait(None)

    async def _frames(
        self,
        request: "Request",
        context: FakeContext,
        cursor: str | None,
        queue: "asyncio.Queue[dict[str, Any] | None]",
    ) -> None:
        cut = self.faults.cut_streams.pop(0) if self.faults.cut_streams else -1
        end = self.faults.end_streams.pop(0) if self.faults.end_streams else -1
        snapshot = self._snapshot(context, cursor)
        sent = 0
        while True:
            told = snapshot.pop(0) if snapshot else await queue.get()
            if sent == cut:
                raise CutError
            if told is None or sent == end:
                await request.more(b"retry: 25\n\n", last=True)
                return
            whole = not snapshot or told["type"] == "state_changed"
            id_ = f"id: f-{told['revision']}\n" if "revision" in told and whole else ""
            frame = f"{id_}data: {json.dumps(told)}\n\n".encode()
            await request.more(frame * self.faults.repeat)
            sent += 1
            if told.get("new_state") == "deleted":
                await request.more(b"", last=True)
                return

    def _snapshot(self, context: FakeContext, cursor: str | None) -> list[dict[str, Any]]:
        known = int(cursor.removeprefix("f-")) if cursor else 0
        changed = [
            message
            for message in context.messages.values()
            if message.revision > known or message.status == "streaming"
            if cursor or message.role != "user"
        ]
        changed.sort(key=lambda message: message.revision)
        signals = [signal_json(context, message) for message in changed]
        return [*signals, state_json(context), {"type": "heartbeat", "timestamp": AT}]

    def _touch(self, context: FakeContext, message: FakeMessage | None = None) -> None:
        context.revision += 1
        if message:
            message.revision = context.revision

    def _tell(self, context: FakeContext, told: dict[str, Any]) -> None:
        if not self.faults.lose(told):
            for queue in context.readers:
                queue.put_nowait(told)

    def heartbeat(self, context: FakeContext) -> None:
        self._tell(context, {"type": "heartbeat", "timestamp": AT})

    def disconnect(self, context: FakeContext) -> None:
        for queue in context.readers:
            queue.put_nowait(None)


class _Server(uvicorn.Server):
    """Says when it accepts connections."""

    def __init__(self, app: FakeContextd) -> None:
        super().__init__(
            uvicorn.Config(
                app, host="127.0.0.1", port=0, lifespan="off", log_level="critical", ws="none"
            )
        )
        self.ready = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@asynccontextmanager
async def serving(app: FakeContextd) -> AsyncIterator[FakeContextd]:
    """`app` on a free loopback port, which its `url` names."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # it is told to cut answers
    server = _Server(app)
    task = asyncio.create_task(server._serve())
    await server.ready.wait()
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield app
    finally:
        # uvicorn's own way takes a tenth of a second, which a hundred tests would add up.
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.close()  # type: ignore[union-attr]
        ending = [task, *server.server_state.tasks]
        for each in ending:
            each.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
