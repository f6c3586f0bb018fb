"""Every operation over HTTP (§2 to §9), decoded into the core's types."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Self, TypeVar, Unpack, overload

import httpx
import msgspec
from uuid_utils import uuid7

from contextd.client.attached import attached
from contextd.client.errors import patiently
from contextd.client.events import Disconnected, Event
from contextd.client.follow import Levels
from contextd.client.producing import (
    PATIENCE_S,
    SIGN_OF_LIFE_S,
    ProducedMessage,
    ProduceOptions,
    opened,
)
from contextd.client.wire import Wire, path_of
from contextd.client.wrapping import whole, wrapped
from contextd.core import signal
from contextd.core.branch import Branch, BranchPage, MergeAnswer
from contextd.core.context import Context, ContextPage
from contextd.core.message import (
    Message,
    MessagePage,
    Payload,
    Pull,
    RangePull,
    SendAnswer,
)
from contextd.core.tool_call import (
    ToolCall,
    ToolCallPage,
    ToolDecision,
    ToolStateAnswer,
)
from contextd.core.turn import (
    CancelAnswer,
    JournalEntry,
    JournalPage,
    RetryAnswer,
    Turn,
    TurnPage,
)
from contextd.core.workflow import Workflow, WorkflowPage

DEFAULT_URL = "http://127.0.0.1:8600"
T = TypeVar("T")


class Client:
    """One server's contexts, as `async with Client(url) as client`.

    `timeout_s` bounds each request but streams and waiting pulls; a stream is dead after 2.5
    heartbeats of silence. Every method raises `UnreachableError` or `ApiError`. `transport`
    replaces the network.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout_s: float = 10.0,
        heartbeat_s: float = 15.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._wire = Wire(base_url, timeout_s=timeout_s, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._wire.http.aclose()

    async def create_context(self, /, **fields: Any) -> Context:
        """A new context with the fields of §2; the same `id` and fields again give it as it is."""
        return await self._wire.ask("POST", "/contexts", Context, body=fields)

    async def get_context(self, context_id: str) -> Context:
        """The context as it is now."""
        return await self._wire.ask("GET", path_of(context_id), Context)

    async def update_context(self, /, context_id: str, **fields: Any) -> Context:
        """Changes these fields of §2 by a JSON merge patch: None resets one, others stay."""
        return await self._wire.ask("PATCH", path_of(context_id), Context, body=fields)

    async def delete_context(self, context_id: str) -> None:
        """Deletes the context and all that is in it, for good."""
        await self._wire.request("DELETE", path_of(context_id))

    async def list_contexts(
        self, *, state: Sequence[str] = (), limit: int = 50, cursor: str | None = None
    ) -> ContextPage:
        """One page of contexts, newest activity first; `state` keeps those in one of these."""
        params = {"state": list(state), "limit": limit, "cursor": cursor}
        return await self._wire.ask("GET", "/contexts", ContextPage, params=params)

    def contexts(self, *, state: Sequence[str] = ()) -> AsyncGenerator[Context]:
        """All contexts, newest activity first."""
        return self._wire.items("/contexts", ContextPage, state=list(state))

    async def send(self, /, context_id: str, payload: str | Payload, **options: Any) -> SendAnswer:
        """Stores a user's message and starts (or queues) its turn; `options` are those of §3.1.

        `payload` is a text, or a `FileReferencePayload`, `WorkflowPayload` or `TextPayload`. The
        message's id is made here, so that a lost answer is asked for again without harm.
        """
        sent = {"type": "text", "content": payload} if isinstance(payload, str) else payload
        body = {"message_id": str(uuid7()), "payload": sent, **options}
        path = path_of(context_id, "messages")
        return await patiently(lambda: self._wire.ask("POST", path, SendAnswer, body=body))

    async def get_message(self, context_id: str, message_id: str) -> Message:
        """The message without its text."""
        return await self._wire.ask("GET", path_of(context_id, "messages", message_id), Message)

    async def message_pages(
        self, context_id: str, *, content: bool = False, branch: str | None = None
    ) -> AsyncGenerator[MessagePage]:
        """The messages of a branch (default: the active one), a page at a time, oldest first.

        With `content` each has its text up to `current_sequence` or further. Attaching with the
        first page's `stream_cursor` misses nothing.
        """
        include = "content" if content else None
        path = path_of(context_id, "messages")
        async for page in self._wire.pages(path, MessagePage, branch=branch, include=include):
            if content:
                items = [await self._with_content(message) for message in page.items]
                yield msgspec.structs.replace(page, items=items)
            else:
                yield page

    async def messages(
        self, context_id: str, *, content: bool = False, branch: str | None = None
    ) -> AsyncGenerator[Message]:
        """The messages of a branch, oldest first; `content` as in `message_pages`."""
        async for page in self.message_pages(context_id, content=content, branch=branch):
            for message in page.items:
                yield message

    async def pull(
        self, context_id: str, message_id: str, from_sequence: int = 0, *, wait_s: float = 0
    ) -> Pull:
        """The text after `from_sequence`, which is what you hold (§3.3).

        The server waits up to `wait_s` (to 30) for something new. A lost answer is asked for again.
        """
        return await patiently(lambda: self._pull(context_id, message_id, from_sequence, wait_s))

    async def pull_range(
        self, context_id: str, message_id: str, from_sequence: int, to_sequence: int
    ) -> RangePull:
        """The text after `from_sequence` up to `to_sequence`: an answer that caches may keep."""
        path = path_of(context_id, "messages", message_id, "content")
        params = {"from_sequence": from_sequence, "to_sequence": to_sequence}
        return await patiently(lambda: self._wire.ask("GET", path, RangePull, params=params))

    async def get_turn(self, context_id: str, turn_id: str) -> Turn:
        """The turn as it is now."""
        return await self._wire.ask("GET", path_of(context_id, "turns", turn_id), Turn)

    def turns(self, context_id: str) -> AsyncGenerator[Turn]:
        """All turns, oldest first."""
        return self._wire.items(path_of(context_id, "turns"), TurnPage)

    def transitions(self, context_id: str) -> AsyncGenerator[JournalEntry]:
        """The journal of the state machine, oldest first (§5)."""
        return self._wire.items(path_of(context_id, "transitions"), JournalPage)

    async def cancel(self, context_id: str, turn_id: str | None = None) -> CancelAnswer:
        """Ends the running turn; with `turn_id` only that one, which may still be queued (§6)."""
        if turn_id is None:
            return await self._wire.ask(
                "POST", path_of(context_id, "cancel"), CancelAnswer, body={}
            )
        return await self._wire.ask(
            "POST", path_of(context_id, "turns", turn_id, "cancel"), CancelAnswer
        )

    async def retry(self, context_id: str, *, from_start: bool = False) -> RetryAnswer:
        """Tries the turn that failed again, as a new one (§6).

        It goes on after the last complete round, so no tool that succeeded runs again; with `from_start`
        it begins anew.
        """
        body = {"from_start": from_start}
        return await self._wire.ask("POST", path_of(context_id, "retry"), RetryAnswer, body=body)

    async def retry_turn(
        self, context_id: str, turn_id: str, *, from_start: bool = False
    ) -> RetryAnswer:
        """As `retry`, for any failed or cancelled turn whose message is the last of the user's on its
        branch; queued while the context is busy. `ApiError` says why another cannot be tried again.
        """
        body = {"from_start": from_start}
        path = path_of(context_id, "turns", turn_id, "retry")
        return await self._wire.ask("POST", path, RetryAnswer, body=body)

    def tool_calls(
        self, context_id: str, *, statuses: Sequence[str] = ()
    ) -> AsyncGenerator[ToolCall]:
        """All tool calls, oldest first; `statuses` keeps those in one of these (§8)."""
        path = path_of(context_id, "tool-calls")
        return self._wire.items(path, ToolCallPage, status=list(statuses))

    async def decide(self, context_id: str, decisions: Sequence[ToolDecision]) -> ToolStateAnswer:
        """Decides calls that wait, all or none; with the last one the turn goes on (§8).

        The same again is harmless, so a lost answer is asked for again. Raises `ApiError` with
        `tool_call_decided` where something else was decided before.
        """
        body = {"decisions": list(decisions)}
        path = path_of(context_id, "tool-calls", "decisions")
        return await patiently(lambda: self._wire.ask("POST", path, ToolStateAnswer, body=body))

    async def approve(
        self, context_id: str, tool_call_id: str, *, arguments: Mapping[str, Any] | None = None
    ) -> ToolStateAnswer:
        """Lets a call run, with `arguments` in place of the model's if given; as `decide`."""
        changed = None if arguments is None else dict(arguments)
        decision = ToolDecision(tool_call_id=tool_call_id, decision="approve", arguments=changed)
        return await self.decide(context_id, [decision])

    async def deny(
        self, context_id: str, tool_call_id: str, *, reason: str | None = None
    ) -> ToolStateAnswer:
        """Refuses a call; the model is told so, and the `reason`; as `decide`."""
        decision = ToolDecision(tool_call_id=tool_call_id, decision="deny", reason=reason)
        return await self.decide(context_id, [decision])

    async def post_result(
        self, context_id: str, tool_call_id: str, content: str, *, is_error: bool = False
    ) -> ToolStateAnswer:
        """Answers the call of an external tool that was approved; with the last one the turn goes on.

        The same again is harmless, so a lost answer is asked for again. Raises `ApiError` with
        `tool_call_decided` where the call has ended otherwise, `illegal_transition` where no result
        of it is expected (§8).
        """
        body = {"content": content, "is_error": is_error}
        path = path_of(context_id, "tool-calls", tool_call_id, "result")
        return await patiently(lambda: self._wire.ask("POST", path, ToolStateAnswer, body=body))

    def workflows(self) -> AsyncGenerator[Workflow]:
        """All workflows of the server, by name, also those whose `error` says why they cannot be used."""
        return self._wire.items("/workflows", WorkflowPage)

    def branches(self, context_id: str) -> AsyncGenerator[Branch]:
        """All branches, oldest first (§9)."""
        return self._wire.items(path_of(context_id, "branches"), BranchPage)

    async def get_branch(self, context_id: str, name: str) -> Branch:
        """The branch as it is now."""
        return await self._wire.ask("GET", path_of(context_id, "branches", name), Branch)

    async def create_branch(
        self,
        context_id: str,
        name: str,
        *,
        from_message_id: str | None = None,
        empty: bool = False,
    ) -> Branch:
        """A branch after a message (default: where the active branch ends), or an `empty` one."""
        start = {"from_message_id": None} if empty else {}
        body = {"name": name, **_without_none({"from_message_id": from_message_id}), **start}
        return await self._wire.ask("POST", path_of(context_id, "branches"), Branch, body=body)

    async def delete_branch(self, context_id: str, name: str) -> None:
        """Deletes a branch that is not the active one; its messages stay readable by their ids."""
        await self._wire.request("DELETE", path_of(context_id, "branches", name))

    async def merge(
        self, context_id: str, name: str, source: str, message_ids: Sequence[str] | None = None
    ) -> MergeAnswer:
        """Appends copies of the source's messages since the common ancestor, or of those named.

        Once more it adds only what is not there yet.
        """
        body = _without_none({"source": source, "message_ids": message_ids})
        path = path_of(context_id, "branches", name, "merge")
        return await self._wire.ask("POST", path, MergeAnswer, body=body)

    def signals(
        self, context_id: str, *, cursor: str | None = None, throttle_ms: int = 30
    ) -> AsyncGenerator[signal.Signal | Disconnected]:
        """The signals of a context from `cursor` on, over as many connections as it takes (§4).

        Ends after the `state_changed` to `deleted`, which is made here if the context was deleted while
        this was cut off. Raises `ApiError` as `follow` does.
        """
        return attached(
            self._wire,
            context_id,
            cursor,
            throttle_ms=throttle_ms,
            heartbeat_s=self._heartbeat_s,
        )

    async def follow(
        self,
        context_id: str,
        *,
        cursor: str | None = None,
        held: Mapping[str, int] | None = None,
        throttle_ms: int = 30,
    ) -> AsyncGenerator[Event]:
        """What happens in a context from `cursor` on, all text exactly once and in order (§4.4).

        Goes on over broken connections and restarts. `held`: the sequences, by message id, that the
        caller has. Ends with the state `deleted`, also if the context was deleted while this was cut
        off. Raises `ApiError` where a new try is pointless (404: no such context), and where the
        server fails `DOUBTS_MAX` times in a row in a way that may be a defect (500). To stop early,
        close it (`contextlib.aclosing`).
        """
        levels = Levels(held or {}, lambda *place: self._pull(context_id, *place))
        signals = self.signals(context_id, cursor=cursor, throttle_ms=throttle_ms)
        watch = asyncio.create_task(levels.watch(signals))
        try:
            async with aclosing(levels.events(watch)) as events:
                async for event in events:
                    yield event
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    def produce(
        self,
        context_id: str,
        *,
        message_id: str | None = None,
        role: str = "assistant",
        kind: str = "text",
        producer_id: str | None = None,
        epoch: int | None = None,
        branch: str | None = None,
        parent_id: str | None = None,
        media_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        patience_s: float = PATIENCE_S,
        sign_of_life_s: float = SIGN_OF_LIFE_S,
        reveal_errors: bool = False,
    ) -> AbstractAsyncContextManager[ProducedMessage]:
        """A message that is written here (§7), as `async with client.produce(id) as message`.

        Leaving the block completes it, an exception marks it failed. With the `message_id` of an
        open one it goes on from `message.sequence`, and whoever wrote it before is shut out: by the
        next epoch, unless `epoch` is given. An outage of the server may take `patience_s`. After
        `sign_of_life_s` of silence the server is told that the producer lives. The class of an
        exception is stored, and its text only if you `reveal_errors`, as it may hold chat text.

        Raises `MessageClosedError`, `TakenOverError`, and `ApiError` with `context_busy` while a
        turn runs.
        """
        producer = {"id": producer_id or str(uuid7()), "epoch": epoch}
        opening = {
            "role": role,
            "kind": kind,
            "branch": branch,
            "parent_id": parent_id,
            "media_type": media_type,
            "metadata": metadata,
        }
        message = ProducedMessage(
            self._wire,
            self.pull,
            context_id,
            message_id or str(uuid7()),
            producer=_without_none(producer),
            opening=_without_none(opening),
            is_own_id=producer_id is None,
            patience_s=patience_s,
            sign_of_life_s=sign_of_life_s,
            reveal_errors=reveal_errors,
        )
        return opened(message)

    @overload
    def wrap(
        self,
        context_id: str,
        source: AsyncIterable[str],
        *,
        text: None = None,
        **options: Unpack[ProduceOptions],
    ) -> AsyncGenerator[str]: ...
    @overload
    def wrap(
        self,
        context_id: str,
        source: AsyncIterable[T],
        *,
        text: Callable[[T], str | None],
        **options: Unpack[ProduceOptions],
    ) -> AsyncGenerator[T]: ...
    def wrap(
        self,
        context_id: str,
        source: AsyncIterable[Any],
        *,
        text: Callable[[Any], str | None] | None = None,
        **options: Unpack[ProduceOptions],
    ) -> AsyncGenerator[Any]:
        """Passes `source` on, item by item and untouched, and keeps its text as a message (§7).

        `text` picks the text of an item, None or "" where it has none; without it items are text.
        An item is passed on at once and becomes durable after that; the end comes when all is.
        `options` are those of `produce`. An error of the source marks the message failed and is
        raised. So does stopping early, by `aclose` as by cancellation, with the error `cancelled`:
        what was passed on stays, and a message that says `completed` is one whose source came to
        its end. Close it (`contextlib.aclosing`) where you may leave the loop; the source is closed
        with it.
        """
        return wrapped(self.produce(context_id, **options), source, text or whole)

    async def _pull(
        self, context_id: str, message_id: str, from_sequence: int, wait_s: float = 0
    ) -> Pull:
        path = path_of(context_id, "messages", message_id, "content")
        wait = {"wait": f"{wait_s:g}"} if wait_s else {}
        params = {"from_sequence": from_sequence, **wait}
        return await self._wire.ask(
            "GET", path, Pull, params=params, timeout_s=self._timeout_s + wait_s
        )

    async def _with_content(self, message: Message) -> Message:
        """A page carries at most 1 MiB of text; the rest is pulled."""
        texts, sequence = [message.content or ""], message.content_sequence or 0
        while sequence < message.current_sequence:
            answer = await self.pull(message.context_id, message.id, sequence)
            if answer.sequence == sequence:  # the server has less than it said: not to ask for ever
                break
            texts.append(answer.content)
            sequence = answer.sequence
        return msgspec.structs.replace(message, content="".join(texts), content_sequence=sequence)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
