"""What can be done to a context as a whole (§2)."""

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import structlog
from msgspec import UNSET
from sqlalchemy import Column, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.context import (
    MAIN_BRANCH,
    ApprovalPolicy,
    Context,
    ContextPage,
    ContextPatch,
    ContextRequest,
    ExternalTool,
    Tool,
)
from contextd.core.errors import (
    ContextNotFound,
    IdTaken,
    InvalidRequest,
    PayloadTooLarge,
    ShuttingDown,
    defect_in,
)
from contextd.core.machine import State
from contextd.core.values import JsonObject
from contextd.service.ledger import Ledger
from contextd.service.toolset import ALL, Toolset
from contextd.service.turn_rows import CANCELLED, QUEUED, RUNNING, UNDECIDED
from contextd.service.wire import context_wire, decode_cursor, encode_cursor
from contextd.store.edit import ContextEdit
from contextd.store.locks import for_update, lock_name
from contextd.store.reader import ContextSnapshot, Reader
from contextd.store.stored import stored_object, stored_policy
from contextd.store.tables import (
    AnyRow,
    branches,
    chunks,
    contexts,
    heads,
    journal,
    messages,
    segments,
    tombstones,
    tool_calls,
    turns,
)
from contextd.store.writer import Unconfirmed
from contextd.tools.arguments import ArgumentChecker

log = structlog.get_logger(__name__)

PURGE_RETRY_S = 10.0
NESTING_MAX = 200  # levels of JSON
PURGE_MESSAGES = 500
PURGE_ROWS = 5000  # in one transaction, so that a large deletion does not hold the writer up

_NEWEST = (10**18 - 1, 10**18 - 1)


def content_hash(value: Any) -> str:
    """Whether two requests say the same: a digest of the decoded value, not of its spelling.

    Raises `InvalidRequest` for what is nested too deeply.
    """
    check_nesting(value)
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def check_size(value: Any, bytes_max: int, what: str = "") -> None:
    """Bounds what comes along with every list. Raises `PayloadTooLarge`, `InvalidRequest`."""
    check_nesting(value)
    if len(msgspec.json.encode(value)) > bytes_max:
        raise PayloadTooLarge(bytes_max, what)


def check_nesting(value: Any) -> None:
    """Keeps out what could be stored at one depth of calls and not be read at another (§1).

    Raises `InvalidRequest`.
    """
    level = [value]
    for _ in range(NESTING_MAX):
        level = [member for one in level for member in _members(one)]
        if not level:
            return
    raise InvalidRequest.of("body", f"nested deeper than {NESTING_MAX} levels")


def _members(value: Any) -> Iterable[Any]:
    match value:
        case dict():
            return value.values()
        case list():
            return value
        case msgspec.Struct():
            return msgspec.structs.astuple(value)
        case _:
            return ()


