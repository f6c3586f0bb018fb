"""How the chunks of a Chat Completions stream become one answer. No I/O: see `contextd.provider.openai`."""

import json
from collections.abc import Iterator
from typing import Any, cast

from contextd.core.message import Usage
from contextd.core.text import TextPieces, in_strings, storable
from contextd.core.values import JsonObject
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    TextDelta,
    ThinkingDelta,
    ToolCallFacts,
    TransientError,
    UsageReport,
)
from contextd.provider.chat_calls import AnyNames, Names, ToolCalls
from contextd.provider.chat_chunk import KEPT_NAMES_MAX, Piece, read_chunk
from contextd.provider.chat_errors import Refusal, RefusedError, error_in
from contextd.provider.think_tags import ThinkTags

FINISH_REASON_CHARS_MAX = 64
KEPT_CHARS_MAX = 256 * 1024  # of what is to be given back with one answer

INCOMPLETE = "The connection to the model's server broke before the answer was complete."

_WHOLE = ("stop", "tool_calls")
# Other words for the API's own. What stands in neither list stays as it is, and is no whole answer.
_REASONS = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "complete": "stop",
    "completed": "stop",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "model_context_window_exceeded": "length",
    "safety": "content_filter",
    "recitation": "content_filter",
    "sensitive": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "spii": "content_filter",
    "refusal": "content_filter",
    "network_error": "error",
    "malformed_function_call": "error",
    "insufficient_system_resource": "error",
    "abort": "error",
    "aborted": "error",
    "cancelled": "error",
    "timeout": "error",
}


class Answer:
    """One answer as it comes together from its chunks.

    `names` are those of the functions on offer. `think_tags`: reasoning between tags in the text is
    thinking. `finish_reason` is the server's word for the end, null until it was said.
    """

    def __init__(self, names: Names | None = None, *, think_tags: bool = True) -> None:
        self.finish_reason: str | None = None
        self._text = TextPieces()
        self._thinking = TextPieces()
        self._tags = ThinkTags() if think_tags else None
        self._calls = ToolCalls(names or AnyNames())
        self._kept = _Kept()
        self._usage: Usage | None = None
        self._blank: list[str] = []  # white space that no text has followed yet
        self._in_text = False
        self._is_answer = False
        self._is_foreign = False

    def read(self, payload: object) -> Iterator[Event]:
        """The events that are complete with this value.

        Raises `RefusedError` where it is an error, `ValueError` where it is no chunk, `FatalError` where
        the calls are too large.
        """
        if (error := error_in(payload)) is not None:
            raise RefusedError(Refusal(status=None, body=error))
        piece = read_chunk(payload)
        self._is_answer = self._is_answer or piece.is_chunk
        self._is_foreign = self._is_foreign or (bool(payload) and not piece.is_chunk)
        self._usage = piece.usage or self._usage
        self._kept.add(piece)
        for is_thinking, content in piece.said:
            yield from self._think(content) if is_thinking else self._say(content)
        for part in piece.calls:
            for delta in self._calls.add(part):
                self._in_text = False
                yield delta
        if piece.error is not None or _plain(piece.finish_reason) == "error":
            raise RefusedError(Refusal(status=None, body={"error": piece.error}))
        self.finish_reason = piece.finish_reason or self.finish_reason

    def end(self, *, done: bool) -> Iterator[Event]:
        """The last events. Raises `TransientError` where the answer was cut off, `FatalError` where a
        tool was called without a name, or nothing that came was a chunk of an answer.
        """
        if self._is_foreign and not self._is_answer:
            message = "The model's server sent what is no chunk of an answer."
            raise FatalError("invalid_stream", message)
        if self.finish_reason is None and not done:
            raise TransientError("incomplete_stream", INCOMPLETE)
        yield from self._think(self._thinking.rest(), is_rest=True)
        yield from self._say_rest()
        reason = self._reason()
        whole = reason in _WHOLE
        yield from self._end_calls(whole=whole)
        if self._usage is not None:
            yield UsageReport(self._usage)
        yield Finished(reason, whole)

    def _end_calls(self, *, whole: bool) -> Iterator[Event]:
        """What the answer as a whole has attached goes with its first call."""
        kept = self._kept.facts()
        for event in self._calls.end(whole=whole, has_reason=self.finish_reason is not None):
            if not isinstance(event, ToolCallFacts):
                yield event
                continue
            attached = {"call": event.attached} if event.attached else {}
            attached |= {"answer": kept} if kept else {}
            kept = {}
            if attached or event.refusal:
                yield ToolCallFacts(id=event.id, refusal=event.refusal, attached=_bounded(attached))

    def _think(self, content: str, *, is_rest: bool = False) -> Iterator[Event]:
        if thinking := content if is_rest else self._thinking.add(content):
            self._in_text = False
            yield ThinkingDelta(thinking)

    def _say(self, content: str) -> Iterator[Event]:
        yield from self._tell(self._text.add(content))

    def _say_rest(self) -> Iterator[Event]:
        yield from self._tell(self._text.rest())
        for kind, content in self._tags.rest() if self._tags else ():
            yield from self._tell_part(kind, content)

    def _tell(self, text: str) -> Iterator[Event]:
        if not text:
            return
        for kind, content in self._tags.add(text) if self._tags else [("text", text)]:
            yield from self._tell_part(kind, content)

    def _tell_part(self, kind: str, content: str) -> Iterator[Event]:
        if kind == "thinking":
            self._in_text = False
            yield ThinkingDelta(content)
            return
        if not self._in_text and content.isspace():
            self._blank.append(content)
            return
        content = "".join([*self._blank, content])
        self._blank, self._in_text = [], True
        yield TextDelta(content)

    def _reason(self) -> str:
        """Some servers say `stop` also after tool calls, which is what they stopped for."""
        reason = _plain(self.finish_reason) or "stop"
        return "tool_calls" if reason == "stop" and self._calls else reason


