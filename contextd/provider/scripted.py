"""The scripted provider: deterministic answers, for trying out and for tests (§13).

It answers a plain text with `You said: <text>` and plays a text that is a JSON object with a list
`script`, step by step. A step that is not one of §13 ends the turn before anything is written, with
`FatalError` of type `invalid_script`; its message names the step, counted from 0, and the field, and
holds no text of the script but names of fields. An `error` step raises type `scripted_error`.

Tool calls end a request to the model; the steps after them are played once the history holds their
results, whatever these say. An attempt plays anew only what its own request asks for, and its number
goes on counting within the turn: `times` n is the first n attempts of the turn, not of a request.

The size of a script is bounded by that of a request; what a few bytes can ask for (`repeat`, `rate`,
`delay_ms`) is bounded here, and `repeat` is streamed without being built.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from itertools import accumulate
from typing import Annotated, Any, TypeAlias, assert_never

import msgspec
from msgspec import Meta

from contextd.core.message import Role, Usage
from contextd.core.values import SEQUENCE_MAX, JsonObject
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    HistoryMessage,
    ModelRequest,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    TransientError,
    UsageReport,
)
from contextd.provider.storable import load_json

REPEAT_MAX = 10_000_000
REPEAT_CHARS_MAX = 2**30  # of all chunks of one `repeat` step
RATE_MAX = 1_000_000
DELAY_MS_MAX = 86_400_000
TIMES_MAX = 1_000
MESSAGE_CHARS_MAX = 500
ARGUMENTS_CHUNK_CHARS = 16
EVENTS_BETWEEN_YIELDS = 256  # without a pause now and then nothing else in the process would run

Sleep: TypeAlias = Callable[[float], Awaitable[object]]
Clock: TypeAlias = Callable[[], float]

_ChunkText = Annotated[str, Meta(min_length=1)]
_Chunk: TypeAlias = TextDelta | ThinkingDelta | ToolCallDelta
_Tokens = Annotated[int, Meta(ge=0, le=SEQUENCE_MAX)]


class _Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step has the fields of its form and no other."""


class TextStep(_Form, frozen=True):
    """The answer's text, a chunk a word."""

    text: str


class ChunksStep(_Form, frozen=True):
    """Exactly these chunks."""

    chunks: list[_ChunkText]


class RepeatStep(_Form, frozen=True):
    """The same chunk `repeat` times."""

    repeat: Annotated[int, Meta(ge=0, le=REPEAT_MAX)]
    text: _ChunkText

    def __post_init__(self) -> None:
        if self.repeat * len(self.text) > REPEAT_CHARS_MAX:
            raise ValueError(f"'repeat' times the length of 'text' is over {REPEAT_CHARS_MAX}")


class DelayStep(_Form, frozen=True):
    """A pause; the pacing starts anew after it."""

    delay_ms: Annotated[int, Meta(ge=0, le=DELAY_MS_MAX)]


class RateStep(_Form, frozen=True):
    """Chunks a second from here on; 0 is as fast as it can."""

    rate: Annotated[float, Meta(ge=0, le=RATE_MAX)]


class ThinkingStep(_Form, frozen=True):
    """A message of kind `thinking`, a chunk a word."""

    thinking: str


class ToolCall(_Form, frozen=True):
    """What a `tool_call` step asks for."""

    name: _ChunkText
    arguments: JsonObject


class ToolCallStep(_Form, frozen=True):
    """A call of a tool, its arguments in chunks; consecutive ones make one request."""

    tool_call: ToolCall


class ErrorStep(_Form, frozen=True):
    """The attempt fails here; with `times` only in the first so many attempts of the turn."""

    error: str
    times: Annotated[int, Meta(ge=0, le=TIMES_MAX)] | None = None

    def __post_init__(self) -> None:
        if self.error not in ("transient", "fatal"):  # a Literal's message would echo what is there
            raise ValueError("'error' is 'transient' or 'fatal'")
        if self.error == "fatal" and self.times is not None:
            raise ValueError("'times' belongs to a transient error: a fatal one ends the turn")


class Tokens(_Form, frozen=True):
    """What a `usage` step reports."""

    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0


class UsageStep(_Form, frozen=True):
    """Tokens, reported as if counted."""

    usage: Tokens


