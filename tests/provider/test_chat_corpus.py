"""What servers stream, in the form in which each does: tests/data/chat has a file for each of them.

A line of `events` is one event: `+ DELTA` and `= REASON [DELTA]` stand for the file's `chunk` with these
in it, a JSON value for itself as data, and anything else is sent as it stands. `raw` is the body as it is
sent; with a `status` it is that of a refused request. `says` lists what must be read, in order. A call
that must not run is `refused` there.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from asking import ask, calls, offer, result

from contextd.core.message import Role, Usage
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    HistoryCall,
    HistoryMessage,
    InputTooLongError,
    ModelRequest,
    ProviderError,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFacts,
    TransientError,
    UsageReport,
)
from contextd.provider.chat_answer import Answer
from contextd.provider.chat_errors import Refusal, RefusedError, failure, words_of
from contextd.provider.chat_request import FunctionNames, attach, messages
from contextd.provider.chat_stream import PayloadReader

MODEL = "a-model"
TOOLS = [offer(name) for name in ("lookup", "read", "read_file", "sweep")]
MADE_UP = re.compile(r"call_[0-9a-f]{32}")


@dataclass
class Read:
    """What was read: all events, and the error that ended them."""

    events: list[Event] = field(default_factory=list)
    error: ProviderError | None = None

    def says(self) -> list[list[str]]:
        """Text, thinking and calls, in the order in which each began."""
        said: list[list[str]] = []
        by_id: dict[str, list[str]] = {}
        for event in self.events:
            if isinstance(event, TextDelta | ThinkingDelta):
                kind = "text" if isinstance(event, TextDelta) else "thinking"
                if not said or said[-1][0] != kind:
                    said.append([kind, ""])
                said[-1][1] += event.content
            elif isinstance(event, ToolCallDelta):
                if event.id not in by_id:
                    said.append(by_id.setdefault(event.id, ["call", event.name, ""]))
                by_id[event.id][2] += event.content
            elif isinstance(event, ToolCallFacts) and event.refusal:
                by_id[event.id][0] = "refused"
        return said

    @property
    def is_complete(self) -> bool:
        return any(isinstance(event, Finished) for event in self.events)


def read(pieces: Sequence[bytes]) -> Read:
    """What an answer with these pieces is made into, without a socket."""
    answer, payloads, got = Answer(FunctionNames(request())), PayloadReader(), Read()
    try:
        try:
            for payload in _payloads(payloads, pieces):
                got.events += answer.read(payload)
        except (RefusedError, ValueError) as error:
            if answer.finish_reason is None:
                raise _broken(error) from None
        if payloads.is_page:
            raise FatalError("page", "It is a page.")
        got.events += answer.end(done=payloads.done)
    except ProviderError as error:
        got.error = error
    return got


def _payloads(payloads: PayloadReader, pieces: Sequence[bytes]) -> Iterator[object]:
    for piece in pieces:
        yield from payloads.feed(piece)
        if payloads.done:
            return
    yield from payloads.end()


def _broken(error: Exception) -> ProviderError:
    if isinstance(error, RefusedError):
        return failure(error.refusal, words_of(error.refusal.body))
    return FatalError("invalid_stream", str(error))


def request(*history: HistoryMessage) -> ModelRequest:
    """A request with the tools of the corpus."""
    first = ask("Go", model=MODEL, tools=TOOLS)
    return msgspec.structs.replace(first, history=[*first.history, *history])


def next_answer(got: Read) -> dict[str, Any]:
    """The answer as the next request says it, with made-up ids as `made up`."""
    facts = {event.id: event for event in got.events if isinstance(event, ToolCallFacts)}
    made = [
        HistoryCall(
            id=call.id,
            name=call.name,
            arguments=call.arguments,
            attached=attach(facts[call.id].attached, MODEL) if call.id in facts else {},
        )
        for call in calls(got.events)
    ]
    said = got.says()
    answer = HistoryMessage(
        role=Role.ASSISTANT,
        content="".join(one[1] for one in said if one[0] == "text"),
        thinking="".join(one[1] for one in said if one[0] == "thinking"),
        calls=made,
    )
    back = [result(call.id, "done") for call in made]
    after = request(answer, *back)
    user, sent, *results = messages(after, FunctionNames(after), MODEL)
    assert user["role"] == "user"
    assert [one["tool_call_id"] for one in results] == [one["id"] for one in sent["tool_calls"]]
    json.dumps(sent, allow_nan=False).encode()
    return json.loads(MADE_UP.sub("made up", json.dumps(sent)))


def _streams() -> Iterator[Any]:
    folder = Path(__file__).parent.parent / "data" / "chat"
    for path in sorted(folder.glob("*.toml")):
        file = tomllib.loads(path.read_text())
        for stream in file["stream"]:
            stream["chunk"] = file["chunk"]
            yield pytest.param(stream, id=f"{path.stem}: {stream['name']}")


STREAMS = list(_streams())
ANSWERS = [one for one in STREAMS if "status" not in one.values[0]]
REFUSALS = [one for one in STREAMS if "status" in one.values[0]]


def events_of(stream: dict[str, Any]) -> list[bytes]:
    """The body, an event each."""
    if "raw_hex" in stream:
        return [bytes.fromhex(stream["raw_hex"])]
    if "raw" in stream:
        return [stream["raw"].encode()]
    end = stream.get("line_end", "\n")
    lines = [_line(line, stream["chunk"]) for line in stream["events"].split("\n") if line]
    # A named event goes on with the next line.
    bodies = [line + (end if line.startswith("event:") else 2 * end) for line in lines]
    start = "\ufeff" if stream.get("bom") else ""
    return [(start * (number == 0) + body).encode() for number, body in enumerate(bodies)]


def _line(line: str, chunk: str) -> str:
    if line[:2] == "+ ":
        return "data: " + chunk.replace("DELTA", line[2:]).replace("FINISH", "null")
    if line[:2] == "= ":
        reason, _, delta = line[2:].partition(" ")
        return "data: " + chunk.replace("DELTA", delta or "{}").replace("FINISH", f'"{reason}"')
    return f"data: {line}" if line[0] in "{[" else line


def check(stream: dict[str, Any], got: Read) -> None:
    """That all is as the corpus says."""
    if "error" in stream:
        check_error(stream, got.error)
        assert not got.is_complete
        return
    assert got.error is None
    assert got.says() == stream["says"]
    has_calls = any(one[0] in ("call", "refused") for one in stream["says"])
    reason, whole = stream.get("ends", ["tool_calls" if has_calls else "stop", True])
    assert got.events[-1] == Finished(reason, whole)
    if "usage" in stream:
        prompt, completion = stream["usage"]
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        assert [one.usage for one in got.events if isinstance(one, UsageReport)] == [usage]


def check_error(stream: dict[str, Any], error: ProviderError | None) -> None:
    """That the error is the one which the corpus names."""
    type_, kind, words = stream["error"]
    assert error is not None
    assert (error.type, isinstance(error, TransientError)) == (type_, kind == "transient")
    assert words in error.message
    assert error.retry_after_s == stream.get("retry_after_s")
    if isinstance(error, InputTooLongError):
        assert error.tokens_max == stream.get("tokens_max")


def test_the_corpus_is_large() -> None:
    """A name says one stream."""
    assert len({one.id for one in STREAMS}) == len(STREAMS) >= 120


@pytest.mark.parametrize("stream", ANSWERS)
def test_an_answer_is_read(stream: dict[str, Any]) -> None:
    """Whole, an event at a time, and a byte at a time."""
    events = events_of(stream)
    body = b"".join(events)
    for pieces in ([body], events, [body[at : at + 1] for at in range(len(body))]):
        check(stream, read(pieces))


@pytest.mark.parametrize("stream", ANSWERS)
def test_an_answer_is_cut(stream: dict[str, Any]) -> None:
    """A cut answer is none. After the model's last word it is one, with the calls of the whole."""
    events = events_of(stream)
    whole = read(events)
    for kept in range(len(events)):
        got = read(events[:kept])
        if got.is_complete:
            assert got.says() == whole.says()
        else:
            assert got.error is not None
            assert got.error.type in ("incomplete_stream", whole.error.type if whole.error else "")
            assert isinstance(got.error, TransientError) or whole.error is not None
            assert not any(isinstance(event, ToolCallFacts) for event in got.events)


