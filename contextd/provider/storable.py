"""What a model wrote, as it can be stored: any Unicode but U+0000, and no half of a pair (§3.1)."""

import json
import re
from typing import Any, NoReturn

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def storable(text: str) -> str:
    """`text` with surrogate pairs joined; U+0000 and what is left of broken pairs become U+FFFD."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\x00", "\ufffd")


def load_json(text: str) -> Any:
    """The value of a JSON text, its strings storable, as JSON can escape what no text may hold.

    Raises `ValueError` for what is not JSON, `NaN` and `Infinity` among it, or is nested too deeply.
    """
    try:
        return _storable(json.loads(text, parse_constant=_refuse_constant))
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