def _plain(reason: str | None) -> str | None:
    """The API's own word for a reason; as it is where there is none."""
    if reason is None:
        return None
    word = reason.strip().lower().replace("-", "_").replace(" ", "_")
    known = word in ("stop", "length", "tool_calls", "content_filter", "error")
    return _REASONS.get(word) or (word if known else storable(reason)[:FINISH_REASON_CHARS_MAX])


def _bounded(attached: JsonObject) -> JsonObject:
    """As it can be stored, and nothing where it is too large or nested too deeply for that.

    The server will say that it misses it.
    """
    try:
        if len(json.dumps(attached)) > KEPT_CHARS_MAX:
            return {}
        return cast("JsonObject", in_strings(attached, storable))
    except RecursionError:
        return {}


class _Kept:
    """What the server wants back with an answer that calls tools: pieces are joined as they came.

    Nothing is kept of a field that grows too large, or is a list at one time and an object at another.
    """

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}
        self._objects: JsonObject = {}
        self._lost: set[str] = set()
        self._pieces = 0
        self._reasoning_field: str | None = None

    def add(self, piece: Piece) -> None:
        self._reasoning_field = piece.reasoning_field or self._reasoning_field
        for name, value in piece.kept.items():
            if isinstance(value, list) and name not in self._objects:
                self._join(name, value)
            elif isinstance(value, dict) and name not in self._lists:
                self._objects.setdefault(name, {}).update(value)
                if len(self._objects[name]) > KEPT_NAMES_MAX:
                    self._lost.add(name)
                    self._objects[name].clear()
            else:
                self._lost.add(name)

    def facts(self) -> JsonObject:
        lists = {name: [_whole(item) for item in items] for name, items in self._lists.items()}
        kept = {**lists, **self._objects}
        facts = {name: value for name, value in kept.items() if name not in self._lost}
        if self._reasoning_field is not None:
            facts["reasoning_field"] = self._reasoning_field
        return facts

    def _join(self, name: str, items: list[Any]) -> None:
        """Text that grows is a list of its pieces until the end: each piece costs only itself."""
        joined = self._lists.setdefault(name, [])
        for item in items:
            self._pieces += 1
            last = joined[-1] if joined else None
            if isinstance(item, dict) and isinstance(last, dict) and _is_more_of(last, item):
                _grow(last, item)
            else:
                joined.append(_in_pieces(item) if isinstance(item, dict) else item)
        if self._pieces > KEPT_CHARS_MAX:  # each has a character at least
            self._lost.add(name)
            joined.clear()


def _in_pieces(item: JsonObject) -> JsonObject:
    return {
        name: _Pieces([value]) if name in _GROWING and isinstance(value, str) else value
        for name, value in item.items()
    }


def _grow(last: JsonObject, item: JsonObject) -> None:
    for name, value in item.items():
        grown = last.get(name)
        if isinstance(grown, _Pieces) and isinstance(value, str):
            grown.append(value)
        elif not grown:
            last |= _in_pieces({name: value})


def _whole(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {
        name: "".join(value) if isinstance(value, _Pieces) else value
        for name, value in item.items()
    }


class _Pieces(list[str]):
    """Text that has come so far."""


_GROWING = frozenset({"text", "summary", "thinking", "data", "signature"})


def _is_more_of(last: JsonObject, item: JsonObject) -> bool:
    same = all(last.get(name) == item.get(name) for name in ("type", "index"))
    return same and (not item.get("id") or last.get("id") in (None, item["id"]))
