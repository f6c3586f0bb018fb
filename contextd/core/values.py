"""The small values that every type is made of: ids, sequences, times, and their limits (§1)."""

from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta

# Paths with the segments `.` and `..` are changed on their way, so they are no ids.
ID_PATTERN = r"^(?!\.{1,2}$)[A-Za-z0-9_.:-]{1,64}$"
WHOLE_ID_PATTERN = (
    r"^(?!\.{1,2}\Z)[A-Za-z0-9_.:-]{1,64}\Z"  # in Python `$` would let a last newline pass
)
ID_WORDS = "1 to 64 of A-Z a-z 0-9 _ . : - (but not . or ..)"
SEQUENCE_MAX = 2**53 - 1  # beyond this a JavaScript client could not hold the number exactly
YEAR_1_MS, YEAR_9999_MS = -62_135_596_800_000, 253_402_300_799_999
LABEL_CHARS_MAX = 512
DOCUMENT_CHARS_MAX = 262_144

# Text may hold any Unicode but U+0000, which PostgreSQL cannot store (§3.1).
NO_NUL_PATTERN = "^[^\\u0000]*$"

Id = Annotated[
    str,
    Meta(
        pattern=WHOLE_ID_PATTERN,
        description=ID_WORDS,
        extra_json_schema={"pattern": ID_PATTERN},
    ),
]
Label = Annotated[str, Meta(pattern=NO_NUL_PATTERN, max_length=LABEL_CHARS_MAX)]
Document = Annotated[str, Meta(pattern=NO_NUL_PATTERN, max_length=DOCUMENT_CHARS_MAX)]
Content = Annotated[str, Meta(pattern=NO_NUL_PATTERN, min_length=1)]
Sequence = Annotated[int, Meta(ge=0, le=SEQUENCE_MAX)]
Timestamp = Annotated[
    str,
    Meta(
        description="RFC 3339, UTC, milliseconds",
        extra_json_schema={"format": "date-time"},
    ),
]
JsonObject = dict[str, Any]


def timestamp(epoch_ms: int) -> str:
    """`epoch_ms` as RFC 3339 in UTC with milliseconds and `Z`, within the years 1 to 9999."""
    epoch_ms = min(max(epoch_ms, YEAR_1_MS), YEAR_9999_MS)
    at = datetime.fromtimestamp(epoch_ms // 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{epoch_ms % 1000:03d}Z"
