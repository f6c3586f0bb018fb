"""The bytes of an answer as the JSON values in it. No I/O: see `contextd.provider.openai`.

A server is asked for a stream of events. Some answer with one JSON document all the same: an error with
status 200, or the whole answer at once. The first characters say which it is, since the content type
often does not. Within events an error may come by a way of its own: as an event or a field of that name,
or as a bare JSON object.
"""

import codecs
import json
import math
from collections.abc import Iterator
from typing import Any

EVENT_BYTES_MAX = 8 * 1024 * 1024  # of one line, and of one document

_DIGITS_MAX = 1000  # of a whole number
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
        # A broken character costs that character, not the answer.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line: list[str] = []  # the line that has not ended yet, in pieces
        self._line_chars = 0
        self._after_return = False  # a line feed that comes now belongs to the line that has ended
        self._data: list[str] = []  # the lines of an event that are no JSON by themselves
        self._data_chars = 0
        self._is_error = False  # the event is named so
        self._is_document: bool | None = None  # null until a character has said so

    def feed(self, raw: bytes) -> Iterator[object]:
        """The values that end in `raw`. Raises `ValueError` for what is neither JSON nor an end."""
        text = self._decoder.decode(raw)
        if self._is_document is None:
            text = self._decide(text)
        if self._is_document:
            self._hold(text)
            return
        *whole, rest = self._lines(text)
        for end in whole:
            self._hold(end)
            yield from self._read_line()
            if self.done:
                return  # what follows is no part of the answer
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

    def _lines(self, text: str) -> list[str]:
        """Lines end in a line feed, a carriage return, or both, which a cut may part."""
        if self._after_return and text:
            text = text.removeprefix("\n")
            self._after_return = False
        self._after_return = self._after_return or text.endswith("\r")
        return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")

    def _hold(self, text: str) -> None:
        self._line_chars += len(text)
        if self._line_chars + self._data_chars > EVENT_BYTES_MAX:
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
        line = line.lstrip(_BOM)
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
            self._data_chars += len(value)
            if len(self._data) == 1:
                yield from self._read_single_line()
        elif name == "event":
            self._is_error = value.strip() == "error"
        elif name == "error" or line.startswith("{"):
            yield from self._read_bare(line if name != "error" else value, is_error=name == "error")
        # Anything else is a comment, or a field that says nothing here.

    def _read_bare(self, text: str, *, is_error: bool) -> Iterator[object]:
        """An error that is no event by its form. What is no JSON says nothing."""
        try:
            value = _loads(text)
        except ValueError:
            return
        if is_error or (isinstance(value, dict) and value.get("error")):
            self.begun = True
            yield {"error": value} if is_error else value

    def _read_single_line(self) -> Iterator[object]:
        """Most events are one line. Some servers leave out the empty line after it."""
        text = self._data[0].strip()
        if not text or text.startswith(_DONE):
            self.done = self.done or bool(text)
            self._forget_data()
            return
        try:
            value = _loads(text)
        except ValueError:
            return  # the rest of it may be in the next line
        yield self._event(value)

    def _read_event(self) -> Iterator[object]:
        text = "\n".join(self._data)
        try:
            if text:
                yield self._event(text if self._is_error else _loads(text))
        finally:
            self._forget_data()
            self._is_error = False

    def _event(self, value: object) -> object:
        self._forget_data()
        self.begun = True
        holds_error = isinstance(value, dict) and value.get("error")
        return {"error": value} if self._is_error and not holds_error else value

    def _forget_data(self) -> None:
        self._data.clear()
        self._data_chars = 0

    def _read_document(self, text: str) -> Iterator[object]:
        try:
            value = _loads(text)
        except ValueError:
            # JSON that does not end was cut off: the answer is not complete, which its reader sees.
            self.begun = text[:1] in ("{", "[")
            self.is_page = not self.begun
            return
        self.is_page = not isinstance(value, dict | list)
        if not self.is_page:
            self.done = self.begun = True
            yield value


def _loads(text: str) -> Any:
    """A number that JSON cannot say again, or that is too long to be read, is null: it costs its field.

    Raises `ValueError` for what is no JSON, or is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _int(text: str) -> int | None:
    return int(text) if len(text) <= _DIGITS_MAX else None


def _float(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


_DECODER = json.JSONDecoder(parse_int=_int, parse_float=_float, parse_constant=lambda _: None)
