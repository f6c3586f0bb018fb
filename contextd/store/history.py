"""What has happened in a context: messages as a model is to see them, calls, turns, steps (§5, §6, §8)."""

from collections.abc import Iterable, Mapping, Sequence, Set

import msgspec
from sqlalchemy import Column, ColumnElement, Text, or_, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.core.errors import TurnNotFound
from contextd.core.message import FILE_REFERENCE, THINKING, Role
from contextd.core.values import JsonObject
from contextd.store.reader import Reader, find_context, select_messages, select_placed
from contextd.store.stored import stored_object
from contextd.store.tables import AnyRow, heads, journal, messages, tool_calls, turns
from contextd.store.text import read_whole
from contextd.store.tree import Path, find_path

MERGED_FROM = "merged_from"  # the member of a copy's metadata
IDS_GROUP = 50  # ids in one condition


class Told(msgspec.Struct, frozen=True):
    """A stored message with its text, the call that it asks for, and the turn that it belongs to.

    `turn` is the first of those that tried again. A message without one, and the files that it refers
    to, are a turn of their own, by its id. `running`: it is the turn that the model is asked for.
    """

    row: AnyRow
    text: str
    call: AnyRow | None
    turn: str
    running: bool = False


class History:
    """Reads what has happened, by way of a `Reader`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def read(
        self, context_id: str, branch: str, turn_key: int, *, messages_max: int, bytes_max: int
    ) -> tuple[list[Told], dict[int, str]]:
        """Closed messages of a branch, oldest first: each with its text and its tool call.

        Leaves out thinking that no server wants back, what has no text, and what a retry has left behind.
        All of the turn itself, and of what came before it the newest, whole, as many as fit in both bounds.
        The files that a message refers to come before it and count with it, also where the branch forked
        off in between.
        The second part has the texts of the calls' results, by the keys of their messages.
        """
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            turn = (await connection.execute(select(turns).where(turns.c.key == turn_key))).one()
            roots = await _roots(connection, context.key)
            root = roots.get(turn.id, turn.id)
            family = [turn.id, root, *(one for one, first in roots.items() if first == root)]
            of_turn = messages.c.turn_id.in_(family)
            path = await find_path(connection, context.key, branch)
            shown = (
                select_placed()
                .where(messages.c.status != "streaming")
                .where(or_(messages.c.kind != THINKING, _is_wanted_back(context.key)))
                .where(or_(heads.c.head > 0, messages.c.role == "tool"))
                .add_columns(is_left_behind().label("left_behind"))
            )
            its = shown.where(messages.c.context_key == context.key, of_turn)
            placed = (await connection.execute(its.where(~messages.c.superseded))).all()
            mine = list((await path.holding(connection, placed)).values())
            others = shown.where(or_(messages.c.turn_id.is_(None), ~of_turn))
            before = await path.newest(connection, others, limit=messages_max)
            there = {turn.id, *await _turns_on(connection, context.key, path, roots)}
            hidden = _hidden(roots, there)
            mine, before = (
                [row for row in rows if not (row.left_behind and row.turn_id in hidden)]
                for rows in (mine, before)
            )
            files = await _files_of(connection, context.key, [*mine, *before])
            own, older = _with_files(mine, files), _with_files(before, files)
            left = bytes_max - sum(row.bytes for group in own for row in group)
            fitting = _newest_that_fit(older, messages_max - sum(map(len, own)), left)
            groups = sorted([*own, *fitting], key=lambda group: group[-1].depth)
            chosen = [row for group in groups for row in group]
            calls = await _calls_of(connection, [row.key for row in chosen])
            result_keys = [c.result_message_key for c in calls.values() if c.result_message_key]
            texts = await read_whole(connection, [*(row.key for row in chosen), *result_keys])
        return (
            [
                Told(
                    row,
                    texts.get(row.key, ""),
                    calls.get(row.key),
                    roots.get(row.turn_id, row.turn_id) or _referring(row) or origin(row),
                    row.turn_id in family,
                )
                for row in chosen
            ],
            {key: texts.get(key, "") for key in result_keys},
        )

    async def tool_calls(
        self, context_id: str, *, statuses: Sequence[str], after_key: int, limit: int
    ) -> Sequence[AnyRow]:
        """Calls in the order in which they were asked for, with `message_id` and `result_id`."""
        asked, result = messages.alias(), messages.alias()
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            query = (
                select(tool_calls, asked.c.id.label("message_id"), result.c.id.label("result_id"))
                .join(asked, asked.c.key == tool_calls.c.message_key)
                .join(result, result.c.key == tool_calls.c.result_message_key, isouter=True)
                .where(tool_calls.c.context_key == context.key, tool_calls.c.key > after_key)
                .order_by(tool_calls.c.key)
                .limit(limit)
            )
            if statuses:
                query = query.where(tool_calls.c.status.in_(statuses))
            rows: Sequence[AnyRow] = (await connection.execute(query)).all()
        return rows

    async def calls_by_id(
        self, context_id: str, ids: Sequence[str]
    ) -> tuple[AnyRow, dict[str, AnyRow]]:
        """The context, and those of these calls that it has."""
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            rows = await connection.execute(
                select(tool_calls).where(
                    tool_calls.c.context_key == context.key, tool_calls.c.id.in_(ids)
                )
            )
            return context, {row.id: row for row in rows}

    async def journal(self, context_id: str, *, after: int, limit: int) -> Sequence[AnyRow]:
        """The steps after revision `after`, oldest first."""
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            return await _rows_after(connection, context.key, journal.c.revision, after, limit)

    async def turn(self, context_id: str, turn_id: str) -> tuple[AnyRow, list[str]]:
        """A turn and the ids of its messages. Raises `TurnNotFound`."""
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            row = (
                await connection.execute(
                    select(turns).where(turns.c.context_key == context.key, turns.c.id == turn_id)
                )
            ).one_or_none()
            if row is None:
                raise TurnNotFound(turn_id)
            return row, (await _message_ids(connection, context.key, [turn_id]))[turn_id]

    async def turns(
        self, context_id: str, *, after_key: int, limit: int
    ) -> list[tuple[AnyRow, list[str]]]:
        """Turns in the order in which they were asked for."""
        async with self._reader.snapshot() as connection:
            context = await find_context(connection, context_id)
            rows = await _rows_after(connection, context.key, turns.c.key, after_key, limit)
            ids = await _message_ids(connection, context.key, [row.id for row in rows])
        return [(row, ids[row.id]) for row in rows]


async def _rows_after(
    connection: AsyncConnection, context_key: int, place: Column[int], after: int, limit: int
) -> Sequence[AnyRow]:
    """The context's rows of a table, in the order of a column of it."""
    table = place.table
    query = select(table).where(table.c.context_key == context_key, place > after)
    rows: Sequence[AnyRow] = (await connection.execute(query.order_by(place).limit(limit))).all()
    return rows


