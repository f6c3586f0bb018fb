"""Reading lines of an `application/x-ndjson` body, as its pieces come in (§7). No I/O.

Chunks are gathered for the next append; a line that is wrong ends the reading, and what came before
it stays good.
"""

from collections.abc import Iterable, Iterator
from typing import Self

import msgspec

from contextd.core.errors import ContextdError, InvalidRequest, PayloadTooLarge
from contextd.core.producing import Ending, Line
from contextd.http.problems import explain
from contextd.store.appends import utf8_bytes

NUL_ESCAPE = b"\\u0000"
ESCAPE_FACTOR = 6  # bytes of JSON for a byte of text, at worst
LINE_OVERHEAD_BYTES = 4096  # of a line beside its content

_decoder = msgspec.json.Decoder(Line)


class Gathered:
    """Chunks with the numbers of their lines, in parallel lists."""

    __slots__ = ("numbers", "sequences", "sizes", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self.sequences: list[int | None] = []
        self.numbers: list[int] = []

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int) -> Self:
        """Removes and returns the first `count`."""
        first = type(self)()
        for name in self.__slots__:
            values = getattr(self, name)
            setattr(first, name, values[:count])
            setattr(self, name, values[count:])
        return first


class LineReader:
    """Takes a body piece by piece. Memory: one line, and what is gathered and not taken away."""

    def __init__(self, *, chunk_bytes_max: int) -> None:
        self.gathered = Gathered()
        self.epoch: int | None = None
        self.ending: Ending | None = None
        self.number = 0  # of the last line that was read
        self.sequence: int | None = None  # that its chunk has, or would have, if that is known
        self.error: ContextdError | None = None  # of the line `number`; nothing is read after it
        self._chunk_bytes_max = chunk_bytes_max
        self._line_bytes_max = ESCAPE_FACTOR * chunk_bytes_max + LINE_OVERHEAD_BYTES
        self._rest = b""
        self._begun = False
        self._following: int | None = None

    def feed(self, piece: bytes, *, last: bool) -> None:
        """Reads the lines that are whole with this piece; with the `last` one, what is left too."""
        if self.error is not None:
            return
        data = self._rest + piece if self._rest else piece
        end = len(data) if last else data.rfind(b"\n") + 1
        self._rest = data[end:]
        if end:
            self._read(data[:end])
        if self.error is None and len(self._rest) > self._line_bytes_max:
            self.sequence = self._following
            self._refuse(self.number + 1, self._too_large())

    def _read(self, block: bytes) -> None:
        texts, sizes = self.gathered.texts, self.gathered.sizes
        sequences, numbers = self.gathered.sequences, self.gathered.numbers
        nul = NUL_ESCAPE in block
        for number, line in self._lines(block):
            self.number = number
            content = line.content
            self.sequence = line.sequence or self._following
            if content is None or nul or self.ending or line.epoch or line.complete:
                if not self._take_special(number, line):
                    return
                if content is None:
                    continue
            size = utf8_bytes(content)
            if size > self._chunk_bytes_max:
                self._refuse(number, self._too_large())
                return
            texts.append(content)
            sizes.append(size)
            sequences.append(line.sequence)
            numbers.append(number)
            self._following = self.sequence and self.sequence + 1
            self._begun = True

    def _lines(self, block: bytes) -> Iterable[tuple[int, Line]]:
        """The lines with their numbers: all at once, or one by one where something is odd."""
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        try:
            lines = _decoder.decode_lines(block)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._one_by_one(block)
        if len(lines) != count:  # blank ones are left out
            return self._one_by_one(block)
        return enumerate(lines, self.number + 1)

    def _one_by_one(self, block: bytes) -> Iterator[tuple[int, Line]]:
        before = self.number
        for index, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), 1):
            self.number = before + index
            if not raw.strip():
                continue
            self.sequence = self._following
            try:
                yield self.number, _decoder.decode(raw)
            except msgspec.ValidationError as error:
                self._refuse(before + index, InvalidRequest(explain(str(error), "line")))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._refuse(before + index, InvalidRequest.of("line", "not valid JSON"))
            if self.error is not None:
                return

    def _take_special(self, number: int, line: Line) -> bool:
        """What is no plain chunk: the epoch, the end, or something wrong, and then False."""
        given = sum(part is not None for part in (line.content, line.epoch, line.complete))
        wrong = None
        if self.ending is not None:
            wrong = InvalidRequest.of("line", "nothing may follow complete")
        elif given != 1 or (line.sequence is not None and line.content is None):
            wrong = InvalidRequest.of("line", "must have content, epoch or complete, and only one")
        elif line.epoch is not None and self._begun:
            wrong = InvalidRequest.of("epoch", "only in the first line")
        elif line.content is not None and "\0" in line.content:
            wrong = InvalidRequest.of("content", "must not contain U+0000")
        if wrong is not None:
            self._refuse(number, wrong)
            return False
        self._begun = True
        self.epoch = line.epoch or self.epoch
        self.ending = line.complete
        return True

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(self._chunk_bytes_max, "a chunk")

    def _refuse(self, number: int, error: ContextdError) -> None:
        self.number = number
        self.error = error
