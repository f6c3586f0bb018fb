"""What the fake server holds, how it looks as JSON, and one request to it."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

AT = "2026-01-02T03:04:05.678Z"


class CutError(Exception):
    """Makes uvicorn drop the connection in the middle of an answer."""


@dataclass
class FakeMessage:
    id: str
    role: str
    kind: str
    turn_id: str | None = None
    chunks: list[str] = field(default_factory=list)
    status: str = "streaming"
    revision: int = 0
    producer_id: str | None = None
    epoch: int = 0
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    error: dict[str, str] | None = None

    @property
    def text(self) -> str:
        return "".join(self.chunks)


@dataclass
class FakeTurn:
    id: str
    text: str
    status: str = "queued"
    error: dict[str, str] | None = None
    message_ids: list[str] = field(default_factory=list)


@dataclass
class FakeContext:
    id: str
    title: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    state: str = "idle"
    revision: int = 1
    messages: dict[str, FakeMessage] = field(default_factory=dict)
    turns: dict[str, FakeTurn] = field(default_factory=dict)
    readers: set["asyncio.Queue[dict[str, Any] | None]"] = field(default_factory=set)


@dataclass
class Faults:
    """Each list is used up from the front, one entry a connection or a request."""

    cut_streams: list[int] = field(default_factory=list)  # after so many frames
    end_streams: list[int] = field(default_factory=list)  # the same, cleanly, with `retry: 25`
    silent_streams: int = 0
    refuse_streams: list[int] = field(default_factory=list)  # with this status
    refuse_pulls: list[int] = field(default_factory=list)
    refuse_sends: list[int] = field(default_factory=list)
    cut_pulls: int = 0
    stale_pulls: int = 0  # answered as if the message were still open
    repeat: int = 1  # every signal this often
    lose: Callable[[dict[str, Any]], bool] = lambda _: False  # live signals that are not sent
    chunks_per_pull: int = 1_000_000
    hold_pulls: asyncio.Event | None = None
    retry_after: str = "0"


def state_json(context: FakeContext) -> dict[str, Any]:
    return {
        "type": "state_changed",
        "context_id": context.id,
        "new_state": context.state,
        "revision": context.revision,
        "record_revision": 1,
        "timestamp": AT,
    }


def signal_json(context: FakeContext, message: FakeMessage) -> dict[str, Any]:
    facts = {
        "context_id": context.id,
        "message_id": message.id,
        "role": message.role,
        "kind": message.kind,
        "timestamp": AT,
    }
    if message.status == "streaming":
        return facts | {"type": "content_delta", "current_sequence": len(message.chunks)}
    return facts | {
        "type": "message_completed",
        "final_sequence": len(message.chunks),
        "status": message.status,
        "revision": message.revision,
    }


def context_json(context: FakeContext) -> dict[str, Any]:
    return {
        "id": context.id,
        "title": context.title,
        "state": context.state,
        "state_detail": {},
        "revision": context.revision,
        "record_revision": 1,
        "stream_cursor": f"f-{context.revision}",
        "mode": "act",
        "active_branch": "main",
        "system_prompt": None,
        "provider": "scripted",
        "model": None,
        "tools": [],
        "approval_policy": {},
        "on_busy": "enqueue",
        "metadata": context.metadata,
        "message_count": len(context.messages),
        "open_messages": [],
        "pending_tool_calls": [],
        "queued_messages": 0,
        "can_send": True,
        "created_at": AT,
        "updated_at": AT,
        "some_field_of_the_future": 1,
    }


def message_json(context: FakeContext, message: FakeMessage) -> dict[str, Any]:
    closed = message.status != "streaming"
    return {
        "id": message.id,
        "context_id": context.id,
        "turn_id": message.turn_id,
        "parent_id": None,
        "role": message.role,
        "kind": message.kind,
        "status": message.status,
        "current_sequence": len(message.chunks),
        "final_sequence": len(message.chunks) if closed else None,
        "media_type": "text/plain",
        "finish_reason": message.finish_reason,
        "usage": message.usage,
        "error": message.error,
        "metadata": {},
        "client_metadata": {},
        "stats": None,
        "created_at": AT,
        "completed_at": AT if closed else None,
    } | ({"epoch": message.epoch} if message.producer_id else {})


def turn_json(context: FakeContext, turn: FakeTurn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "context_id": context.id,
        "branch": "main",
        "status": turn.status,
        "attempt": 1,
        "retry_of": None,
        "started_at": AT,
        "ended_at": None,
        "first_chunk_ms": None,
        "finish_reason": None,
        "phases": {},
        "message_ids": turn.message_ids,
        "usage": None,
        "error": turn.error,
    }


def entry_json(context: FakeContext) -> dict[str, Any]:
    return {
        "revision": context.revision,
        "turn_id": None,
        "trigger": "finish",
        "from_state": "processing_llm_response",
        "to_state": "idle",
        "at": AT,
        "duration_ms": 3,
        "detail": {},
    }


@dataclass
class Request:
    scope: dict[str, Any]
    path: list[str]
    query: dict[str, list[str]]
    body: dict[str, Any]
    send: Any
    receive: Any

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    def header(self, name: str) -> str | None:
        return next((v.decode() for k, v in self.scope["headers"] if k.decode() == name), None)

    async def begin(self, status: int, type_: str, headers: dict[str, str] | None = None) -> None:
        pairs = {"content-type": type_, **(headers or {})}
        raw = [(name.encode(), value.encode()) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def more(self, body: bytes, *, last: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def answer(self, status: int, body: Any) -> None:
        await self.begin(status, "application/json")
        await self.more(b"" if body is None else json.dumps(body).encode(), last=True)

    async def refuse(
        self, status: int, code: str, detail: str, retry_after: str = "", **facts: Any
    ) -> None:
        headers = {"retry-after": retry_after} if retry_after else {}
        await self.begin(status, "application/problem+json", headers)
        problem = {"type": code, "status": status, "code": code, "detail": detail, **facts}
        await self.more(json.dumps(problem).encode(), last=True)

    async def cut(self) -> NoReturn:
        """No answer: the connection breaks."""
        await self.begin(200, "application/json", {"content-length": "100000"})
        await self.more(b"{")
        raise CutError

    async def gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