def is_left_behind() -> ColumnElement[bool]:
    """Of a message: its turn was tried again, and the retry did not go on after it (§6).

    What was sent, and the files of it, is never left behind.
    """
    return (
        select(turns.c.key)
        .where(turns.c.context_key == messages.c.context_key, turns.c.id == messages.c.turn_id)
        .where(turns.c.kept_to < messages.c.key, turns.c.user_message_key != messages.c.key)
        .where(messages.c.role.in_(("assistant", "tool")), messages.c.kind != FILE_REFERENCE)
        .correlate(messages)
        .exists()
    )


def _is_wanted_back(context_key: int) -> ColumnElement[bool]:
    """Thinking of a turn whose calls have something attached: it may have to go with them."""
    return messages.c.turn_id.in_(
        select(tool_calls.c.turn_id).where(
            tool_calls.c.context_key == context_key, tool_calls.c.attached.is_not(None)
        )
    )


async def _calls_of(connection: AsyncConnection, message_keys: Sequence[int]) -> dict[int, AnyRow]:
    """The calls that were written into these messages."""
    rows = await connection.execute(
        select(tool_calls).where(tool_calls.c.message_key.in_(message_keys))
    )
    return {row.message_key: row for row in rows}


async def _files_of(
    connection: AsyncConnection, context_key: int, rows: Sequence[AnyRow]
) -> dict[str, list[AnyRow]]:
    """What was attached to those of the rows that refer to files, by the ids of who refers to them."""
    files: dict[str, dict[str, AnyRow]] = {
        origin(row): {} for row in rows if row.kind == FILE_REFERENCE and not _is_attached(row)
    }
    if not files:
        return {}
    metadata: ColumnElement[str] = type_coerce(messages.c.metadata, Text)
    attached = (
        select_messages(context_key)
        .where(messages.c.kind == FILE_REFERENCE, messages.c.role == Role.TOOL.value)
        .where(messages.c.status != "streaming", ~messages.c.superseded)
        .order_by(messages.c.key)
    )
    ids = list(files)
    for start in range(0, len(ids), IDS_GROUP):
        named = [
            metadata.contains(f'"{id_}"', autoescape=True) for id_ in ids[start : start + IDS_GROUP]
        ]
        for row in await connection.execute(attached.where(or_(*named))):
            files.get(_referring(row) or "", {}).setdefault(origin(row), row)  # or a copy of it
    return {id_: list(attached.values()) for id_, attached in files.items()}