Step: TypeAlias = (
    TextStep
    | ChunksStep
    | RepeatStep
    | DelayStep
    | RateStep
    | ThinkingStep
    | ToolCallStep
    | ErrorStep
    | UsageStep
)

# A step's form is told by its first field here; `repeat` stands before `text`, which it has too.
_FORMS: dict[str, type[Step]] = {
    "repeat": RepeatStep,
    "text": TextStep,
    "chunks": ChunksStep,
    "delay_ms": DelayStep,
    "rate": RateStep,
    "thinking": ThinkingStep,
    "tool_call": ToolCallStep,
    "error": ErrorStep,
    "usage": UsageStep,
}

# A run of non-space with the white space after it; a text's leading white space goes with the first.
_WORD = re.compile(r"\s*\S+\s*|\s+")


class ScriptedProvider:
    """Plays scripts (§13). `rate` is in chunks a second; 0 is as fast as it can.

    `sleep` and `clock` (seconds, monotonic) are arguments so that tests own the time.
    """

    name = "scripted"

    def __init__(
        self, *, rate: float, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic
    ) -> None:
        self._rate = rate
        self._sleep = sleep
        self._clock = clock

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        """The answer to the turn's user message: from the last results of tools to the next calls.

        Raises `FatalError` (`invalid_script`, `scripted_error`) and `TransientError`
        (`scripted_error`).
        """
        text, results = _asked(request)
        cut = rounds(parse(text))
        number = _answered(cut, results)
        played = [step for round_ in cut[:number] for step in round_]
        pace = _Pace(_last_rate(played, self._rate), self._sleep, self._clock)
        for index, step in enumerate(cut[number], len(played)):
            match step:
                case RateStep():
                    pace.set_rate(step.rate)
                case DelayStep():
                    await pace.pause(step.delay_ms / 1000)
                case ErrorStep():
                    _raise_if_due(step, request.attempt)
                case _:
                    for event in _events(step, f"{_call_id_start(request)}{index}"):
                        await pace.wait(event)
                        yield event
        yield Finished("tool_calls" if number < len(cut) - 1 else "stop")

    async def aclose(self) -> None:
        """Nothing is held between requests."""


def words(text: str) -> Iterator[str]:
    """`text` as chunks, a word each, with the white space after it. Joined they are `text`."""
    return (match.group() for match in _WORD.finditer(text))


def parse(text: str) -> list[Step]:
    """The script that `text` is, or one that says `text` back.

    Raises `FatalError` of type `invalid_script` for a script with a step that §13 does not know.
    """
    steps = _script(text)
    if steps is None:
        return [TextStep(f"You said: {text}")]
    return [_step(index, step) for index, step in enumerate(steps)]


def rounds(script: list[Step]) -> list[list[Step]]:
    """`script` cut after each run of consecutive tool calls: one request to the model each.

    Round n answers the results of the calls that end round n - 1. The last round ends with no call,
    and is empty where nothing follows the last call.
    """
    cut: list[list[Step]] = [[]]
    for step in script:
        after_call = bool(cut[-1]) and isinstance(cut[-1][-1], ToolCallStep)
        if after_call and not isinstance(step, ToolCallStep):
            cut.append([])
        cut[-1].append(step)
    if cut[-1] and isinstance(cut[-1][-1], ToolCallStep):
        cut.append([])
    return cut


class _Pace:
    """When the next chunk is due.

    Each chunk is due one interval after the one before was *due*, not after it was written: time lost
    to a late wake-up is made up for, so the rate holds however long the answer is.
    """

    def __init__(self, rate: float, sleep: Sleep, clock: Clock) -> None:
        self._rate = rate
        self._sleep = sleep
        self._clock = clock
        self._last_due: float | None = None  # null at the start: the first chunk goes at once
        self._events = 0

    def set_rate(self, rate: float) -> None:
        """From the next chunk on."""
        self._rate = rate

    async def pause(self, duration_s: float) -> None:
        """Waits, and starts the pacing anew."""
        await self._sleep(duration_s)
        self._last_due = None

    async def wait(self, event: Event) -> None:
        """Returns when `event` may go out. Only chunks are paced."""
        left_s = self._left_s() if isinstance(event, _Chunk) else 0.0
        self._events += 1
        if left_s > 0 or self._events % EVENTS_BETWEEN_YIELDS == 0:
            await self._sleep(max(0.0, left_s))

    def _left_s(self) -> float:
        if self._rate == 0:
            self._last_due = None
            return 0.0
        now = self._clock()
        due = now if self._last_due is None else self._last_due + 1 / self._rate
        self._last_due = due
        return due - now