class Contexts:
    """Creates, reads, changes and deletes contexts."""

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        *,
        toolset: Toolset,
        checker: ArgumentChecker,
        default_provider: str,
        providers: Sequence[str],
        metadata_bytes_max: int,
    ) -> None:
        self._ledger = ledger
        self._metadata_bytes_max = metadata_bytes_max
        self._reader = reader
        self._toolset = toolset
        self._checker = checker
        self._default_provider = default_provider
        self._providers = providers
        self._to_purge = asyncio.Event()
        self._to_purge.set()  # what an earlier process left

    async def create(self, request: ContextRequest) -> tuple[Context, bool]:
        """The context and whether it is new. Raises `IdTaken`, `InvalidRequest`, `PayloadTooLarge`."""
        self._check_provider(request.provider)
        check_size([request.metadata, request.tools], self._metadata_bytes_max)
        await self._check_tools(request.tools or [])
        context_id = request.id or self._ledger.new_id()
        digest = content_hash(request)

        async def work(connection: AsyncConnection) -> bool:
            if request.id is not None:
                await lock_name(connection, context_id)
            found = await connection.scalar(
                select(contexts.c.request_hash).where(contexts.c.id == context_id)
            )
            buried = await connection.scalar(
                select(tombstones.c.context_id).where(tombstones.c.context_id == context_id)
            )
            if buried is not None:
                raise IdTaken(context_id, deleted=True)
            if found is None:
                await self._insert(connection, context_id, request, digest)
            elif found != digest:
                raise IdTaken(context_id)
            return found is None

        created = await self._ledger.writer.change(work, context_id=context_id)
        return await self.get(context_id), created

    async def get(self, context_id: str) -> Context:
        """Raises `ContextNotFound`."""
        seen_s = self._ledger.tail.now_s()
        try:
            snapshot = await self._reader.context(context_id)
        except ContextNotFound:
            self._ledger.tail.drop_context(context_id)
            raise
        self._ledger.learn_context(snapshot.row, snapshot.open_messages, seen_s)
        return self._wire(snapshot)

    async def list(self, *, states: Sequence[str], limit: int, cursor: str | None) -> ContextPage:
        """Newest activity first."""
        before = decode_cursor(cursor, _NEWEST)
        found = await self._reader.contexts(
            states=states, before=(before[0], before[1]), limit=limit + 1
        )
        page = found[:limit]
        last = page[-1].row if len(found) > limit else None
        return ContextPage(
            items=[self._wire(snapshot) for snapshot in page],
            next_cursor=encode_cursor(last.changed_at, last.key) if last else None,
        )

    async def patch(self, context_id: str, patch: ContextPatch) -> Context:
        """Applies a JSON merge patch. Raises `BranchNotFound` for an unknown `active_branch`."""
        if isinstance(patch.provider, str):
            self._check_provider(patch.provider)
        if isinstance(patch.tools, list):
            check_size(patch.tools, self._metadata_bytes_max)
            await self._check_tools(patch.tools)

        async def work(edit: ContextEdit) -> None:
            if patch.active_branch is not UNSET:
                await edit.tree.tip(patch.active_branch)
            columns = _patched(patch, edit.row)
            check_size([columns.get("metadata"), columns.get("tools")], self._metadata_bytes_max)
            # By their JSON: in Python 1 equals true.
            before = {name: getattr(edit.row, name) for name in columns}
            if content_hash(before) != content_hash(columns):
                edit.change(record=True)
                edit.put(**columns)

        await self._ledger.edit(context_id, work)
        return await self.get(context_id)

    async def delete(self, context_id: str) -> None:
        """Ends everything of the context at once; what it kept is purged after. Its id stays used."""

        async def work(connection: AsyncConnection) -> tuple[AnyRow, list[str], int]:
            row = (await ContextEdit.begin(connection, context_id, self._ledger.clock)).row
            await connection.execute(delete(contexts).where(contexts.c.key == row.key))
            await _close_heads(connection, row.key)
            ended = await connection.execute(
                update(turns)
                .where(turns.c.context_key == row.key, turns.c.status.in_((RUNNING, QUEUED)))
                .values(status=CANCELLED, owner_id=None)
                .returning(turns.c.id)
            )
            calls = await connection.scalar(
                select(func.count())
                .select_from(tool_calls)
                .where(tool_calls.c.context_key == row.key, tool_calls.c.status.in_(UNDECIDED))
            )
            await connection.execute(
                insert(tombstones).values(
                    context_id=context_id,
                    context_key=row.key,
                    purged=False,
                    deleted_at=self._ledger.clock_ms(),
                )
            )
            return row, list(ended.scalars()), calls or 0

        def tell(outcome: tuple[AnyRow, list[str], int]) -> None:
            row, ended, calls = outcome
            self._ledger.tail.drop_context(context_id)
            self._ledger.hub.publish_deleted(context_id, row.revision + 1)
            self._ledger.turn_outcomes[CANCELLED] += len(ended)
            self._ledger.call_outcomes[CANCELLED] += calls
            for turn_id in ended:
                self._ledger.listener.turn_stopped(turn_id)
            self._to_purge.set()

        try:
            await self._ledger.writer.change(work, tell, context_id=context_id)
        except (ContextNotFound, Unconfirmed):  # it is deleted already, or may be
            self._ledger.tail.drop_context(context_id)
            raise

    async def keep_purged(self) -> None:
        """Forever: removes what deleted contexts have left, whenever one was deleted."""
        while True:
            await self._to_purge.wait()
            self._to_purge.clear()
            try:
                await self.purge()
            except ShuttingDown:
                return
            except Exception as error:
                log.warning("purging failed; it is tried again", exc_info=defect_in(error))
                await asyncio.sleep(PURGE_RETRY_S)
                self._to_purge.set()

    async def purge(self) -> int:
        """Removes the rows of deleted contexts, a bounded number at a time; returns how many went.

        Safe to stop anywhere: what is left is found again by its tombstone.
        """
        removed = 0
        while (count := await self._ledger.writer.change(_purge_some)) > 0:
            removed += count
        return removed

    async def _insert(
        self, connection: AsyncConnection, context_id: str, request: ContextRequest, digest: str
    ) -> None:
        now = self._ledger.clock_ms()
        inserted = await connection.execute(
            insert(contexts)
            .values(
                id=context_id,
                state=State.IDLE.value,
                state_detail={},
                state_since=now,
                revision=1,
                record_revision=1,
                active_turn_key=None,
                active_branch=MAIN_BRANCH,
                title=request.title,
                mode=request.mode,
                system_prompt=request.system_prompt,
                provider=request.provider,
                model=request.model,
                tools=ALL if request.tools is None else request.tools,
                approval_policy=request.approval_policy,
                on_busy=request.on_busy,
                metadata=request.metadata,
                message_count=0,
                request_hash=digest,
                created_at=now,
                changed_at=now,
            )
            .returning(contexts.c.key)
        )
        key = inserted.scalar_one()
        segment = await connection.execute(
            insert(segments)
            .values(context_key=key, parent_key=None, parent_depth=0, number=1)
            .returning(segments.c.key)
        )
        await connection.execute(
            insert(branches).values(
                context_key=key,
                name=MAIN_BRANCH,
                segment_key=segment.scalar_one(),
                leaf_key=None,
                leaf_depth=0,
                created_at=now,
            )
        )

    def _check_provider(self, name: str | None) -> None:
        if name is not None and name not in self._providers:
            known = ", ".join(self._providers)
            raise InvalidRequest.of("provider", f"unknown; this server has: {known}")

    async def _check_tools(self, tools: Sequence[Tool]) -> None:
        """Each name once, and JSON Schemas that are some: a model could not call the others (§8)."""
        names: set[str] = set()
        for number, tool in enumerate(tools):
            name = tool if isinstance(tool, str) else tool.name
            if name in names:
                raise InvalidRequest.of(f"tools[{number}]", f"{name!r} is named twice")
            names.add(name)
            if isinstance(tool, ExternalTool):
                problems = await self._checker.check_schema(tool.parameters)
                if problems:
                    raise InvalidRequest.of(f"tools[{number}].parameters", "; ".join(problems))

    def _wire(self, snapshot: ContextSnapshot) -> Context:
        return context_wire(
            snapshot,
            cursor=self._ledger.cursor(snapshot.row.revision),
            default_provider=self._default_provider,
            tools=self._toolset.shown(snapshot.row),
        )


