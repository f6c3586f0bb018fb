"""Which media type a client wants (RFC 9110, section 12.5.1)."""

import re
from collections.abc import Sequence

_QUALITY = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")
RANGES_MAX = 100  # of one header; what comes after them is not read


def best_type(accept: str, offered: Sequence[str]) -> str:
    """The one of `offered` that is wanted most, or the first of them where none is wanted.

    Of equal ones the client's first wins. A range that is none, or whose quality is none, is left out.
    """
    ranges = [_parse(text) for text in accept.split(",", RANGES_MAX)[:RANGES_MAX]]
    wanted = []
    for index, media_type in enumerate(offered):
        fitting = [
            (specificity, quality, -place)
            for place, (media_range, quality) in enumerate(ranges)
            if (specificity := _specificity(media_range, media_type))
        ]
        specificity, quality, place = max(fitting, default=(0, 0.0, 0))
        if quality:
            wanted.append((quality, specificity, place, -index))
    return offered[-max(wanted)[3]] if wanted else offered[0]


def _parse(text: str) -> tuple[str, float]:
    """The range without its parameters, and its quality; 0 with an empty range where it is none."""
    media_range, *parameters = (part.strip().lower() for part in text.split(";"))
    for name, _, value in (parameter.partition("=") for parameter in parameters):
        if name.strip() == "q":
            quality = _QUALITY.fullmatch(value.strip())
            return (media_range, float(quality[0])) if quality else ("", 0.0)
    return media_range, 1.0


def _specificity(media_range: str, media_type: str) -> int:
    """3 for the type itself, 2 for its kind, 1 for any; 0 where it is none of them."""
    kind = media_type.partition("/")[0]
    return {media_type: 3, f"{kind}/*": 2, "*/*": 1}.get(media_range, 0)
