"""Reading the text of messages: ranges of chunks, joined by the database and cut to a size by its index."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from contextd.store.tables import chunks


def in_slice(message_key: int, start: int, end: int, bytes_max: int, at_least: int = 1) -> Any:
    """Chunks after `start` up to `end`, as many as fit in `bytes_max` but `at_least` so many."""
    before = (
        select(chunks.c.end_bytes)
        .where(chunks.c.message_key == message_key, chunks.c.sequence == start)
        .scalar_subquery()
    )
    return and_(
        chunks.c.message_key == message_key,
        chunks.c.sequence > start,
        chunks.c.sequence <= end,
        or_(
            chunks.c.end_bytes <= func.coalesce(before, 0) + bytes_max,
            chunks.c.sequence <= start + at_least,
        ),
    )


async def read_text(
    connection: AsyncConnection,
    message_key: int,
    *,
    start: int,
    end: int,
    bytes_max: int,
    at_least: int = 1,
) -> tuple[int, str]:
    """The last sequence and the joined text of chunks `start` + 1 … `end`, cut to `bytes_max`."""
    ordered = (
        select(chunks.c.content)
        .where(in_slice(message_key, start, end, bytes_max, at_least))
        .order_by(chunks.c.sequence)
        .subquery()
    )
    # Joined by the database: a row object for each of 100,000 chunks costs more than reading them.
    joined = select(func.count(), func.aggregate_strings(ordered.c.content, ""))
    count, content = (await connection.execute(joined)).one()
    return start + count, content or ""


async def read_whole(connection: AsyncConnection, keys: Sequence[int]) -> dict[int, str]:
    """The whole text of each of these messages, by key."""
    ordered = (
        select(chunks.c.message_key, chunks.c.content)
        .where(chunks.c.message_key.in_(keys))
        .order_by(chunks.c.message_key, chunks.c.sequence)
        .subquery()
    )
    rows = await connection.execute(
        select(
            ordered.c.message_key, func.aggregate_strings(ordered.c.content, "").label("content")
        ).group_by(ordered.c.message_key)
    )
    return {row.message_key: row.content for row in rows}