_DEFAULTS = ContextRequest()


def _patched(patch: ContextPatch, row: AnyRow) -> dict[str, Any]:
    """The columns after the patch: null is the default, objects are merged (RFC 7396)."""
    columns: dict[str, Any] = {}
    for name in ("title", "mode", "system_prompt", "provider", "model", "tools", "on_busy"):
        value = getattr(patch, name)
        if value is not UNSET:
            columns[name] = msgspec.to_builtins(
                getattr(_DEFAULTS, name) if value is None else value
            )
    if patch.tools is None:
        columns["tools"] = ALL
    if patch.metadata is not UNSET:
        columns["metadata"] = merge_patch(stored_object(row, "metadata"), patch.metadata)
    if patch.approval_policy is not UNSET:
        changes = msgspec.to_builtins(patch.approval_policy)
        before = msgspec.to_builtins(stored_policy(row))
        policy = msgspec.convert(merge_patch(before, changes), ApprovalPolicy)
        columns["approval_policy"] = msgspec.to_builtins(policy)
    if patch.active_branch is not UNSET:
        columns["active_branch"] = patch.active_branch
    return columns


def merge_patch(target: JsonObject, patch: JsonObject | None) -> JsonObject:
    """RFC 7396 on objects: null removes, objects merge, anything else replaces."""
    if patch is None:
        return {}
    merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            before = merged.get(name)
            merged[name] = merge_patch(before if isinstance(before, dict) else {}, value)
        else:
            merged[name] = value
    return merged


