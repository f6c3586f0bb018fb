"""The live tail: committed chunks of messages that were written lately, in memory.

The tail is a copy, and the database is the truth. Two rules keep the copy from saying more than it knows:

- Only hooks that run after a commit put chunks in, so a pull never sees what a crash could take back.
- A copy is believed for `trust_s` after the moment at which it was known to be right: the commit of this
  process that wrote it, or a read of the database that agreed with it. Afterwards the next pull reads SQL,
  and what it finds renews the copy (`learn`). So neither a deletion nor a write of another process stays
  unseen for longer than that, whatever becomes of the looks at the database in between.

Dropping a message costs a read and never data. What is doubtful is dropped. Memory is bounded: beyond
`bytes_max`, which counts what Python's objects cost, the contexts written longest ago go first.
"""

import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from sys import getsizeof

import msgspec

from contextd.core.message import MessageStatus
from contextd.core.values import SEQUENCE_MAX

TRUST_S = 1.0

# What CPython needs beside the strings, measured by tests/benchmarks/remembering.py.
_MESSAGE_BYTES = 330  # the object, its numbers, its entry in a dict, its lists of chunks
_CONTEXT_BYTES = 450  # the object, its dict of messages, its entry among the contexts
_CHUNK_BYTES = 32  # its slots in a list and an array, and what the allocator rounds up

_SHRINK_PART = 64  # of `bytes_max` is made free at once
_SHRINK_BATCH = 256
_NEVER_S = float("-inf")


class LiveMessage(msgspec.Struct, kw_only=True, eq=False, gc=False):
    """A message's newest committed chunks: those after `base`, up to `head`.

    Also the handle of who writes the message: `head` is right for a turn's message even when its chunks
    are not held. `least` is the head that the database was seen to have, SEQUENCE_MAX if the message was
    seen closed there: a copy that has not got so far is behind, and says nothing. `seen_s` is when an
    open message was last known to be as it is here.

    The garbage collector need not look at it: what it refers to never refers back.
    """

    context_id: str
    message_id: str
    message_key: int
    role: str
    kind: str
    opened_revision: int
    produced: bool = False
    status: MessageStatus = MessageStatus.STREAMING
    base: int = 0
    base_bytes: int = 0
    head: int = 0
    least: int = 0
    seen_s: float = _NEVER_S
    chunk_bytes: int = 0
    texts: Sequence[str] = ()
    ends: Sequence[int] = ()  # UTF-8 bytes of the message up to and with each text

    def __repr__(self) -> str:
        return f"LiveMessage({self.message_id!r}, head={self.head}, status={self.status.value})"

    @property
    def weight_bytes(self) -> int:
        """What the message and its held chunks cost in memory, about."""
        names = getsizeof(self.message_id) + getsizeof(self.kind)
        return _MESSAGE_BYTES + names + self.chunk_bytes

    @property
    def is_open(self) -> bool:
        """Whether the message is open as far as this process knows."""
        return self.status is MessageStatus.STREAMING

    def extend(
        self, texts: Sequence[str], ends: Sequence[int], *, head: int, start_bytes: int
    ) -> None:
        """Adds chunks that begin at byte `start_bytes`; with them the message has `head`."""
        if self.head + len(texts) != head:
            self.skip_to(head - len(texts), start_bytes)
        if not texts:
            return
        before = self.ends[-1] if self.ends else self.base_bytes
        if not self.ends:
            self.texts, self.ends = [], array("q")
        self.texts += texts  # type: ignore[operator]
        self.ends.extend(ends)  # type: ignore[attr-defined]
        self.head = head
        self.chunk_bytes += _CHUNK_BYTES * len(texts) + sum(map(getsizeof, texts))
        if ends[-1] - before != sum(map(len, texts)):  # not ASCII: JSON leaves its UTF-8 with it
            self.chunk_bytes += ends[-1] - before

    def close(self, status: MessageStatus) -> None:
        """Nothing follows, so the texts need no room to grow."""
        self.status = status
        self.least = 0
        self.texts = tuple(self.texts)

    def forget_chunks(self) -> None:
        """Lets go of the text; what comes next is held again."""
        self.skip_to(self.head, self.ends[-1] if self.ends else self.base_bytes)

    def skip_to(self, head: int, end_bytes: int) -> None:
        """Holds nothing up to `head`, whose chunks end at `end_bytes`; what comes next is held."""
        self.head = self.base = head
        self.base_bytes = end_bytes
        self.texts = self.ends = ()
        self.chunk_bytes = 0

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


