"""What a model wrote, as it can be stored: any Unicode but U+0000, and no half of a pair (§3.1)."""

import json
import math
import re
from typing import Any, NoReturn

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
        """What is left at the end."""
        return storable(self._held)


def load_json(text: str) -> Any:
    """The value of a JSON text, its strings storable, as JSON can escape what no text may hold.

    Raises `ValueError` for what is not JSON, is nested too deeply, or holds a number that is none
    here: `NaN`, `Infinity`, or one beyond what a float can say.
    """
    try:
        return _storable(json.loads(text, parse_constant=_refuse_constant, parse_float=_finite))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _storable(value: Any) -> Any:
    match value:
        case str():
            return storable(value)
        case list():
            return [_storable(item) for item in value]
        case dict():
            return {storable(name): _storable(item) for name, item in value.items()}
        case _:
            return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    """A number that cannot be said in JSON again would be lost where it is stored or sent."""
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number
