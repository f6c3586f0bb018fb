"""JSON that a model wrote, as it can be stored (§3.1)."""

import json
import math
from typing import Any, NoReturn

from contextd.core.text import in_strings, storable


def load_json(text: str) -> Any:
    """The value of a JSON text, its strings storable, as JSON can escape what no text may hold.

    Raises `ValueError` for what is not JSON, is nested too deeply, or holds a number that is none
    here: `NaN`, `Infinity`, or one beyond what a float can say.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        return in_strings(value, storable)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    """A number that cannot be said in JSON again would be lost where it is stored or sent."""
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number
