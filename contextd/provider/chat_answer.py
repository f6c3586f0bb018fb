"""How the chunks of a Chat Completions stream become one answer. No I/O: see `contextd.provider.openai`.

Read are the fields that this file names; of all others nothing is required.
"""

import re
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from contextd.core.message import Usage
from contextd.core.values import SEQUENCE_MAX
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    TextDelta,
    ThinkingDelta,
    ToolCallRequest,
    TransientError,
    UsageReport,
)
from contextd.provider.storable import load_json, storable

FINISH_REASON_CHARS_MAX = 64
TOOL_CALLS_MAX = 128
TOOL_CALL_CHARS_MAX = 1024 * 1024  # of the arguments of all calls of one answer

INCOMPLETE = "The connection to the model's server broke before the answer was complete."

_HIGH_SURROGATE = re.compile(r"[\ud800-\udbff]\Z")


class Answer:
    """One answer as it comes together from its chunks."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._text = _Text()
        self._thinking = _Text()
        self._calls = _ToolCalls()
        self._usage: Usage | None = None

    def read(self, payload: object) -> Iterator[Event]:
        """The events that are complete with this chunk. Raises `ValueError` where it is not one."""
        chunk = msgspec.convert(payload, _Chunk)
        self._usage = _usage(chunk.usage) or self._usage
        for choice in chunk.choices or ():
            if choice.index:
                continue  # one answer was asked for
            yield from self._read_delta(choice.delta or _Delta())
            self.finish_reason = choice.finish_reason or self.finish_reason

    def end(self, *, done: bool) -> Iterator[Event]:
        """The last events. Raises `TransientError` where the answer was cut off."""
        if self.finish_reason is None and not done:
            raise TransientError("incomplete_stream", INCOMPLETE)
        if thinking := self._thinking.rest():
            yield ThinkingDelta(thinking)
        if text := self._text.rest():
            yield TextDelta(text)
        calls = self._calls.complete()
        yield from calls
        if self._usage is not None:
            yield UsageReport(self._usage)
        reason = self.finish_reason or ("tool_calls" if calls else "stop")
        yield Finished(storable(reason)[:FINISH_REASON_CHARS_MAX])

    def _read_delta(self, delta: "_Delta") -> Iterator[Event]:
        reasoning = delta.reasoning_content or delta.reasoning
        if isinstance(reasoning, str) and (thinking := self._thinking.add(reasoning)):
            yield ThinkingDelta(thinking)
        for content in (delta.content, delta.refusal):
            if content and (text := self._text.add(content)):
                yield TextDelta(text)
        for part in delta.tool_calls or ():
            self._calls.add(part)


class _FunctionPart(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCallPart(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _FunctionPart | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCallPart] | None = None
    # Not in the API proper: one or the other, or both with the same text, comes from servers whose
    # models reason. What is not text under these names is not meant for us.
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None


class _Text:
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


class _ToolCall:
    def __init__(self, index: int | None) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []


class _ToolCalls:
    """Tool calls, put together from their parts by index."""

    def __init__(self) -> None:
        self._calls: list[_ToolCall] = []
        self._chars = 0

    def add(self, part: _ToolCallPart) -> None:
        call = self._of(part)
        call.id = call.id or part.id or ""
        if part.function is None:
            return
        call.name = call.name or part.function.name or ""
        arguments = part.function.arguments or ""
        self._chars += len(arguments)
        if self._chars > TOOL_CALL_CHARS_MAX:
            raise FatalError("invalid_tool_call", "The arguments of the tool calls are too large.")
        call.arguments.append(arguments)

    def complete(self) -> list[ToolCallRequest]:
        """Raises `FatalError` where one cannot be called."""
        return [_tool_call_request(number, call) for number, call in enumerate(self._calls, 1)]

    def _of(self, part: _ToolCallPart) -> _ToolCall:
        """The call that `part` belongs to. Some servers count no index, or give all calls the same."""
        for call in reversed(self._calls):
            same_index = part.index is None or part.index == call.index
            same_id = not part.id or not call.id or part.id == call.id
            if same_index and same_id:
                return call
        if len(self._calls) == TOOL_CALLS_MAX:
            raise FatalError("invalid_tool_call", f"More than {TOOL_CALLS_MAX} tool calls at once.")
        self._calls.append(_ToolCall(part.index))
        return self._calls[-1]


def _tool_call_request(number: int, call: _ToolCall) -> ToolCallRequest:
    try:
        arguments = load_json("".join(call.arguments).strip() or "{}")
    except ValueError:
        arguments = None
    if not call.name or not isinstance(arguments, dict):
        what = "its arguments are not a JSON object" if call.name else "it has no name"
        raise FatalError("invalid_tool_call", f"The model's tool call {number} is wrong: {what}.")
    id_ = storable(call.id) or f"call_{uuid.uuid4().hex}"  # not every server gives one
    return ToolCallRequest(id=id_, name=storable(call.name), arguments=arguments)


def _usage(reported: Any) -> Usage | None:
    """Counts where there are any. An odd one is no reason to lose an answer."""
    if not isinstance(reported, dict):
        return None
    prompt, completion = reported.get("prompt_tokens"), reported.get("completion_tokens")
    return Usage(prompt_tokens=_count(prompt), completion_tokens=_count(completion))


def _count(value: Any) -> int:
    return min(max(value, 0), SEQUENCE_MAX) if isinstance(value, int) else 0