def _events(
    step: TextStep | ChunksStep | RepeatStep | ThinkingStep | ToolCallStep | UsageStep, call_id: str
) -> Iterator[Event]:
    """What one step says, lazily."""
    match step:
        case TextStep():
            yield from map(TextDelta, words(step.text))
        case ChunksStep():
            yield from map(TextDelta, step.chunks)
        case RepeatStep():
            chunk = TextDelta(step.text)
            for _ in range(step.repeat):
                yield chunk
        case ThinkingStep():
            yield from map(ThinkingDelta, words(step.thinking))
        case ToolCallStep():
            for piece in _pieces(step.tool_call.arguments):
                yield ToolCallDelta(id=call_id, name=step.tool_call.name, content=piece)
        case UsageStep():
            yield UsageReport(Usage(**msgspec.structs.asdict(step.usage)))
        case _:
            assert_never(step)


def _raise_if_due(step: ErrorStep, attempt: int) -> None:
    if step.error == "fatal":
        raise FatalError("scripted_error", "The script asked for a fatal error.")
    if step.times is None or attempt <= step.times:
        raise TransientError("scripted_error", "The script asked for a transient error.")


def _pieces(arguments: JsonObject) -> Iterator[str]:
    text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    for start in range(0, len(text), ARGUMENTS_CHUNK_CHARS):
        yield text[start : start + ARGUMENTS_CHUNK_CHARS]


def _asked(request: ModelRequest) -> tuple[str, int]:
    """The user's text that the turn answers, and how many results its calls have by now.

    That is the last one before the turn's first call: others can be stored while tools run (§3.1).
    """
    begun = _first_call(request)
    for at in reversed(range(begun)):
        if request.history[at].role is Role.USER:
            return request.history[at].content, _results(request.history[at:])
    return "", 0


def _first_call(request: ModelRequest) -> int:
    """The index of the first message that calls a tool in this turn."""
    start = _call_id_start(request)
    for index, message in enumerate(request.history):
        if any(call.id.startswith(start) for call in message.calls):
            return index
    return len(request.history)


def _results(history: Sequence[HistoryMessage]) -> int:
    calls = {call.id for message in history for call in message.calls}
    return sum(message.role is Role.TOOL and message.call_id in calls for message in history)


def _answered(cut: list[list[Step]], results: int) -> int:
    """How many rounds of a script are over: the calls of all of them have results."""
    calls = [sum(isinstance(step, ToolCallStep) for step in round_) for round_ in cut[:-1]]
    return sum(asked <= results for asked in accumulate(calls))


def _last_rate(played: list[Step], rate: float) -> float:
    return next((step.rate for step in reversed(played) if isinstance(step, RateStep)), rate)


def _call_id_start(request: ModelRequest) -> str:
    """How the ids of a turn's calls begin; the step's index in the script follows."""
    return f"call_{request.turn_id}_"


def _script(text: str) -> list[Any] | None:
    """The list `script` of `text`, or null where `text` is not a JSON object that has one."""
    if not text.lstrip(" \t\r\n").startswith("{"):
        return None
    try:
        script = load_json(text).get("script")
    except ValueError:
        return None
    return script if isinstance(script, list) else None


def _step(index: int, step: Any) -> Step:
    if not isinstance(step, dict):
        raise _invalid(index, "", "Expected an object")
    form = next((form for name, form in _FORMS.items() if name in step), None)
    if form is None:
        raise _invalid(index, "", f"A step has one of {', '.join(_FORMS)}")
    try:
        return msgspec.convert(step, form)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise _invalid(index, path.rstrip("`"), what) from None


def _invalid(index: int, path: str, what: str) -> FatalError:
    where = " ".join(f"script[{index}]{path}: {what}".split())  # a field's name may hold anything
    message = f"The script cannot be played: {where}"
    return FatalError("invalid_script", message[:MESSAGE_CHARS_MAX])
