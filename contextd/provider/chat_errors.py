"""What a model's server says when it does not answer: its words, and whether another try may help.

Servers put the same few facts into many forms. `words_of` finds what a person should read, `failure`
makes the error of it. No I/O: see `contextd.provider.openai`.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

import msgspec

from contextd.provider import FatalError, InputTooLongError, ProviderError, TransientError

RETRY_AFTER_S_MAX = 3600.0
WORDS_CHARS_MAX = 10_000  # that are searched
_CODE_CHARS_MAX = 100
_DEPTH_MAX = 6

_TRANSIENT_STATUSES = {
    408: "provider_timeout",
    409: "provider_unavailable",
    425: "provider_unavailable",
    429: "provider_rate_limited",
    498: "provider_unavailable",
}

# A word of an error within a stream, and the status that it stands for. The first that fits counts.
_STATUS_BY_WORD = (
    ("insufficient_quota", 402),
    ("rate_limit", 429),
    ("resource_exhausted", 429),
    ("too_many_requests", 429),
    ("authentication", 401),
    ("unauthenticated", 401),
    ("invalid_api_key", 401),
    ("permission", 403),
    ("not_found", 404),
    ("invalid_request", 400),
    ("invalid_argument", 400),
    ("badrequest", 400),
    ("bad_request", 400),
    ("unprocessable", 422),
    ("timeout", 408),
)

_QUOTA_CODES = re.compile(
    r"insufficient_(quota|balance|credit)|billing|exceeded_current_quota|credits?_exhausted|payment"
    r"|budget_exceeded",
    re.IGNORECASE,
)
_QUOTA_WORDS = re.compile(
    r"insufficient (balance|quota|credits?|funds)|credit balance is too low|out of credits"
    r"|check your plan and billing|quota (has been )?(exhausted|used up)",
    re.IGNORECASE,
)
_TOO_LONG_CODES = re.compile(
    r"context_length_exceeded|exceed_context_size|context_window_exceeded|input_too_long"
    r"|prompt_too_long",
    re.IGNORECASE,
)
_TOO_LONG_WORDS = re.compile(
    r"maximum (context|prompt|input) (length|window|size)|maximum model length"
    r"|(exceed|overflow|larger|longer|greater)\w*.{0,60}context|context.{0,60}(exceed|overflow)"
    r"|(prompt|input|request|message)s? (is|are) too (long|large)|request too large"
    r"|input token count|too many (input )?tokens|exceeds?.{0,40}(number of )?(input )?tokens"
    r"|exceeded.{0,40}token limit|tokens.{0,40}must be <=?"
    r"|reduce the length of|(prompt|input).{0,60}too large",
    re.IGNORECASE | re.DOTALL,
)
_LIMIT = re.compile(
    r"(?:maximum|max|limit|context (?:length|size|window)|allowed)\D{0,60}?(\d{2,9})(?!\d)"
    r"|[>≤]\s*(\d{2,9})(?!\d)|(?<!\d)(\d{2,9})\s*(?:tokens?\s*)?maximum",
    re.IGNORECASE,
)
_TRY_AGAIN_IN = re.compile(
    r"(?:try again|retry) (?:in|after) (?:(?P<h>\d{1,9})\s?h[a-z]*\s?)?(?:(?P<m>\d{1,9})\s?m(?!s)[a-z]*\s?)?"
    r"(?:(?P<s>[\d.]{1,20})\s?(?P<unit>ms|mill|s))?",
    re.IGNORECASE,
)
_DELAY = re.compile(r"(?P<s>[\d.]+)s\Z")
_XML_MESSAGE = re.compile(r"<message>(.*?)</message>", re.IGNORECASE | re.DOTALL)


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the server told it: `status` null within a stream, `body` JSON or text."""

    status: int | None
    body: object
    headers: Mapping[str, str] = {}


class RefusedError(Exception):
    """The server has said, within its answer, that there will be none."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__("the model's server refused")
        self.refusal = refusal


def error_in(payload: object) -> object | None:
    """The error that a JSON value is or holds, in one of the forms that servers use; null for none."""
    if isinstance(payload, list):
        return next(filter(None, map(error_in, payload)), None)
    if not isinstance(payload, dict):
        return None
    if payload.get("error"):
        return payload
    is_error = payload.get("object") == "error" or payload.get("type") == "error"
    said = [payload.get(key) for key in ("message", "detail", "errors", "error_message")]
    says = any(value and isinstance(value, str | list) for value in said)
    return payload if is_error or (says and not payload.get("choices")) else None


def failure(refusal: Refusal, message: str) -> ProviderError:
    """The error for `refusal`. `message` is fit for a client's eyes."""
    body = _parsed(refusal.body)
    codes, words = " ".join(_codes(body)), words_of(body)[:WORDS_CHARS_MAX]
    status = refusal.status if refusal.status is not None else _status(codes)
    if _is_too_long(status, codes, words):
        tokens_max = next(_context_sizes(body), None) or _tokens_max(words)
        return InputTooLongError("input_too_long", message, tokens_max=tokens_max)
    retry_after_s = _retry_after_s(refusal.headers, body, words)
    if _is_spent(status, codes, words, retry_after_s):
        return FatalError("provider_quota", message)
    transient = _TRANSIENT_STATUSES.get(status, "provider_unavailable" if status >= 500 else None)
    if transient:
        return TransientError(transient, message, retry_after_s=retry_after_s)
    return FatalError("provider_auth" if status in (401, 403) else "provider_rejected", message)


