"""What a producer has written and the server has not confirmed yet. In memory, without I/O."""

from collections import deque
from collections.abc import Iterator

from contextd.core.producing import ChunkInput

CHUNK_BYTES_MAX = 64 * 1024  # of UTF-8, as the server takes them (§7)
BATCH_CHUNKS_MAX = 1_000
BATCH_BYTES_MAX = 1024 * 1024  # a sixth of what a request may hold once JSON has escaped all of it
HELD_CHUNKS_MAX = 10_000  # beyond either of these two, writing waits
HELD_BYTES_MAX = 4 * 1024 * 1024


class Outbox:
    """Numbered chunks in order. `head` is durable, `last` has been written."""

    def __init__(self, head: int) -> None:
        self.head = self.last = head
        self._held: deque[tuple[ChunkInput, int]] = deque()
        self._held_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the next chunk has to wait."""
        return len(self._held) >= HELD_CHUNKS_MAX or self._held_bytes >= HELD_BYTES_MAX

    def add(self, content: str) -> None:
        """Takes the next chunk, of at most `CHUNK_BYTES_MAX`."""
        self.last += 1
        size_bytes = len(content.encode())
        self._held.append((ChunkInput(content=content, sequence=self.last), size_bytes))
        self._held_bytes += size_bytes

    def batch(self) -> list[ChunkInput]:
        """The oldest chunks, as many as one request may carry."""
        batch: list[ChunkInput] = []
        total_bytes = 0
        for chunk, size_bytes in self._held:
            total_bytes += size_bytes
            if len(batch) == BATCH_CHUNKS_MAX or (batch and total_bytes > BATCH_BYTES_MAX):
                break
            batch.append(chunk)
        return batch

    def settle(self, batch: list[ChunkInput]) -> None:
        """Lets go of a batch: it is durable."""
        for _ in batch:
            _, size_bytes = self._held.popleft()
            self._held_bytes -= size_bytes
        self.head += len(batch)


def pieces(text: str) -> Iterator[str]:
    """`text` cut between code points into as few chunks as the limit allows."""
    start = 0
    while start < len(text):
        piece = text[start : start + CHUNK_BYTES_MAX]
        encoded = piece.encode()
        if len(encoded) > CHUNK_BYTES_MAX:
            piece = encoded[:CHUNK_BYTES_MAX].decode(errors="ignore")  # drops a cut code point
        yield piece
        start += len(piece)
