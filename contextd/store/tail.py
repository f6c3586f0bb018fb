"""The live tail: committed chunks of messages that were written lately, in memory.

Only the writer's after-commit hooks put chunks in, so a pull from here never sees what a crash could
take back. What is not here is in SQL: dropping a message, or its oldest chunks, costs a read and
never data. Memory is bounded: beyond `bytes_max` the messages written longest ago go first.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from contextd.core.message import MessageStatus
from contextd.core.values import SEQUENCE_MAX

_CHUNK_OVERHEAD_BYTES = 96  # a short str, its slot and its offset, so that tiny chunks count too


class LiveMessage:
    """A message's newest committed chunks: those after `base`, up to `head`.

    A `produced` one may also be written by other processes, so its head here can be behind.
    """

    __slots__ = (
        "base",
        "base_bytes",
        "context_id",
        "ends",
        "head",
        "kind",
        "message_id",
        "message_key",
        "opened_revision",
        "produced",
        "role",
        "status",
        "texts",
    )

    def __init__(
        self,
        *,
        context_id: str,
        message_id: str,
        message_key: int,
        role: str,
        kind: str,
        opened_revision: int,
        produced: bool = False,
    ) -> None:
        self.context_id = context_id
        self.message_id = message_id
        self.message_key = message_key
        self.role = role
        self.kind = kind
        self.opened_revision = opened_revision
        self.produced = produced
        self.status = MessageStatus.STREAMING
        self.base = 0
        self.base_bytes = 0
        self.head = 0
        self.texts: list[str] = []
        self.ends: list[int] = []  # UTF-8 bytes of the message up to and with each text

    @property
    def weight_bytes(self) -> int:
        """What the held chunks cost in memory, about."""
        held = self.ends[-1] - self.base_bytes if self.ends else 0
        return held + _CHUNK_OVERHEAD_BYTES * len(self.texts)

    def forget_chunks(self) -> None:
        """Lets go of the text; what comes next is held again."""
        self.base = self.head
        self.base_bytes = self.ends[-1] if self.ends else self.base_bytes
        self.texts.clear()
        self.ends.clear()

    def skip_to(self, head: int, end_bytes: int) -> None:
        """Holds nothing up to `head`, whose chunks end at `end_bytes`; what comes next is held."""
        self.head = self.base = head
        self.base_bytes = end_bytes
        self.texts.clear()
        self.ends.clear()

    def read(self, start: int, end: int, bytes_max: int) -> tuple[int, str] | None:
        """The last sequence and the joined text after `start`, or None where SQL must answer.

        At most `bytes_max` of UTF-8, but always one chunk at least; `end` bounds it inclusively. Who
        asks for more than is known here may have heard of it from another process.
        """
        first = start - self.base
        if first < 0 or start > self.head or self.head < end < SEQUENCE_MAX:
            return None
        last = min(end, self.head) - self.base
        if first >= last:
            return start, ""
        ends = self.ends
        before = ends[first - 1] if first else self.base_bytes
        if ends[last - 1] - before > bytes_max:
            last = max(first + 1, bisect_right(ends, before + bytes_max, first, last))
        if last - first == 1:
            return start + 1, self.texts[first]
        return self.base + last, "".join(self.texts[first:last])


class Tail:
    """Live messages by context and message id."""

    def __init__(self, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._weight_bytes = 0
        self._messages: OrderedDict[tuple[str, str], LiveMessage] = OrderedDict()

    @property
    def weight_bytes(self) -> int:
        """What is held in all, about."""
        return self._weight_bytes

    def get(self, context_id: str, message_id: str) -> LiveMessage | None:
        """The live message, if it is held."""
        return self._messages.get((context_id, message_id))

    def add(self, live: LiveMessage) -> None:
        """Starts to hold a message; its chunks come with `extend`."""
        self._messages[live.context_id, live.message_id] = live

    def extend(
        self,
        live: LiveMessage,
        texts: Sequence[str],
        ends: Sequence[int],
        *,
        head: int,
        start_bytes: int = 0,
    ) -> None:
        """Adds the newest committed chunks of a message, which has `head` with them.

        They start at its byte `start_bytes`; `ends` are their cumulative ends. Where another process,
        or a commit whose answer was lost, put chunks before them, what is held has to go: it must not
        have a hole.
        """
        key = (live.context_id, live.message_id)
        held = self._messages.get(key)
        if held is None:
            self._messages[key] = live
            self._weight_bytes += live.weight_bytes
        else:
            live = held  # two requests may have looked the message up at once
        before = live.weight_bytes
        if live.head + len(texts) != head:
            live.skip_to(head - len(texts), start_bytes)
        live.texts.extend(texts)
        live.ends.extend(ends)
        live.head = head
        self._weight_bytes += live.weight_bytes - before
        self._messages.move_to_end(key)
        if self._weight_bytes > self._bytes_max:
            self._shrink()

    def drop(self, live: LiveMessage) -> None:
        """Forgets one message; readers find it in SQL."""
        if self._messages.get((live.context_id, live.message_id)) is live:
            del self._messages[live.context_id, live.message_id]
            self._weight_bytes -= live.weight_bytes

    def streaming(self) -> list[LiveMessage]:
        """The messages that are open as far as this process knows."""
        open_ = MessageStatus.STREAMING
        return [live for live in self._messages.values() if live.status is open_]

    def drop_streaming(self, context_id: str) -> None:
        """Forgets what this process took for open in a context: somebody else has closed it."""
        for live in self.streaming():
            if live.context_id == context_id:
                self.drop(live)

    def clear(self) -> None:
        """Forgets everything: another database is there."""
        self._messages.clear()
        self._weight_bytes = 0

    def drop_context(self, context_id: str) -> None:
        """Forgets all messages of a deleted context."""
        for key in [key for key in self._messages if key[0] == context_id]:
            self._weight_bytes -= self._messages.pop(key).weight_bytes

    def _shrink(self) -> None:
        """Drops what was written longest ago. An open message goes too: its writer still has it."""
        while self._weight_bytes > self._bytes_max and self._messages:
            _, live = self._messages.popitem(last=False)
            self._weight_bytes -= live.weight_bytes
            live.forget_chunks()
