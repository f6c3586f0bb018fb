"""What every provider promises, tried on each of them."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
import pytest
from asking import answered, ask, call, calls, collect, offer, pieces, reasons, written
from fake_chat import DONE, FakeChat, Play, called, chunk, problem, text, usage

from contextd.core.message import Usage
from contextd.core.values import ID_PATTERN
from contextd.provider import (
    FatalError,
    Finished,
    ModelRequest,
    Provider,
    ProviderError,
    TextDelta,
    ThinkingDelta,
    TransientError,
    UsageReport,
)
from contextd.provider.openai import OpenAIProvider
from contextd.provider.scripted import ScriptedProvider

WORD = r"[a-z][a-z0-9_]{0,63}\Z"


@dataclass
class Case:
    """What a provider is made to do: as steps of a script, and as the answers of a server.

    `later` answers the requests that bring the results of tools.
    """

    steps: list[object]
    play: Play
    later: list[Play] = field(default_factory=list)


ANSWER = Case(
    [
        {"thinking": "hm "},
        {"chunks": ["one ", "two"]},
        {"usage": {"prompt_tokens": 5, "completion_tokens": 2}},
    ],
    Play(
        [
            chunk(reasoning="hm "),
            chunk(content="one "),
            chunk(content="two"),
            chunk("stop"),
            usage(5, 2),
            DONE,
        ]
    ),
)
ENDLESS = Case([{"repeat": 10_000_000, "text": "x"}], Play([chunk(content="x")], then="repeat"))
STALLED = Case([{"text": "x"}, {"delay_ms": 86_400_000}], Play([chunk(content="x")], then="hang"))
EMPTY = Case([], text())
UNSTORABLE = Case([{"chunks": ["a\0", "\ud83d", "é"]}], text("a\0", "\ud83d", "é"))
ARGUMENTS = '{"path":"a/é😀.txt","lines":[10,20]}'
CALLS = Case(
    [
        {"text": "hm"},
        {"tool_call": {"name": "look.at", "arguments": json.loads(ARGUMENTS)}},
        {"tool_call": {"name": "wait", "arguments": {}}},
        {"text": "and "},
        {"tool_call": {"name": "wait", "arguments": {}}},
        {"text": "done"},
    ],
    Play(
        [
            chunk(content="hm"),
            called(0, "call_a", "look.at", ARGUMENTS[:20]),
            called(0, None, None, ARGUMENTS[20:]),
            called(1, "call_b", "wait", ""),
            chunk("tool_calls"),
            DONE,
        ]
    ),
    [
        Play([chunk(content="and "), called(0, "call_c", "wait", "{}"), chunk("stop"), DONE]),
        text("done"),
    ],
)
UNSTORABLE_CALL = Case(
    [{"tool_call": {"name": "a", "arguments": {"x\0": "\ud83d"}}}],
    Play([called(0, "call_a", "a", '{"x\0":"\ud83d"}'), chunk("tool_calls"), DONE]),
)
BUSY = Case([{"error": "transient"}], problem(503, "busy"))
WRONG = Case([{"error": "fatal"}], problem(404, "wrong"))


@dataclass
class Subject:
    """A provider, and a request that makes it do a case."""

    provider: Provider
    prepare: Callable[[Case], ModelRequest]


@pytest.fixture(params=["scripted", "openai"])
async def subject(request: pytest.FixtureRequest, chat: FakeChat) -> AsyncIterator[Subject]:
    def scripted(case: Case) -> ModelRequest:
        return ask(json.dumps({"script": case.steps}))

    def played(case: Case) -> ModelRequest:
        chat.play(case.play, *case.later)
        return ask()

    if request.param == "scripted":
        subject = Subject(ScriptedProvider(rate=0), scripted)
    else:
        openai = OpenAIProvider(base_url=chat.url, api_key=None, model=None, timeout_s=10)
        subject = Subject(openai, played)
    assert subject.provider.name == request.param
    yield subject
    await subject.provider.aclose()


async def test_an_answer_comes_in_order(subject: Subject) -> None:
    """Chunks as they were written, then usage, and one `Finished` as the last event."""
    assert await collect(subject.provider.stream(subject.prepare(ANSWER))) == [
        ThinkingDelta("hm "),
        TextDelta("one "),
        TextDelta("two"),
        UsageReport(Usage(prompt_tokens=5, completion_tokens=2)),
        Finished("stop"),
    ]


async def test_an_empty_answer_ends(subject: Subject) -> None:
    """Without an empty chunk."""
    events = await collect(subject.provider.stream(subject.prepare(EMPTY)))
    assert events == [Finished("stop")]


async def test_every_chunk_can_be_stored(subject: Subject) -> None:
    """No U+0000, no half of a surrogate pair (§3.1)."""
    events = await collect(subject.provider.stream(subject.prepare(UNSTORABLE)))
    assert "".join(written(events)) == "a\ufffd\ufffdé"
    assert all(written(events))


async def test_tool_calls_come_in_pieces(subject: Subject) -> None:
    """The pieces of a call join to its arguments, and the answer ends for the results."""
    events = await collect(subject.provider.stream(subject.prepare(CALLS)))
    made = calls(events)
    assert [(made_.name, made_.arguments) for made_ in made] == [
        ("look.at", ARGUMENTS),
        ("wait", "{}"),
    ]
    assert len(pieces(events)) > len(made)
    assert written(events) == ["hm"]
    assert events[-1] == Finished("tool_calls")


async def test_tool_calls_have_ids(subject: Subject) -> None:
    """Each one its own, of the form of an id (§1)."""
    events = await collect(subject.provider.stream(subject.prepare(CALLS)))
    ids = [made.id for made in calls(events)]
    assert len(set(ids)) == 2
    assert all(re.match(ID_PATTERN, id_) for id_ in ids)


@pytest.mark.parametrize("results", [["found", "waited"], ["", "Error: the call was denied."]])
async def test_the_results_of_tool_calls_are_answered(subject: Subject, results: list[str]) -> None:
    """Request for request, whatever the results say, until the answer calls nothing."""
    request = subject.prepare(CALLS)
    first = await collect(subject.provider.stream(request))
    request = answered(request, first, results)
    second = await collect(subject.provider.stream(request))
    assert written(second) == ["and "]
    assert [(made.name, made.arguments) for made in calls(second)] == [("wait", "{}")]
    assert reasons(second) == ["tool_calls"]
    third = await collect(subject.provider.stream(answered(request, second, ["waited"])))
    assert third == [TextDelta("done"), Finished("stop")]


async def test_every_tool_call_can_be_stored(subject: Subject) -> None:
    """No U+0000, no half of a surrogate pair (§3.1)."""
    events = await collect(subject.provider.stream(subject.prepare(UNSTORABLE_CALL)))
    (made,) = calls(events)
    assert made == call(made.id, "a", '{"x\ufffd":"\ufffd"}')


async def test_tools_on_offer_need_not_be_called(subject: Subject) -> None:
    """The answer is one like any other."""
    request = msgspec.structs.replace(subject.prepare(ANSWER), tools=[offer("look")])
    events = await collect(subject.provider.stream(request))
    assert written(events) == ["one ", "two"]
    assert reasons(events) == ["stop"]


async def test_streams_do_not_mix(subject: Subject) -> None:
    """One provider serves many turns at once."""
    streams = [subject.provider.stream(subject.prepare(ANSWER)) for _ in range(5)]
    answers = await asyncio.gather(*map(collect, streams))
    assert [written(answer) for answer in answers] == [["one ", "two"]] * 5
    assert [reasons(answer) for answer in answers] == [["stop"]] * 5


async def test_a_closed_stream_says_nothing_more(subject: Subject) -> None:
    """In the middle of an answer that would go on for ever, and the next one is whole again."""
    async with aclosing(subject.provider.stream(subject.prepare(ENDLESS))) as stream:
        assert await anext(stream) == TextDelta("x")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    events = await collect(subject.provider.stream(subject.prepare(ANSWER)))
    assert written(events) == ["one ", "two"]


async def test_a_waiting_stream_can_be_cancelled(subject: Subject) -> None:
    """The cancellation comes through, and nothing else."""
    request = subject.prepare(STALLED)
    first = asyncio.Event()

    async def read() -> None:
        async for _ in subject.provider.stream(request):
            first.set()

    reader = asyncio.create_task(read())
    await first.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reader, 5)


@pytest.mark.parametrize(("case", "error"), [(BUSY, TransientError), (WRONG, FatalError)])
async def test_errors_say_whether_to_try_again(
    subject: Subject, case: Case, error: type[ProviderError]
) -> None:
    """A stable word, and one short line that a client can show."""
    with pytest.raises(error, match=r"^[^\n]{1,500}\Z") as caught:
        await collect(subject.provider.stream(subject.prepare(case)))
    assert re.match(WORD, caught.value.type)
