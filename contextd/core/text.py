"""Text as it can be stored: any Unicode but U+0000, and no half of a surrogate pair (§3.1)."""

import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_HIGH_SURROGATE = re.compile(r"[\ud800-\udbff]\Z")


def storable(text: str) -> str:
    """`text` with surrogate pairs joined; U+0000 and what is left of broken pairs become U+FFFD."""
    return without_surrogates(text).replace("\x00", "\ufffd")


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined; what is left of broken ones becomes U+FFFD."""
    if _SURROGATE.search(text):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def in_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` done to each of its strings, names included."""
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [in_strings(item, change) for item in value]
        case dict():
            return {change(name): in_strings(item, change) for name, item in value.items()}
        case _:
            return value


class TextPieces:
    """Text in pieces whose cuts may go through a surrogate pair, as JSON escapes can be cut there."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, piece: str) -> str:
        """What can be said now: all but a first half whose second may be in the next piece."""
        text = self._held + piece
        self._held = text[-1] if _HIGH_SURROGATE.search(text) else ""
        return storable(text[:-1] if self._held else text)

    def rest(self) -> str:
        """What is left at the end: nothing more comes."""
        held, self._held = self._held, ""
        return storable(held)