async def _close_heads(connection: AsyncConnection, context_key: int) -> None:
    """A writer that has not heard of a deletion must find its message closed."""
    query = (
        select(messages.c.key)
        .join(heads, heads.c.message_key == messages.c.key)
        .where(messages.c.context_key == context_key, messages.c.status == "streaming")
        .order_by(messages.c.key)
    )
    keys = (await connection.scalars(for_update(connection, query, of=heads))).all()
    await connection.execute(
        update(heads).where(heads.c.message_key.in_(keys)).values(is_open=False)
    )


async def _purge_some(connection: AsyncConnection) -> int:
    """Removes one bounded helping of one deleted context; 0 when nothing is left anywhere."""
    # Each server purges another one; its row is the lock.
    unpurged = select(tombstones.c.context_key).where(~tombstones.c.purged).limit(1)
    key = await connection.scalar(unpurged.with_for_update(skip_locked=True))
    if key is None:
        return 0
    oldest = await connection.execute(
        select(messages.c.key, heads.c.head)
        .join(heads, heads.c.message_key == messages.c.key)
        .where(messages.c.context_key == key)
        .order_by(messages.c.revision)
        .limit(PURGE_MESSAGES)
    )
    found = oldest.all()
    if found and found[0].head > PURGE_ROWS:
        return await _purge_message(connection, found[0].key, found[0].head)
    if found:
        return await _purge_messages(connection, found)
    of_rest = (journal.c.revision, tool_calls.c.key, turns.c.key, branches.c.name, segments.c.key)
    for column in of_rest:
        if removed := await _purge_rows(connection, key, column):
            return removed
    await connection.execute(
        update(tombstones).where(tombstones.c.context_key == key).values(purged=True)
    )
    return 1


async def _purge_rows(connection: AsyncConnection, context_key: int, column: Column[Any]) -> int:
    """Some rows of the context in the column's table; the column tells them apart."""
    mine = column.table.c.context_key == context_key
    some = select(column).where(mine).limit(PURGE_ROWS)
    removed = await connection.execute(delete(column.table).where(mine, column.in_(some)))
    return removed.rowcount


async def _purge_messages(connection: AsyncConnection, found: Sequence[AnyRow]) -> int:
    """The first of these messages, whole, as many as make one batch."""
    keys: list[int] = []
    rows = 0
    for message in found:
        rows += message.head + 1
        if keys and rows > PURGE_ROWS:
            break
        keys.append(message.key)
    await connection.execute(delete(chunks).where(chunks.c.message_key.in_(keys)))
    await connection.execute(delete(heads).where(heads.c.message_key.in_(keys)))
    await connection.execute(delete(messages).where(messages.c.key.in_(keys)))
    return rows


async def _purge_message(connection: AsyncConnection, key: int, head: int) -> int:
    """The newest chunks first: `head` goes down with them, so each helping begins where one ended."""
    start = max(0, head - PURGE_ROWS)
    await connection.execute(
        delete(chunks).where(chunks.c.message_key == key, chunks.c.sequence > start)
    )
    if start > 0:
        await connection.execute(update(heads).where(heads.c.message_key == key).values(head=start))
    else:
        await connection.execute(delete(heads).where(heads.c.message_key == key))
        await connection.execute(delete(messages).where(messages.c.key == key))
    return max(1, head - start)
