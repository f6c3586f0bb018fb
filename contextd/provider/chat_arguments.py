"""The arguments of one call, as text that comes in pieces. No I/O.

By the API the pieces join to one JSON object. Servers also send an empty object before the real one, the
whole arguments a second time, or a JSON string that holds the object. So nothing that such a form may
follow is said before the end, and the cutting of the pieces decides nothing.
"""

import json
from collections.abc import Iterator
from itertools import dropwhile
from typing import Any

from contextd.core.text import TextPieces

JSON_SPACE = " \t\r\n"


class Arguments:
    """The arguments of one call. Text is storable, white space before it is left out."""

    def __init__(self) -> None:
        self._pieces = TextPieces()
        self._all: list[str] = []
        self._held: list[str] = []  # of it what was not said yet
        self._said_chars = 0
        self._first = ""  # the character that says what comes
        self._object = _ObjectEnd()
        self._has_more = False  # something stands behind the object
        self._chars = 0
        self._settled = False

    @property
    def begun(self) -> bool:
        """Whether anything but white space came."""
        return bool(self._first)

    @property
    def whole(self) -> bool:
        """Whether a JSON object came to its end."""
        return self._object.end is not None

    @property
    def empty(self) -> bool:
        """Whether an object without members came, and nothing else."""
        return self.whole and not self._object.has_member and not self._has_more

    def add(self, piece: str) -> None:
        """More of the text."""
        self._append(self._pieces.add(piece))

    def take(self) -> str:
        """What can be said before the end, and was not said yet."""
        return self._say(self._sayable_chars())

    def settle(self) -> None:
        """Another call has begun: an object without members stands in place of nothing."""
        self._settled = self._settled or self.empty

    def finish(self) -> None:
        """Nothing more comes: what stands there is made into the arguments, if it can be."""
        self._append(self._pieces.rest())
        text = "".join(self._all)
        resolved = _resolved(text)
        if resolved.startswith(text[: self._said_chars]):  # what has been said stays
            text = resolved
        self._all, self._held = [text], [text[self._said_chars :]]

    def rest(self) -> str:
        """After `finish`: all that was not said."""
        return self._say(None)

    def same_as(self, other: "Arguments") -> bool:
        """After `finish` of both: whether they say the same, however it is written."""
        mine, others = _canonical("".join(self._all)), _canonical("".join(other._all))
        return mine is not None and mine == others

    def _append(self, text: str) -> None:
        if not self._first:
            text = text.lstrip(JSON_SPACE)
            self._first = text[:1]
        if text:
            self._object.read(text)
            self._all.append(text)
            self._held.append(text)
            self._chars += len(text)
            if (end := self._object.end) is not None:
                behind = text[-(self._chars - end) :] if self._chars > end else ""
                self._has_more = self._has_more or bool(behind.strip(JSON_SPACE))

    def _sayable_chars(self) -> int | None:
        """How much of what is held can be said; null for all."""
        if self._first == '"':
            return 0  # it may hold the object
        if self._first == "{" and not self._object.has_member and not self._settled:
            return 0  # it may stand in place of the object
        return None if self._object.end is None else self._object.end - self._said_chars

    def _say(self, chars: int | None) -> str:
        if not self._held or chars == 0:
            return ""
        held = "".join(self._held)
        said = held[:chars]
        self._held = [held[len(said) :]]
        self._said_chars += len(said)
        return said


def _resolved(text: str) -> str:
    """The one object that `text` says, once or several times; `text` itself where it says no such."""
    values = list(_values(text))
    if len(values) == 1 and isinstance(values[0][0], dict):
        return text
    objects = [_as_object(*value) for value in values]
    if not objects or None in objects:
        return text
    found = [one for one in objects if one is not None]
    # An empty object stands for what comes only before it: behind it, it may be another call's.
    full = list(dropwhile(lambda one: not one[0], found)) or found
    try:
        return full[0][1] if len({_dumped(value) for value, _ in full}) == 1 else text
    except ValueError:
        return text


def _values(text: str) -> Iterator[tuple[Any, str]]:
    """The JSON values that follow each other in `text`, each with its own text; none if it is not JSON."""
    found: list[tuple[Any, str]] = []
    decoder, at = json.JSONDecoder(strict=False), 0
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            found.append((value, text[at:end]))
            at = end + len(text[end:]) - len(text[end:].lstrip(JSON_SPACE))
    except (ValueError, RecursionError):
        return
    yield from found


def _as_object(value: Any, text: str) -> tuple[dict[str, Any], str] | None:
    """An object with its text, also where a JSON string holds it."""
    if isinstance(value, str):
        text = value.strip(JSON_SPACE)
        inner = list(_values(text))
        value = inner[0][0] if len(inner) == 1 else None
    return (value, text) if isinstance(value, dict) else None


def _canonical(text: str) -> str | None:
    values = list(_values(text or "{}"))
    try:
        return _dumped(values[0][0]) if len(values) == 1 else None
    except ValueError:
        return None


def _dumped(value: Any) -> str:
    """Raises `ValueError` for what is nested too deeply."""
    try:
        return json.dumps(value, sort_keys=True)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _ObjectEnd:
    """Where the JSON object ends with which a text begins. The text comes in pieces."""

    def __init__(self) -> None:
        self.end: int | None = None  # the length of the text up to there
        self.has_member = False
        self._length = 0
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def read(self, piece: str) -> None:
        if self.end is not None:
            return
        for character in piece:
            self._length += 1
            if self._length > 1 and character not in "} \t\r\n":
                self.has_member = True
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.end = self._length
                    return