def _with_files(
    rows: Sequence[AnyRow], files: Mapping[str, Sequence[AnyRow]]
) -> list[list[AnyRow]]:
    """Each message as a group of its own, after what was attached to it."""
    return [[*files.get(origin(row), ()), row] for row in rows if not _is_attached(row)]


def _is_attached(row: AnyRow) -> bool:
    return _referring(row) is not None


def _referring(row: AnyRow) -> str | None:
    """The message that a file was attached to; null for what is none."""
    if row.kind != FILE_REFERENCE or row.role != Role.TOOL or not _metadata(row).get("hidden"):
        return None
    message_id = _metadata(row).get("message_id")
    return message_id if isinstance(message_id, str) else None


def _metadata(row: AnyRow) -> JsonObject:
    return stored_object(row, "metadata")


def origin(row: AnyRow) -> str:
    """The id of the message that this is, or is a copy of."""
    told = merged_from(row)
    return str(told["message_id"] if told else row.id)


def merged_from(row: AnyRow) -> JsonObject | None:
    """What a copy says of itself. A producer may write any metadata, so it is looked at closely."""
    told = _metadata(row).get(MERGED_FROM)
    whole = isinstance(told, dict) and isinstance(told.get("message_id"), str)
    return told if whole else None


def _newest_that_fit(
    groups: Sequence[list[AnyRow]], messages_max: int, bytes_max: int
) -> list[list[AnyRow]]:
    """The first groups that together are within both bounds."""
    chosen: list[list[AnyRow]] = []
    for group in groups:
        messages_max -= len(group)
        bytes_max -= sum(row.bytes for row in group)
        if messages_max < 0 or bytes_max < 0:
            break
        chosen.append(group)
    return chosen


async def _roots(connection: AsyncConnection, context_key: int) -> dict[str, str]:
    """For each turn that tries another one again, the turn that was the first."""
    rows = await connection.execute(
        select(turns.c.id, turns.c.retry_of)
        .where(turns.c.context_key == context_key, turns.c.retry_of.is_not(None))
        .order_by(turns.c.key)
    )
    roots: dict[str, str] = {}
    for id_, retry_of in rows:
        roots[id_] = roots.get(retry_of, retry_of)
    return roots


async def _turns_on(
    connection: AsyncConnection, context_key: int, path: Path, ids: Iterable[str]
) -> set[str]:
    """Those of these turns that have a message on the path."""
    ids = list(ids)
    if not ids:
        return set()
    place = select(messages.c.key, messages.c.segment_key, messages.c.depth, messages.c.turn_id)
    of_turns = place.where(messages.c.context_key == context_key, messages.c.turn_id.in_(ids))
    rows = (await connection.execute(of_turns.where(~messages.c.superseded))).all()
    return {row.turn_id for row in (await path.holding(connection, rows)).values()}


def _hidden(roots: Mapping[str, str], there: Set[str]) -> set[str]:
    """The turns of which something may be left behind: a later try of the same is `there`, on the path.

    A branch that forked off before the retry goes on as it was. `roots` is in the order of the turns.
    """
    hidden: set[str] = set()
    tried: set[str] = set()  # what has a later try there
    for id_, root in reversed(list(roots.items())):
        if root in tried:
            hidden.add(id_)
        if id_ in there:
            tried.add(root)
    return hidden | tried


async def _message_ids(
    connection: AsyncConnection, context_key: int, turn_ids: Sequence[str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {turn_id: [] for turn_id in turn_ids}
    rows = await connection.execute(
        select(messages.c.turn_id, messages.c.id)
        .where(messages.c.context_key == context_key, messages.c.turn_id.in_(turn_ids))
        .order_by(messages.c.key)
    )
    for row in rows:
        found[row.turn_id].append(row.id)
    return found
