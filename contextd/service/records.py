"""What has happened in a context: its turns and its journal (§5, §6)."""

from contextd.core.turn import JournalPage, Turn, TurnPage
from contextd.service.wire import decode_cursor, encode_cursor, journal_wire, turn_wire
from contextd.store.history import History


class Records:
    """Reads turns and transitions."""

    def __init__(self, history: History) -> None:
        self._history = history

    async def turn(self, context_id: str, turn_id: str) -> Turn:
        """Raises `ContextNotFound` or `TurnNotFound`."""
        row, message_ids = await self._history.turn(context_id, turn_id)
        return turn_wire(row, context_id, message_ids)

    async def turns(self, context_id: str, *, cursor: str | None, limit: int) -> TurnPage:
        """Turns in the order in which they were asked for."""
        (after,) = decode_cursor(cursor, (0,))
        found = await self._history.turns(context_id, after_key=after, limit=limit + 1)
        page = found[:limit]
        more = len(found) > limit
        return TurnPage(
            items=[turn_wire(row, context_id, message_ids) for row, message_ids in page],
            next_cursor=encode_cursor(page[-1][0].key) if more else None,
        )

    async def transitions(self, context_id: str, *, cursor: str | None, limit: int) -> JournalPage:
        """The journal, oldest first."""
        (after,) = decode_cursor(cursor, (0,))
        found = await self._history.journal(context_id, after=after, limit=limit + 1)
        page = found[:limit]
        more = len(found) > limit
        return JournalPage(
            items=[journal_wire(row) for row in page],
            next_cursor=encode_cursor(page[-1].revision) if more else None,
        )
