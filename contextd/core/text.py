"""Text as it can be stored: any Unicode but U+0000, and no half of a surrogate pair (§3.1)."""

import re

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_HIGH_SURROGATE = re.compile(r"[\ud800-\udbff]\Z")


def storable(text: str) -> str:
    """`text` with surrogate pairs joined; U+0000 and what is left of broken pairs become U+FFFD."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\x00", "\ufffd")


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
