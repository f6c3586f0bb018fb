"""A chunk of a Chat Completions stream, as it comes, made into what contextd knows of one.

Servers differ in what they put into a field, under which name and in which form. All of that is met
here and nowhere else; docs/chat-completions.md lists it. A field of an odd form costs that field, not
the answer. No I/O: see `contextd.provider.openai`.
"""

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from contextd.core.message import Usage
from contextd.core.values import JsonObject

# Fields of an answer that a server wants back with it, and whose pieces are collected.
KEPT_FIELDS = ("reasoning_details", "thinking_blocks", "extra_content")
KEPT_NAMES_MAX = 256  # of the members of one object that is to be given back
_REASONING_FIELDS = ("reasoning_content", "reasoning")
_CALL_FIELDS = frozenset({"index", "id", "type", "function", "name", "arguments"})
_FUNCTION_FIELDS = frozenset({"name", "arguments"})


class CallPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a call. `index` is null and the texts are empty where it does not say them.

    `attached` is whatever else the server put on it, with what stood in its function as `function`.
    """

    index: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""
    attached: JsonObject = {}


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk says. `said` lists text and thinking in their order, as `(is thinking, text)`.

    `reasoning_field` is the name under which thinking came, null where it stood in the content.
    `kept` holds what is to be given back. `is_chunk`: the value has the form of one at all.
    `error` is an error inside the choice, in any form.
    """

    said: list[tuple[bool, str]] = []
    reasoning_field: str | None = None
    calls: list[CallPart] = []
    kept: JsonObject = {}
    finish_reason: str | None = None
    usage: Usage | None = None
    error: object | None = None
    is_chunk: bool = False


def read_chunk(payload: object) -> Piece:
    """What `payload` says of the first choice. Raises `ValueError` for what is no JSON object."""
    if not isinstance(payload, dict):
        raise ValueError("it is no JSON object")
    choices = [choice for choice in _listed(payload.get("choices")) if _is_first(choice)]
    usage = _usage(payload) or _usage(payload.get("x_groq"))
    if not choices:
        return Piece(usage=usage, is_chunk="choices" in payload or usage is not None)
    choice = choices[0]
    # A whole message stands in place of its pieces where a server does not stream, or says it again.
    delta = next(filter(None, (_object(choice.get(key)) for key in ("delta", "message"))), {})
    reasoning_field, thinking = _reasoning(delta)
    said = [*_texts(thinking, thinking=True), *_content(delta, choice)]
    return Piece(
        said=said,
        reasoning_field=reasoning_field,
        calls=list(_calls(delta)),
        kept={name: delta[name] for name in KEPT_FIELDS if delta.get(name)},
        finish_reason=_finish_reason(choice),
        usage=usage or _usage(choice),
        error=choice.get("error") or None,
        is_chunk=True,
    )


def _is_first(choice: object) -> bool:
    return isinstance(choice, dict) and not _index(choice.get("index"))


def _finish_reason(choice: JsonObject) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None


def _reasoning(delta: JsonObject) -> tuple[str | None, object]:
    """The reasoning that does not stand in the content. Some servers say it under two names."""
    for name in _REASONING_FIELDS:
        if list(_texts(delta.get(name), thinking=True)):
            return name, delta[name]
    details = [item for item in _listed(delta.get("reasoning_details")) if isinstance(item, dict)]
    return None, [item.get("text") or item.get("summary") for item in details]


def _content(delta: JsonObject, choice: JsonObject) -> Iterator[tuple[bool, str]]:
    for value in (delta.get("content"), delta.get("refusal")):
        yield from _texts(value)
    if "delta" not in choice and "message" not in choice:
        yield from _texts(choice.get("text"))


def _texts(value: object, *, thinking: bool = False) -> Iterator[tuple[bool, str]]:
    """Text as itself or in parts: of a part, what its type says that it holds."""
    if isinstance(value, str):
        if value:
            yield thinking, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, thinking=thinking)
    elif isinstance(value, dict):
        thinking = thinking or value.get("type") in ("thinking", "reasoning")
        names = ("thinking", "reasoning", "text", "content") if thinking else ("text", "content")
        found = (list(_texts(value.get(name), thinking=thinking)) for name in names)
        yield from next(filter(None, found), [])


def _calls(delta: JsonObject) -> Iterator[CallPart]:
    for part in _listed(delta.get("tool_calls")):
        if isinstance(part, dict):
            yield _call(part)
    # The form that the API had before: one call, without an id.
    if old := _object(delta.get("function_call")):
        yield CallPart(name=_text(old.get("name")), arguments=_arguments(old.get("arguments")))


def _call(part: JsonObject) -> CallPart:
    function = _object(part.get("function"))
    # Some put the function's fields beside it.
    named, argued = (function.get(key, part.get(key)) for key in ("name", "arguments"))
    attached = {key: value for key, value in part.items() if _is_extra(key, value, _CALL_FIELDS)}
    extra = {
        key: value for key, value in function.items() if _is_extra(key, value, _FUNCTION_FIELDS)
    }
    return CallPart(
        index=_index(part.get("index")),
        id=_id(part.get("id")),
        name=_text(named),
        arguments=_arguments(argued),
        attached={**attached, "function": extra} if extra else attached,
    )


def _is_extra(key: str, value: object, known: frozenset[str]) -> bool:
    return key not in known and value is not None


def _arguments(value: object) -> str:
    """Arguments are text. Some servers send the value itself."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _index(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:9])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _id(value: object) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _listed(value: object) -> list[Any]:
    """A list as itself; one object where a list belongs counts as a list of it."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _usage(value: object) -> Usage | None:
    """What is reported with `value`; null where that says nothing."""
    return Usage.read(value.get("usage") or None) if isinstance(value, dict) else None
