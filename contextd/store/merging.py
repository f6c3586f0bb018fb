"""Bringing messages from one branch to another (§9): which can go, and their copies.

A message hangs in one place of the tree, so a merge makes new ones at the leaf of the branch that
gets them. A copy says in its metadata which message it is of; a copy of a copy names the first. By
that a repeat knows what is there already, in either direction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Select, Text, column, insert, select, type_coerce, values
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.branch import LeftOut, LeftOutReason
from contextd.core.errors import PayloadTooLarge, TooManyChunks, TooManyMessages
from contextd.core.message import MessageStatus, Role
from contextd.core.tool_call import TOOL_CALL, TOOL_RESULT
from contextd.store.edit import ContextEdit, stats_at_once
from contextd.store.history import MERGED_FROM, is_left_behind, merged_from, origin
from contextd.store.notices import ClosedMessage
from contextd.store.stored import stored_object
from contextd.store.tables import AnyRow, Key, chunks, heads, messages
from contextd.store.tree import Path, find_path

# Of one merge, since it is one transaction, and no other write goes on meanwhile.
CONSIDERED_MAX = 10_000
COPIED_MAX = 1000
COPIED_CHUNKS_MAX = 100_000
COPIED_BYTES_MAX = 16 * 1024 * 1024


class Selection(msgspec.Struct, frozen=True):
    """What of the source goes over, in conversation order, and what does not."""

    chosen: Sequence[AnyRow]
    left_out: list[LeftOut]


async def choose(
    edit: ContextEdit, *, source: str, target: str, message_ids: Sequence[str] | None
) -> Selection:
    """Judges the source's messages since the common ancestor, or those that are named.

    Raises `BranchNotFound`, and `PayloadTooLarge` where it is too much for one merge.
    """
    on_source = await find_path(edit.connection, edit.key, source)
    on_target = await find_path(edit.connection, edit.key, target)
    found = await _candidates(edit, on_source, on_target, message_ids)
    shared = await on_target.holding(edit.connection, found)
    present = await _present(edit, on_target, found)
    queued = await _queued(edit.connection, edit.key, source)
    chosen, left_out = [], []
    for row in found:
        reason = "already_there" if row.key in shared else _reason(row, present)
        present.add(origin(row))  # so that of two copies of one message only the first goes
        if reason is None:
            chosen.append(row)
        else:
            left_out.append(LeftOut(message_id=row.id, reason=reason))
    _check_bounds(chosen)
    known = {row.id for row in found}
    for message_id in dict.fromkeys(queued if message_ids is None else message_ids):
        if message_id not in known:
            missing: LeftOutReason = "queued" if message_id in queued else "not_on_source"
            left_out.append(LeftOut(message_id=message_id, reason=missing))
    return Selection(chosen, left_out)


async def add_copies(
    edit: ContextEdit, rows: Sequence[AnyRow], ids: Sequence[str], *, source: str, target: str
) -> None:
    """Appends copies of closed messages, under these new ids, to the target. Part of the current change.

    Their text is copied by the database, chunk by chunk, so sequences stay what they were.
    """
    tip = await edit.tree.tip(target)
    parents = [tip.leaf_id, *ids]
    drafts = [
        _copy(edit, row, source)
        | {
            "id": ids[index],
            "parent_id": parents[index],
            "segment_key": tip.segment_key,
            "depth": tip.leaf_depth + 1 + index,
        }
        for index, row in enumerate(rows)
    ]
    await edit.connection.execute(insert(messages), drafts)
    keys = await _keys(edit, ids)
    pairs = [(row.key, keys[id_]) for row, id_ in zip(rows, ids, strict=True)]
    await _copy_text(edit, rows, pairs)
    await edit.tree.move_leaf(target, keys[ids[-1]], tip.leaf_depth + len(ids))
    edit.note_added(
        [
            ClosedMessage(
                key=keys[id_],
                id=id_,
                role=row.role,
                kind=row.kind,
                status=MessageStatus(row.status),
                final=row.final_sequence,
            )
            for row, id_ in zip(rows, ids, strict=True)
        ]
    )


async def _candidates(
    edit: ContextEdit, on_source: Path, on_target: Path, message_ids: Sequence[str] | None
) -> Sequence[AnyRow]:
    """Messages of the source in its order, each with whether a retry has `left_behind` it."""
    query = select(
        messages,
        heads.c.head,
        heads.c.bytes,
        heads.c.characters,
        is_left_behind().label("left_behind"),
    ).join(heads, heads.c.message_key == messages.c.key)
    if message_ids is None:
        parting = await on_source.parting(edit.connection, on_target)
        rows = await on_source.after(edit.connection, query, parting, limit=CONSIDERED_MAX + 1)
    else:
        rows = await _on(edit, on_source, query, messages.c.id.in_(message_ids))
        rows.sort(key=lambda row: row.depth)
    if len(rows) > CONSIDERED_MAX:
        raise TooManyMessages(CONSIDERED_MAX)
    return rows


async def _on(edit: ContextEdit, path: Path, query: Select[Any], which: Any) -> list[AnyRow]:
    """Those of the context's messages that stand on the path."""
    found = await edit.connection.execute(
        query.where(messages.c.context_key == edit.key, ~messages.c.superseded, which)
    )
    return list((await path.holding(edit.connection, found.all())).values())