def words_of(value: object, depth: int = 0) -> str:
    """What a person should read of an error's body; empty where it says nothing."""
    if depth > _DEPTH_MAX:
        return ""
    match value:
        case str():
            return _words_of_text(value.strip(), depth)
        case list():
            return "; ".join(list(filter(None, (words_of(item, depth + 1) for item in value)))[:3])
        case dict():
            keys = ("message", "error", "detail", "msg", "error_message", "errors", "description")
            found = (words_of(value.get(key), depth + 1) for key in (*keys, "title", "reason"))
            words = next(filter(None, found), "")
            # A router tells the words of the server behind it beside its own.
            upstream = words_of(_member(value.get("metadata"), "raw"), depth + 1)
            return f"{words}: {upstream}" if upstream and upstream != words else words
        case _:
            return ""


def _words_of_text(text: str, depth: int) -> str:
    value = _parsed(text)
    if not isinstance(value, str):
        return words_of(value, depth + 1)
    if text.startswith("<"):  # a proxy's page says nothing, an XML document may
        found = _XML_MESSAGE.search(text[:WORDS_CHARS_MAX])
        return found[1].strip() if found else ""
    return text


def _parsed(value: object) -> object:
    """Text that is a JSON object or list as that; anything else as it is."""
    if isinstance(value, str) and (value.lstrip()[:1] in ("{", "[") or value.strip() == "null"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _codes(value: object, depth: int = 0) -> Iterator[str]:
    """The words and numbers that are meant for programs, anywhere in the body."""
    if depth > _DEPTH_MAX:
        return
    if isinstance(value, list):
        for item in value:
            yield from _codes(item, depth + 1)
    if isinstance(value, str) and not isinstance(parsed := _parsed(value), str):
        yield from _codes(parsed, depth + 1)
    if isinstance(value, dict):
        for key in ("code", "type", "status", "error_type", "reason", "quotaId"):
            if isinstance(value.get(key), str | int):
                yield str(value[key])[:_CODE_CHARS_MAX]
        for key in ("error", "metadata", "raw", "details", "violations", "detail"):
            yield from _codes(value.get(key), depth + 1)


def _status(codes: str) -> int:
    """The HTTP status that an error within a stream stands for: its code, or by its words."""
    if number := re.search(r"\b[45]\d\d\b", codes):
        return int(number[0])
    lower = codes.lower()
    return next((status for word, status in _STATUS_BY_WORD if word in lower), 503)


def _is_too_long(status: int, codes: str, words: str) -> bool:
    if status in (401, 402, 403, 404):
        return False
    if _TOO_LONG_CODES.search(codes):
        return True
    # A limit by the minute passes with the minute, unless one request is more than all of it.
    by_the_minute = status == 429 and "request too large" not in words.lower()
    return not by_the_minute and bool(_TOO_LONG_WORDS.search(words))


def _tokens_max(words: str) -> int | None:
    """The limit that the words name; null where they name none."""
    found = _LIMIT.search(words.replace(",", ""))
    return int(next(filter(None, found.groups()))) if found else None


def _is_spent(status: int, codes: str, words: str, retry_after_s: float | None) -> bool:
    """Whether nothing but a payment, or another day, will help."""
    if status == 402 or _QUOTA_CODES.search(codes) or "PerDay" in codes:
        return True
    return status in (400, 403, 429) and retry_after_s is None and bool(_QUOTA_WORDS.search(words))


def _context_sizes(value: object, depth: int = 0) -> Iterator[int]:
    """What a model takes, where the server tells it in a field of its own."""
    if isinstance(value, dict) and depth <= _DEPTH_MAX:
        size = value.get("n_ctx")
        if isinstance(size, int) and 0 < size < 10**9:
            yield size
        yield from _context_sizes(value.get("error"), depth + 1)


def _retry_after_s(headers: Mapping[str, str], body: object, words: str) -> float | None:
    """Seconds from now, from the headers or the body; null where there are none that can be read."""
    if (millis := _number(headers.get("retry-after-ms"))) is not None:
        return _bounded(millis / 1000)
    if header := headers.get("retry-after"):
        return _bounded(_seconds_or_date(header, time.time()))
    if delay := next(_delays(body), None):
        return _bounded(_number(delay["s"]))
    found = _TRY_AGAIN_IN.search(words)
    if found is None or not any(found.group("h", "m", "s")):
        return None
    unit_s = 0.001 if (found["unit"] or "").lower().startswith("m") else 1.0
    seconds = (_number(found["s"]) or 0.0) * unit_s
    return _bounded(3600 * int(found["h"] or 0) + 60 * int(found["m"] or 0) + seconds)


def _seconds_or_date(value: str, now_s: float) -> float | None:
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return parsedate_to_datetime(value).timestamp() - now_s
    except (ValueError, OverflowError):
        return None


def _delays(value: object, depth: int = 0) -> Iterator[re.Match[str]]:
    """`retryDelay`, as Google's servers tell it in the details of an error."""
    if depth > _DEPTH_MAX:
        return
    if isinstance(value, list):
        for item in value:
            yield from _delays(item, depth + 1)
    if isinstance(value, dict):
        found = _DELAY.match(str(value.get("retryDelay")))
        yield from [found] if found else []
        for key in ("error", "details"):
            yield from _delays(value.get(key), depth + 1)


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _bounded(seconds: float | None) -> float | None:
    return None if seconds is None else min(max(seconds, 0.0), RETRY_AFTER_S_MAX)


def _member(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None
