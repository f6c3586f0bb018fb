"""The bytes of an answer as the JSON values in it. No I/O: see `contextd.provider.openai`.

A server is asked for a stream of events. Some answer with one JSON document all the same: an error with
status 200, or the whole answer at once. The first characters say which it is, since the content type
often does not.
"""

import codecs
import json
from collections.abc import Iterator

EVENT_BYTES_MAX = 8 * 1024 * 1024  # of one line, and of one document

_DONE = "[DONE]"
_BOM = "\ufeff"


class PayloadReader:
    """Takes an answer's bytes in pieces, cut anywhere, and gives its JSON values as they are complete.

    `done`: the server has said `[DONE]`, or sent a whole document. `begun`: any value came.
    `is_page`: what came is neither events nor JSON.
    """

    def __init__(self) -> None:
        self.done = False
        self.begun = False
        self.is_page = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line: list[str] = []  # the line that has not ended yet, in pieces
        self._line_chars = 0
        self._data: list[str] = []  # the lines of an event that are no JSON by themselves
        self._is_document: bool | None = None  # null until a character has said so

    def feed(self, raw: bytes) -> Iterator[object]:
        """The values that end in `raw`. Raises `ValueError` for what is neither JSON nor an end."""
        text = self._decoder.decode(raw)
        if self._is_document is None:
            text = self._decide(text)
        if self._is_document:
            self._hold(text)
            return
        *whole, rest = text.replace("\r", "\n").split("\n")
        for end in whole:
            self._hold(end)
            yield from self._read_line()
        self._hold(rest)

    def end(self) -> Iterator[object]:
        """What the last bytes hold, where no line break follows them. A cut value is none."""
        text = "".join(self._line)
        if self._is_document:
            yield from self._read_document(text)
            return
        try:
            yield from [*self._read_line(), *self._read_line()]  # the second ends the event
        except ValueError:
            return  # cut off: the answer is not complete, which its reader sees

    def _decide(self, text: str) -> str:
        """Whether a document comes, by the first character that is no white space."""
        text = "".join([*self._line, text]).lstrip(_BOM + " \t\r\n")
        self._line.clear()
        self._line_chars = 0
        if text:
            self._is_document = text[0] in '{["<'
        return text

    def _hold(self, text: str) -> None:
        self._line_chars += len(text)
        if self._line_chars > EVENT_BYTES_MAX:
            raise ValueError(f"one event is larger than {EVENT_BYTES_MAX} characters")
        if text:
            self._line.append(text)

    def _read_line(self) -> Iterator[object]:
        line = "".join(self._line)
        self._line.clear()
        self._line_chars = 0
        if not line:
            yield from self._read_event()
            return
        name, _, value = line.lstrip(_BOM).partition(":")
        if name != "data":
            return  # a comment, or a field that says nothing here
        self._data.append(value.removeprefix(" "))
        if len(self._data) == 1:
            yield from self._read_single_line()

    def _read_single_line(self) -> Iterator[object]:
        """Most events are one line. Some servers leave out the empty line after it."""
        text = self._data[0].strip()
        if not text or text.startswith(_DONE):
            self.done = self.done or bool(text)
            self._data.clear()
            return
        try:
            value = json.loads(text)
        except ValueError:
            return  # the rest of it may be in the next line
        self._data.clear()
        self.begun = True
        yield value

    def _read_event(self) -> Iterator[object]:
        text = "\n".join(self._data)
        self._data.clear()
        if text:
            yield json.loads(text)
            self.begun = True

    def _read_document(self, text: str) -> Iterator[object]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict | list):
            self.is_page = True
            return
        self.done = self.begun = True
        yield value