async def _present(edit: ContextEdit, on_target: Path, found: Sequence[AnyRow]) -> set[str]:
    """The messages that the target has itself, or copies of, as far as they matter for `found`."""
    query = select(
        messages.c.key,
        messages.c.id,
        messages.c.metadata,
        messages.c.segment_key,
        messages.c.depth,
    )
    metadata: ColumnElement[str] = type_coerce(messages.c.metadata, Text)
    is_copy = metadata.contains(f'"{MERGED_FROM}"', autoescape=True)
    copies = await _on(edit, on_target, query, is_copy)
    origins = {origin(row) for row in found} - {row.id for row in found}
    own = await _on(edit, on_target, query, messages.c.id.in_(origins))
    return {origin(row) for row in copies} | {row.id for row in own}


async def _queued(connection: AsyncConnection, context_key: int, branch: str) -> list[str]:
    """What waits for its place on the branch."""
    rows = await connection.scalars(
        select(messages.c.id)
        .where(messages.c.context_key == context_key, messages.c.queued_branch == branch)
        .where(~messages.c.superseded)
        .order_by(messages.c.key)
    )
    return list(rows)


def _reason(row: AnyRow, present: set[str]) -> LeftOutReason | None:
    """Why a message of the source does not go over; null: it does."""
    if origin(row) in present:
        return "already_there"
    if row.status == MessageStatus.STREAMING:
        return "open"
    # It ran once, for its turn: a copy would say that it ran twice.
    if row.turn_id is not None and row.kind in (TOOL_CALL, TOOL_RESULT):
        return "tool_call"
    # As in what is sent to the model (§6).
    if row.left_behind and row.role == Role.ASSISTANT:
        return "retried"
    return None


def _check_bounds(chosen: Sequence[AnyRow]) -> None:
    if len(chosen) > COPIED_MAX:
        raise TooManyMessages(COPIED_MAX)
    if sum(row.head for row in chosen) > COPIED_CHUNKS_MAX:
        raise TooManyChunks(COPIED_CHUNKS_MAX)
    if sum(row.bytes for row in chosen) > COPIED_BYTES_MAX:
        raise PayloadTooLarge(COPIED_BYTES_MAX, "the text of one merge")


def _copy(edit: ContextEdit, row: AnyRow, source: str) -> dict[str, Any]:
    """The columns of a copy but its place. It is of no turn, and costs no tokens."""
    told = merged_from(row) or {"message_id": row.id, "branch": source}
    return {
        "context_key": edit.key,
        "superseded": False,
        "revision": edit.revision,
        "opened_revision": edit.revision,
        "role": row.role,
        "kind": row.kind,
        "status": row.status,
        "final_sequence": row.final_sequence,
        "media_type": row.media_type,
        "finish_reason": row.finish_reason,
        "error": row.error,
        "metadata": stored_object(row, "metadata") | {MERGED_FROM: told},
        "client_metadata": stored_object(row, "client_metadata"),
        "stats": stats_at_once(chunks=row.head, characters=row.characters, size=row.bytes),
        "created_at": edit.now,
        "changed_at": edit.now,
        "completed_at": edit.now,
    }


async def _keys(edit: ContextEdit, ids: Sequence[str]) -> Mapping[str, int]:
    rows = await edit.connection.execute(
        select(messages.c.id, messages.c.key).where(
            messages.c.context_key == edit.key, messages.c.id.in_(ids)
        )
    )
    return {row.id: row.key for row in rows}


async def _copy_text(
    edit: ContextEdit, rows: Sequence[AnyRow], pairs: Sequence[tuple[int, int]]
) -> None:
    """Heads and chunks; `pairs` are the keys of messages and of their copies."""
    await edit.connection.execute(
        insert(heads),
        [
            {
                "message_key": key,
                "is_open": False,
                "head": row.head,
                "bytes": row.bytes,
                "characters": row.characters,
                "fence": 0,
                "producer_id": None,
                "written_at": edit.now,
            }
            for row, (_, key) in zip(rows, pairs, strict=True)
        ],
    )
    copied = values(column("of_key", Key), column("key", Key), name="copied").data(pairs).cte()
    await edit.connection.execute(
        insert(chunks).from_select(
            ["message_key", "sequence", "content", "end_bytes", "created_at"],
            select(
                copied.c.key,
                chunks.c.sequence,
                chunks.c.content,
                chunks.c.end_bytes,
                type_coerce(edit.now, chunks.c.created_at.type),
            ).join(chunks, chunks.c.message_key == copied.c.of_key),
        )
    )
