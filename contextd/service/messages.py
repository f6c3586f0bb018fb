"""Sending to a conversation, and listing it (§3.1, §3.2)."""

from typing import Any

import msgspec
from sqlalchemy import select

from contextd.core.errors import ContextBusy, ContextdError, IdTaken, QueueFull
from contextd.core.machine import Trigger
from contextd.core.message import (
    FileReferencePayload,
    Message,
    MessagePage,
    MessageStatus,
    Payload,
    SendAnswer,
    SendRequest,
)
from contextd.service.contexts import check_size, content_hash
from contextd.service.ledger import Ledger
from contextd.service.payloads import Composed, Payloads
from contextd.service.steps import Steps
from contextd.service.turn_rows import add_references, queue_length, running_turn
from contextd.service.wire import decode_cursor, encode_cursor, message_wire
from contextd.store.edit import ContextEdit, MessageDraft
from contextd.store.reader import Reader
from contextd.store.tables import AnyRow, messages, turns

DEPTH_MAX = 2**31 - 1  # what the column holds


class Messages:
    """Takes messages in, and reads them."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        steps: Steps,
        payloads: Payloads,
        *,
        queue_max: int,
        page_bytes_max: int,
        metadata_bytes_max: int,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._steps = steps
        self._payloads = payloads
        self._queue_max = queue_max
        self._page_bytes_max = page_bytes_max
        self._metadata_bytes_max = metadata_bytes_max

    async def send(self, context_id: str, request: SendRequest) -> SendAnswer:
        """Stores the message at once and starts, queues or refuses its turn; one transaction.

        A repeat with the same `message_id` and content starts nothing. Raises `ContextBusy`,
        `QueueFull`, `IdTaken`, `BranchNotFound`, `MessageNotFound`, `PayloadTooLarge`.
        """
        check_size(request.client_metadata, self._metadata_bytes_max)
        message_id = request.message_id or self._ledger.new_id()
        turn_id = self._ledger.new_id()
        digest = content_hash([request.payload, request.role])
        composed = await self._compose(request.payload)
        files = await self._files(request)

        async def work(edit: ContextEdit) -> SendAnswer:
            # Also an id of our own: this may be another try, after an answer that was lost.
            stored = await _find(edit, message_id)
            if stored is not None:
                return await self._repeated(edit, stored, digest)
            if isinstance(composed, ContextdError):
                raise composed  # only now: a repeat of what was good stays good
            queued = request.respond and await self._make_way(edit, request)
            branch = request.branch or edit.row.active_branch
            if request.parent_id is not None:
                branch = await edit.tree.fork(
                    from_message_id=request.parent_id, name=request.branch
                )
                edit.put(active_branch=branch)
            draft = MessageDraft(
                id=message_id,
                role=request.role,
                status=MessageStatus.COMPLETED,
                turn_id=turn_id if request.respond else None,
                kind=composed.kind,
                texts=[composed.content],
                metadata=composed.metadata,
                client_metadata=request.client_metadata,
                payload_hash=digest,
            )
            forked = request.parent_id is not None
            if not request.respond:
                edit.change(record=forked)
                await edit.add_message(draft, branch=branch)
                await add_references(
                    edit,
                    files,
                    new_id=self._ledger.new_id,
                    message_id=message_id,
                    turn_id=None,
                    branch=branch,
                )
            else:
                await self._add_turn(edit, draft, branch=branch, queued=queued, forked=forked)
            return self._answer(edit, message_id, turn_id if request.respond else None, queued)

        return (await self._ledger.edit(context_id, work))[1]

    async def _compose(self, payload: Payload) -> Composed | ContextdError:
        try:
            composed = await self._payloads.compose(payload)
            shown = "what is shown for the message, its paths or its parameters"
            check_size(composed.metadata, self._metadata_bytes_max, shown)
        except ContextdError as error:
            return error
        return composed

    async def _files(self, request: SendRequest) -> list[tuple[str, str]]:
        """What a message refers to that no turn will read."""
        if request.respond or not isinstance(request.payload, FileReferencePayload):
            return []
        return await self._payloads.read(request.payload.paths)

    async def get(self, context_id: str, message_id: str) -> Message:
        """Raises `ContextNotFound` or `MessageNotFound`."""
        seen_s = self._ledger.tail.now_s()
        row = await self._reader.message(context_id, message_id)
        self._ledger.learn(context_id, [row], seen_s)
        return message_wire(row, context_id)

    async def list(
        self,
        context_id: str,
        *,
        branch: str | None,
        cursor: str | None,
        limit: int,
        include_content: bool,
    ) -> MessagePage:
        """A branch in conversation order, then what is queued on it."""
        depth, queued_key = decode_cursor(cursor, (0, 0))
        depth = min(depth, DEPTH_MAX)
        seen_s = self._ledger.tail.now_s()
        context, rows = await self._reader.conversation(
            context_id,
            branch=branch,
            after_depth=depth,
            after_queued_key=queued_key,
            limit=limit + 1,
        )
        self._ledger.learn(context_id, rows, seen_s)
        more = len(rows) > limit
        rows = rows[:limit]
        for row in rows:
            depth = max(depth, row.depth or 0)
            queued_key = queued_key if row.depth else max(queued_key, row.key)
        next_cursor = encode_cursor(depth, queued_key) if more else None
        return await self._page(context, rows, next_cursor, include_content)

    async def list_changed(
        self,
        context_id: str,
        *,
        since_revision: int,
        cursor: str | None,
        limit: int,
        include_content: bool,
    ) -> MessagePage:
        """Messages changed after a revision, in the order of their changes, of all branches."""
        revision, key = decode_cursor(cursor, (since_revision, 2**62))
        seen_s = self._ledger.tail.now_s()
        changes = await self._reader.changes(context_id, after=(revision, key), limit=limit)
        self._ledger.learn_context(changes.context, changes.open_messages, seen_s)
        next_cursor = None
        if not changes.complete:
            last = changes.messages[-1]
            next_cursor = encode_cursor(last.revision, last.key)
        return await self._page(changes.context, changes.messages, next_cursor, include_content)

    async def _page(
        self, context: AnyRow, rows: Any, next_cursor: str | None, include_content: bool
    ) -> MessagePage:
        items = [message_wire(row, context.id) for row in rows]
        if include_content:
            texts = await self._reader.contents(rows, bytes_max=self._page_bytes_max)
            pieces = [texts.get(row.key, (0, "")) for row in rows]
            items = [
                msgspec.structs.replace(item, content=content, content_sequence=sequence)
                for item, (sequence, content) in zip(items, pieces, strict=True)
            ]
        return MessagePage(
            items=items,
            next_cursor=next_cursor,
            revision=context.revision,
            stream_cursor=self._ledger.cursor(context.revision),
        )

    async def _make_way(self, edit: ContextEdit, request: SendRequest) -> bool:
        """Whether the message has to queue; refuses or interrupts where it was asked to."""
        if not edit.busy:
            return False
        on_busy = request.on_busy or edit.row.on_busy
        if on_busy == "reject":
            raise ContextBusy(edit.state)
        if on_busy == "interrupt":
            await self._interrupt(edit)
            return False
        if await queue_length(edit) >= self._queue_max:
            raise QueueFull(f"{self._queue_max} messages are queued already.")
        return True

    async def _interrupt(self, edit: ContextEdit) -> None:
        """Makes room at once: what was written stays."""
        running = await running_turn(edit)
        if running is not None:
            await self._steps.cancel_in(edit, running)
        else:
            await self._steps.stop_producers(edit)

    async def _add_turn(
        self, edit: ContextEdit, draft: MessageDraft, *, branch: str, queued: bool, forked: bool
    ) -> None:
        turn_id = draft.turn_id or ""
        if queued:
            edit.change(record=True)
            message = await edit.add_queued_message(draft, branch=branch)
        else:
            await edit.step(Trigger.RECEIVE_MESSAGE, turn_id=turn_id, record=forked)
            message = await edit.add_message(draft, branch=branch)
        await self._steps.add_turn(
            edit, turn_id=turn_id, branch=branch, user_message_key=message.key, queued=queued
        )

    async def _repeated(self, edit: ContextEdit, stored: AnyRow, digest: str) -> SendAnswer:
        """The answer to a send that was heard before; nothing is changed."""
        if stored.payload_hash != digest:
            raise IdTaken(stored.id)
        status = await edit.connection.scalar(
            select(turns.c.status).where(
                turns.c.context_key == edit.key, turns.c.id == stored.turn_id
            )
        )
        return self._answer(edit, stored.id, stored.turn_id, status == "queued")

    def _answer(
        self, edit: ContextEdit, message_id: str, turn_id: str | None, queued: bool
    ) -> SendAnswer:
        return SendAnswer(
            context_id=edit.context_id,
            message_id=message_id,
            turn_id=turn_id,
            state=edit.state,
            revision=edit.revision,
            stream_cursor=self._ledger.cursor(edit.revision),
            queued=queued,
        )


async def _find(edit: ContextEdit, message_id: str) -> AnyRow | None:
    query = select(messages).where(messages.c.context_key == edit.key, messages.c.id == message_id)
    return (await edit.connection.execute(query)).one_or_none()
