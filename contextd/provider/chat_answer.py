"""How the chunks of a Chat Completions stream become one answer. No I/O: see `contextd.provider.openai`.

Read are the fields that this file names; of all others nothing is required.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from contextd.core.message import Usage
from contextd.core.text import TextPieces, storable
from contextd.provider import (
    Event,
    Finished,
    TextDelta,
    ThinkingDelta,
    TransientError,
    UsageReport,
)
from contextd.provider.chat_calls import CallPart, ToolCalls

FINISH_REASON_CHARS_MAX = 64

INCOMPLETE = "The connection to the model's server broke before the answer was complete."


class Answer:
    """One answer as it comes together from its chunks.

    `tool_name` says which tool is meant by the name of a function that the model calls.
    """

    def __init__(self, tool_name: Callable[[str], str] = str) -> None:
        self.finish_reason: str | None = None
        self._text = TextPieces()
        self._thinking = TextPieces()
        self._calls = ToolCalls(tool_name)
        self._usage: Usage | None = None

    def read(self, payload: object) -> Iterator[Event]:
        """The events that are complete with this chunk. Raises `ValueError` where it is not one."""
        chunk = msgspec.convert(payload, _Chunk)
        self._usage = Usage.read(chunk.usage) or self._usage
        for choice in chunk.choices or ():
            if choice.index:
                continue  # one answer was asked for
            yield from self._read_delta(choice.delta or _Delta())
            self.finish_reason = choice.finish_reason or self.finish_reason

    def end(self, *, done: bool) -> Iterator[Event]:
        """The last events. Raises `TransientError` where the answer was cut off, `FatalError` where a
        tool was called without a name.
        """
        if self.finish_reason is None and not done:
            raise TransientError("incomplete_stream", INCOMPLETE)
        if thinking := self._thinking.rest():
            yield ThinkingDelta(thinking)
        if text := self._text.rest():
            yield TextDelta(text)
        yield from self._calls.end()
        if self._usage is not None:
            yield UsageReport(self._usage)
        yield Finished(self._reason())

    def _read_delta(self, delta: "_Delta") -> Iterator[Event]:
        reasoning = delta.reasoning_content or delta.reasoning
        if isinstance(reasoning, str) and (thinking := self._thinking.add(reasoning)):
            yield ThinkingDelta(thinking)
        for content in (delta.content, delta.refusal):
            if content and (text := self._text.add(content)):
                yield TextDelta(text)
        for part in delta.tool_calls or ():
            yield from self._calls.add(part)

    def _reason(self) -> str:
        """Some servers say `stop` also after tool calls, which is what they stopped for."""
        reason = storable(self.finish_reason or "stop")[:FINISH_REASON_CHARS_MAX]
        return "tool_calls" if reason == "stop" and self._calls else reason


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[CallPart] | None = None
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