@pytest.mark.parametrize("stream", REFUSALS)
def test_a_request_is_refused(stream: dict[str, Any]) -> None:
    """With the words of the server, and its limits."""
    body = stream["raw"]
    refusal = Refusal(status=stream["status"], body=body, headers=stream.get("headers", {}))
    check_error(stream, failure(refusal, words_of(body)))


@pytest.mark.parametrize(
    "stream", [one for one in ANSWERS if any(s[0] != "text" for s in one.values[0].get("says", []))]
)
def test_what_goes_back(stream: dict[str, Any]) -> None:
    """The next request has the answer as the server wants it back."""
    said = stream["says"]
    made = [one for one in said if one[0] in ("call", "refused")]
    if not made:
        return
    sent = next_answer(read(events_of(stream)))
    if "next" in stream:
        assert sent == json.loads(stream["next"])
        return
    assert sent["content"] == ("".join(one[1] for one in said if one[0] == "text") or None)
    assert sent.keys() == {"role", "content", "tool_calls"}
    for one, call in zip(made, sent["tool_calls"], strict=True):
        assert call.keys() == {"id", "type", "function"}
        assert call["function"]["name"] == one[1]
        arguments = call["function"]["arguments"]
        assert arguments == one[2] or json.loads(arguments) == {"invalid_arguments": one[2]}
    assert len({call["id"] for call in sent["tool_calls"]}) in (len(made), 1)