class _Conversation(msgspec.Struct, kw_only=True, eq=False, gc=False):
    """The held messages of one context, oldest first; it was last known to exist at `seen_s`."""

    context_id: str
    weight_bytes: int = 0
    seen_s: float = _NEVER_S
    messages: dict[str, LiveMessage]


class Tail:
    """Live messages by context and message id.

    `clock` gives seconds that never go back. A moment (`seen_s`) is that before the write or the read
    which says how things are: what happens while it is under way may already have changed them again.
    """

    def __init__(
        self,
        *,
        bytes_max: int,
        trust_s: float = TRUST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now_s = clock
        self._bytes_max = bytes_max
        self._trust_s = trust_s
        self._weight_bytes = 0
        self._conversations: dict[str, _Conversation] = {}  # the last written last
        self._newest: _Conversation | None = None
        self._open: dict[str, dict[str, LiveMessage]] = {}

    @property
    def weight_bytes(self) -> int:
        """What is held in all, about."""
        return self._weight_bytes

    def __len__(self) -> int:
        """How many messages are held."""
        return sum(len(conversation.messages) for conversation in self._conversations.values())

    def get(self, context_id: str, message_id: str) -> LiveMessage | None:
        """The live message, if it is held; for who writes it. It may be behind the database."""
        conversation = self._conversations.get(context_id)
        return None if conversation is None else conversation.messages.get(message_id)

    def trusted(self, context_id: str, message_id: str) -> LiveMessage | None:
        """The live message for who reads it: None unless it was known to be right a moment ago."""
        conversation = self._conversations.get(context_id)
        if conversation is None:
            return None
        live = conversation.messages.get(message_id)
        if live is None or live.head < live.least:
            return None
        # What is closed does not change; only with its context it may go.
        seen_s = live.seen_s if live.status is MessageStatus.STREAMING else conversation.seen_s
        return live if self.now_s() - seen_s <= self._trust_s else None

    def streaming(self) -> list[LiveMessage]:
        """The messages that are open as far as this process knows."""
        return list(chain.from_iterable(found.values() for found in self._open.values()))

    # What this process commits: called by hooks, in commit order.

    def add(self, live: LiveMessage, *, seen_s: float | None = None) -> None:
        """Starts to hold an open message; its chunks come with `extend`, its end with `close`."""
        self.drop(live)
        self._see(self._insert(live), live, seen_s)
        if self._weight_bytes > self._bytes_max:
            self._shrink()

    def extend(
        self,
        live: LiveMessage,
        texts: Sequence[str],
        ends: Sequence[int],
        *,
        head: int,
        start_bytes: int = 0,
        seen_s: float | None = None,
    ) -> None:
        """Adds the newest committed chunks of a message, which has `head` with them.

        They start at its byte `start_bytes`; `ends` are their cumulative ends. Where another process,
        or a commit whose answer was lost, put chunks before them, what is held has to go: it must not
        have a hole.
        """
        conversation = self._conversations.get(live.context_id)
        held = None if conversation is None else conversation.messages.get(live.message_id)
        if conversation is None or held is None:
            conversation = self._insert(live)
        elif held is not live:  # two requests looked it up at once: the other one's is held
            live.skip_to(head, ends[-1] if ends else start_bytes)
            live = held
        before = live.chunk_bytes
        live.extend(texts, ends, head=head, start_bytes=start_bytes)
        self._weigh(conversation, live.chunk_bytes - before)
        self._see(conversation, live, seen_s)
        if self._weight_bytes > self._bytes_max:
            self._shrink()

    def close(
        self,
        context_id: str,
        message_id: str,
        status: MessageStatus,
        *,
        final: int,
        seen_s: float | None = None,
    ) -> None:
        """The message ended with `final` chunks. A copy that has another number of them is dropped."""
        conversation = self._conversations.get(context_id)
        live = None if conversation is None else conversation.messages.get(message_id)
        if conversation is None or live is None:
            return
        if live.head != final:
            self.drop(live)
            return
        self._see(conversation, live, seen_s)
        live.close(status)
        self._forget_open(live)

    # What the database was seen to have.

    def learn(
        self, context_id: str, message_id: str, *, head: int, is_open: bool, seen_s: float
    ) -> None:
        """A read that began at `seen_s` found the message so; compares the copy with it."""
        conversation = self._conversations.get(context_id)
        if conversation is None:
            return
        conversation.seen_s = max(conversation.seen_s, seen_s)
        live = conversation.messages.get(message_id)
        if live is None:
            return
        if live.status is MessageStatus.STREAMING:
            _compare(live, head if is_open else SEQUENCE_MAX, seen_s)
        elif not is_open and live.head != head:
            self.drop(live)

    def learn_open(
        self, context_id: str, *, revision: int, heads: Mapping[str, int], seen_s: float
    ) -> None:
        """A read that began at `seen_s` found the context at `revision`, with these open messages.

        A message that was opened up to `revision` and is not among them has been closed.
        """
        conversation = self._conversations.get(context_id)
        if conversation is None:
            return
        conversation.seen_s = max(conversation.seen_s, seen_s)
        for message_id, live in self._open.get(context_id, {}).items():
            if message_id in heads or live.opened_revision <= revision:
                _compare(live, heads.get(message_id, SEQUENCE_MAX), seen_s)

    # Forgetting.

    def drop(self, live: LiveMessage) -> None:
        """Forgets one message and the chunks of this handle; readers find them in SQL."""
        conversation = self._conversations.get(live.context_id)
        held = None if conversation is None else conversation.messages.get(live.message_id)
        if conversation is not None and held is not None:
            self._remove(conversation, held)
            if not conversation.messages:
                self._let_go(conversation)
        live.forget_chunks()

    def drop_streaming(self, context_id: str) -> None:
        """Forgets what this process took for open in a context: somebody else may have closed it."""
        for live in list(self._open.get(context_id, {}).values()):
            self.drop(live)

    def drop_context(self, context_id: str) -> None:
        """Forgets all messages of a deleted context."""
        self.drop_streaming(context_id)  # their writers may still hold them
        conversation = self._conversations.get(context_id)
        if conversation is not None:
            self._let_go(conversation)

    def clear(self) -> None:
        """Forgets everything: another database is there."""
        for live in self.streaming():
            self.drop(live)
        self._conversations.clear()
        self._newest = None
        self._weight_bytes = 0

    def _insert(self, live: LiveMessage) -> _Conversation:
        conversation = self._conversations.get(live.context_id)
        if conversation is None:
            conversation = _Conversation(context_id=live.context_id, messages={})
            self._conversations[live.context_id] = conversation
            self._weigh(conversation, _CONTEXT_BYTES + getsizeof(live.context_id))
        live.context_id = conversation.context_id  # one string for all of them
        conversation.messages[live.message_id] = live
        self._open.setdefault(live.context_id, {})[live.message_id] = live
        self._weigh(conversation, live.weight_bytes)
        return conversation

    def _see(self, conversation: _Conversation, live: LiveMessage, seen_s: float | None) -> None:
        """A commit said how the message is, and that its context exists."""
        if seen_s is None:
            seen_s = self.now_s()
        conversation.seen_s = max(conversation.seen_s, seen_s)
        live.seen_s = max(live.seen_s, seen_s)
        if conversation is not self._newest:
            self._newest = conversation
            del self._conversations[live.context_id]
            self._conversations[live.context_id] = conversation

    def _weigh(self, conversation: _Conversation, bytes_: int) -> None:
        conversation.weight_bytes += bytes_
        self._weight_bytes += bytes_

    def _remove(self, conversation: _Conversation, live: LiveMessage) -> None:
        del conversation.messages[live.message_id]
        self._weigh(conversation, -live.weight_bytes)
        self._forget_open(live)
        live.forget_chunks()
        live.least, live.seen_s = 0, _NEVER_S

    def _let_go(self, conversation: _Conversation) -> None:
        del self._conversations[conversation.context_id]
        self._weight_bytes -= conversation.weight_bytes
        if self._newest is conversation:
            self._newest = None

    def _forget_open(self, live: LiveMessage) -> None:
        found = self._open.get(live.context_id)
        if found is not None:
            found.pop(live.message_id, None)
            if not found:
                del self._open[live.context_id]

    def _shrink(self) -> None:
        """Drops what was written longest ago: of the oldest context the messages that came first.

        Somewhat more than it has to, since each look for the oldest passes what was deleted before it.
        An open message goes too: its writer still has it.
        """
        target_bytes = self._bytes_max - self._bytes_max // _SHRINK_PART
        while self._weight_bytes > target_bytes and self._conversations:
            for conversation in list(islice(self._conversations.values(), _SHRINK_BATCH)):
                self._evict_from(conversation, target_bytes)

    def _evict_from(self, conversation: _Conversation, target_bytes: int) -> None:
        while self._weight_bytes > target_bytes and conversation.messages:
            for live in list(islice(conversation.messages.values(), _SHRINK_BATCH)):
                if self._weight_bytes > target_bytes:
                    self._remove(conversation, live)
        if not conversation.messages:
            self._let_go(conversation)


def _compare(live: LiveMessage, head: int, seen_s: float) -> None:
    """An open copy beside the head that the database was seen to have: behind it, or still right."""
    if head > live.head:
        live.least = max(live.least, head)
    else:
        live.seen_s = max(live.seen_s, seen_s)
