"""Tool calls as servers stream them, each in its own way."""

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from asking import (
    ask,
    ask_after,
    asked,
    call,
    calls,
    collect,
    offer,
    pieces,
    reasons,
    user,
    written,
)
from fake_chat import DONE, FakeChat, Play, called, chunk, text, usage
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.message import Usage
from contextd.core.values import ID_PATTERN
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    TextDelta,
    ToolCallDelta,
    TransientError,
    UsageReport,
)
from contextd.provider.chat_answer import Answer
from contextd.provider.chat_calls import CALLS_CHARS_MAX, CALLS_MAX
from contextd.provider.openai import OpenAIProvider

MADE_UP = r"call_[0-9a-f]{32}\Z"


def part(
    index: int | None = None, id_: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    return {"index": index, "id": id_, "function": {"name": name, "arguments": arguments}}


def read(answer: Answer, *parts: dict[str, Any]) -> list[Event]:
    return list(answer.read({"choices": [{"delta": {"tool_calls": list(parts)}}]}))


def answer_of(*parts: dict[str, Any], finish_reason: str = "tool_calls") -> list[Event]:
    """All events of an answer with these pieces, a chunk each."""
    answer = Answer()
    events = [event for part in parts for event in read(answer, part)]
    events += answer.read({"choices": [{"delta": {}, "finish_reason": finish_reason}]})
    return [*events, *answer.end(done=True)]


def made_by(*parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of the calls."""
    return [(made.name, made.arguments) for made in calls(answer_of(*parts))]


async def test_arguments_are_said_as_they_come(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Piece by piece, calls mixed, each piece with the id and the name of its call."""
    body = [
        called(0, "call_a", "look", ""),
        called(0, None, None, '{"at"'),
        called(1, "call_b", "wait", '{"s":'),
        called(0, None, None, ":1}"),
        called(1, None, None, "2}"),
        chunk("tool_calls"),
        usage(1, 1),
        DONE,
    ]
    chat.play(Play(body))
    assert await collect(openai.stream(ask())) == [
        ToolCallDelta(id="call_a", name="look", content='{"at"'),
        ToolCallDelta(id="call_b", name="wait", content='{"s":'),
        ToolCallDelta(id="call_a", name="look", content=":1}"),
        ToolCallDelta(id="call_b", name="wait", content="2}"),
        UsageReport(Usage(prompt_tokens=1, completion_tokens=1)),
        Finished("tool_calls"),
    ]


async def test_a_piece_is_said_before_the_next_one_comes(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Arguments can be watched while the model writes them."""
    chat.play(Play([called(0, "call_a", "look", '{"at"')], then="hang"))
    stream = openai.stream(ask())
    first = await asyncio.wait_for(anext(stream), 5)
    assert first == ToolCallDelta(id="call_a", name="look", content='{"at"')
    await stream.aclose()


A, B = '{"x":{"y":"}\\"{"}}', '{"z":[1]}'

DIALECTS = {
    "the api": [
        part(0, "i", "a", ""),
        part(0, None, None, A[:5]),
        part(0, None, None, A[5:]),
        part(1, "j", "b", ""),
        part(1, None, None, B),
    ],
    "empty words for none": [
        part(0, "i", "a", ""),
        part(0, "", "", A),
        part(1, "j", "b", ""),
        part(1, "", "", B),
    ],
    "whole calls": [part(0, "i", "a", A), part(1, "j", "b", B)],
    "whole calls, no index": [part(None, "i", "a", A), part(None, "j", "b", B)],
    "whole calls, no id": [part(0, None, "a", A), part(1, None, "b", B)],
    "whole calls, no index, no id": [part(None, None, "a", A), part(None, None, "b", B)],
    "whole calls, one index, no id": [part(0, "", "a", A), part(0, "", "b", B)],
    "whole calls, one index": [part(0, "i", "a", A), part(0, "j", "b", B)],
    "whole calls, one id": [part(0, "i", "a", A), part(1, "i", "b", B)],
    "whole calls, one id, no index": [part(None, "i", "a", A), part(None, "i", "b", B)],
    "one index, in pieces": [
        part(0, "i", "a", A[:5]),
        part(0, None, None, A[5:]),
        part(0, "j", "b", B[:5]),
        part(0, None, None, B[5:]),
    ],
    "one id, in mixed pieces": [
        part(0, "i", "a", A[:5]),
        part(1, "i", "b", B[:5]),
        part(0, "i", None, A[5:]),
        part(1, "i", None, B[5:]),
    ],
    "no index, in pieces": [
        part(None, "i", "a", A[:5]),
        part(None, "i", None, A[5:]),
        part(None, "j", "b", B[:5]),
        part(None, None, None, B[5:]),
    ],
    "no index, no id, in pieces": [
        part(None, None, "a", A[:5]),
        part(None, None, None, A[5:]),
        part(None, None, "b", B[:5]),
        part(None, None, None, B[5:]),
    ],
    "id and name with each piece": [
        part(0, "i", "a", A[:5]),
        part(0, "i", "a", A[5:]),
        part(0, "i", "a", ""),
        part(1, "j", "b", B[:5]),
        part(1, "j", "b", B[5:]),
    ],
    "name with each piece": [
        part(0, None, "a", A[:5]),
        part(0, None, "a", A[5:]),
        part(1, None, "b", B[:5]),
        part(1, None, "b", B[5:]),
    ],
    "a new id with each piece": [
        part(0, "i1", "a", A[:5]),
        part(0, "i2", None, A[5:]),
        part(1, "j1", "b", B[:5]),
        part(1, "j2", None, B[5:]),
    ],
    "an index counted up with each piece": [
        part(0, "i", "a", A[:5]),
        part(1, None, None, A[5:]),
        part(2, "j", "b", B[:5]),
        part(3, None, None, B[5:]),
    ],
    "id first, name later": [
        part(0, "i", None, None),
        part(0, None, "a", A),
        part(1, "j", None, None),
        part(1, None, "b", B),
    ],
    "name last": [
        part(0, "i", None, A[:5]),
        part(0, None, "a", A[5:]),
        part(1, "j", None, B),
        part(1, None, "b", None),
    ],
    "objects for text": [part(0, "i", "a", json.loads(A)), part(1, "j", "b", json.loads(B))],
}


@pytest.mark.parametrize("parts", DIALECTS.values(), ids=DIALECTS.keys())
@pytest.mark.parametrize("at_once", [False, True])
def test_calls_are_told_apart(parts: list[dict[str, Any]], at_once: bool) -> None:
    """In all the ways in which servers stream two calls, in a chunk each or all in one."""
    answer = Answer()
    chunks = [parts] if at_once else [[each] for each in parts]
    events = [event for chunk_ in chunks for event in read(answer, *chunk_)]
    made = calls([*events, *answer.end(done=True)])
    assert [(each.name, each.arguments) for each in made] == [("a", A), ("b", B)]
    assert all(re.match(ID_PATTERN, each.id) for each in made)


@pytest.mark.parametrize(("index", "id_"), [(None, "i"), (0, "i"), ("0", 7)])
def test_an_empty_object_may_stand_for_the_arguments_to_come(index: Any, id_: Any) -> None:
    """Where the same call, by its id, is said again with them."""
    twice = [part(index, id_, "roll", "{}"), part(index, id_, "roll", '{"n":2}')]
    assert made_by(*twice) == [("roll", '{"n":2}')]


@pytest.mark.parametrize(("index", "id_"), [(None, None), (0, "")])
def test_the_same_tool_may_be_called_twice(index: int | None, id_: str | None) -> None:
    """With nothing to tell the calls apart but that the first was whole."""
    twice = [part(index, id_, "roll", "{}"), part(index, id_, "roll", '{"n":2}')]
    assert made_by(*twice) == [("roll", "{}"), ("roll", '{"n":2}')]


@pytest.mark.parametrize(("index", "id_"), [(1, None), (1, "i"), (0, "j"), (None, "j")])
def test_the_same_tool_may_be_called_twice_at_the_same_time(
    index: int | None, id_: str | None
) -> None:
    """By another index or another id it is a new call, though the first is not whole."""
    started = [part(0, "i", "roll", '{"n"'), part(index, id_, "roll", '{"m"')]
    rest = [part(0, "i", None, ":1}"), part(index, id_, None, ":2}")]
    assert made_by(*started, *rest) == [("roll", '{"n":1}'), ("roll", '{"m":2}')]


@pytest.mark.parametrize("arguments", [None, "", " "])
def test_another_name_is_another_call(arguments: str | None) -> None:
    """Also before there are any arguments."""
    parts = [part(0, None, "a", arguments), part(0, None, "b", arguments)]
    assert made_by(*parts) == [("a", "{}"), ("b", "{}")]


@pytest.mark.parametrize(
    "begun", ['{"x":"}', '{"x":"\\"}', '{"x":"\\\\\\"}', '{"x":{}', '{"x":[{}]', "  "]
)
def test_a_name_said_again_within_the_arguments_is_no_new_call(begun: str) -> None:
    """Braces in strings and within others end nothing."""
    assert made_by(part(0, None, "a", begun), part(0, None, "a", '"}')) == [
        ("a", (begun + '"}').lstrip())
    ]


def test_a_name_said_again_is_no_new_call() -> None:
    """Also when the arguments are whole already."""
    said = [part(0, "i", "a", A), part(0, "i", "a", ""), part(0, None, "a", " \n")]
    assert made_by(*said) == [("a", A + " \n")]


@pytest.mark.parametrize("arguments", [None, "", " ", "\n\t"])
def test_a_call_without_arguments_has_an_empty_object(arguments: str | None) -> None:
    """Said once, so that each call has a piece."""
    events = answer_of(part(0, "i", "a", arguments))
    assert events == [ToolCallDelta(id="i", name="a", content="{}"), Finished("tool_calls")]


def test_a_call_of_white_space_pieces_has_an_empty_object() -> None:
    """White space before the arguments is not said."""
    assert made_by(part(0, "i", "a", " "), part(0, None, None, "\n")) == [("a", "{}")]
    assert made_by(part(0, "i", "a", " "), part(0, None, None, "\n{ }")) == [("a", "{ }")]


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]", '"x"', '{"x": NaN}', "null", "so what"])
def test_arguments_may_be_anything(arguments: str) -> None:
    """Whoever asked for the call tells the model what is wrong with it."""
    assert made_by(part(0, "i", "a", arguments)) == [("a", arguments)]


@pytest.mark.parametrize("id_", [None, "", "é", "a b", "x" * 65, "a\n", "\ud83d"])
def test_an_id_that_is_none_is_made_up(id_: str | None) -> None:
    """Missing, or not of the form of an id (§1); the pieces are still known by it."""
    parts = [part(0, id_, "a", '{"x"'), part(0, id_, None, ":1}")]
    (made,) = calls(answer_of(*parts))
    assert made.arguments == '{"x":1}'
    assert re.match(MADE_UP, made.id)


def test_an_id_used_twice_is_made_up_the_second_time() -> None:
    """No two calls of an answer have the same."""
    first, second = calls(answer_of(part(0, "i", "a", A), part(1, "i", "b", B)))
    assert first.id == "i"
    assert re.match(MADE_UP, second.id)


def test_an_id_that_comes_too_late_is_not_used() -> None:
    """What has been said of a call stays; the pieces after it are its own."""
    events = answer_of(part(0, None, "a", '{"x"'), part(0, "late", None, ":1}"))
    (made,) = calls(events)
    assert made.arguments == '{"x":1}'
    assert re.match(MADE_UP, made.id)


@pytest.mark.parametrize("parts", [[part(0, "i", None, "{}")], [part()], [part(0, "i", "")]])
def test_a_call_without_a_name_is_fatal(parts: list[dict[str, Any]]) -> None:
    """Nobody can say which tool is meant."""
    with pytest.raises(FatalError, match=r"tool call 1 .* no name") as caught:
        answer_of(*parts)
    assert caught.value.type == "invalid_tool_call"


def test_a_name_is_cut_where_no_tool_has_one() -> None:
    """It is unknown either way."""
    (made,) = calls(answer_of(part(0, "i", "n" * 100_000, "{}")))
    assert made.name == "n" * 512


def test_names_can_be_stored() -> None:
    """No U+0000, no half of a surrogate pair (§3.1)."""
    (made,) = calls(answer_of(part(0, "i", "a\0\ud83d", "{}")))
    assert made.name == "a\ufffd\ufffd"


def test_surrogate_pairs_cut_between_pieces_are_joined() -> None:
    """For each call by itself, also where the pieces are mixed."""
    parts = [
        part(0, "i", "a", '{"x":"\ud83d'),
        part(1, "j", "b", '{"y":"\ud83d'),
        part(0, None, None, '\ude00"}'),
        part(1, None, None, '\ude01"}'),
    ]
    assert made_by(*parts) == [("a", '{"x":"😀"}'), ("b", '{"y":"😁"}')]


def test_a_half_without_its_other_is_replaced_at_the_end() -> None:
    """Also where it is all that there is."""
    assert made_by(part(0, "i", "a", '{"\ud83d')) == [("a", '{"\ufffd')]
    assert made_by(part(0, "i", "a", "\ud83d")) == [("a", "\ufffd")]


@given(st.text(st.characters(exclude_categories=())), st.data())
def test_arguments_in_any_pieces_join_to_the_same(arguments: str, draw: st.DataObject) -> None:
    """Cut anywhere, they are what they would have been in one piece."""
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(arguments)), max_size=5)))
    ends = [0, *cuts, len(arguments)]
    in_pieces = [arguments[a:b] for a, b in pairwise(ends)]
    parts = [part(0, "i", "a"), *(part(0, None, None, piece) for piece in in_pieces)]
    assert made_by(*parts) == made_by(part(0, "i", "a", arguments))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("tool_calls", "tool_calls"),
        ("stop", "tool_calls"),
        ("length", "length"),
        ("content_filter", "content_filter"),
    ],
)
def test_the_reason_of_an_answer_with_calls(said: str, expected: str) -> None:
    """It stopped for the calls, unless it was stopped."""
    assert reasons(answer_of(part(0, "i", "a", "{}"), finish_reason=said)) == [expected]


async def test_an_answer_without_a_reason_stopped_for_its_calls(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Where the server says `[DONE]` and no more."""
    chat.play(Play([called(0, "i", "a", "{}"), DONE]))
    assert reasons(await collect(openai.stream(ask()))) == ["tool_calls"]


async def test_text_may_stand_beside_calls(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Before and after, in the order in which it came."""
    body = [chunk(content="a"), called(0, "i", "f", A), chunk(content="b"), chunk("tool_calls")]
    chat.play(Play([*body, DONE]))
    events = await collect(openai.stream(ask()))
    assert events[:3] == [
        TextDelta("a"),
        ToolCallDelta(id="i", name="f", content=A),
        TextDelta("b"),
    ]


async def test_a_call_that_is_cut_off_is_a_broken_answer(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Another try may help, and nothing more is said of the call."""
    chat.play(Play([called(0, "i", "f", '{"x"')], then="cut"))
    stream = openai.stream(ask())
    assert pieces([await anext(stream)])
    with pytest.raises(TransientError) as caught:
        await anext(stream)
    assert caught.value.type == "incomplete_stream"


def test_the_number_of_calls_is_bounded() -> None:
    """A model that calls for ever is stopped."""
    answer = Answer()
    parts = [part(index, f"call_{index}", "a", '{"x":1}') for index in range(CALLS_MAX + 1)]
    assert len(calls(read(answer, *parts[:-1]))) == CALLS_MAX
    with pytest.raises(FatalError) as caught:
        read(answer, parts[-1])
    assert caught.value.type == "invalid_tool_call"


def test_the_arguments_of_calls_are_bounded() -> None:
    """A model that never ends its arguments is stopped, however many calls share them."""
    answer = Answer()
    half = "x" * (CALLS_CHARS_MAX // 2)
    assert len(pieces(read(answer, part(0, "i", "a", half), part(1, "j", "a", half)))) == 2
    with pytest.raises(FatalError) as caught:
        read(answer, part(0, None, None, "x"))
    assert caught.value.type == "invalid_tool_call"


async def test_tools_are_offered_as_functions(chat: FakeChat, openai: OpenAIProvider) -> None:
    """With the JSON Schema of their arguments, which are an object always."""
    chat.play(text("ok"))
    path = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    offers = [offer("look", "Looks.", **path), offer("wait")]
    await collect(openai.stream(ask(tools=offers)))
    nothing = {"type": "object", "properties": {}}
    assert chat.bodies[0]["tools"] == [
        {
            "type": "function",
            "function": {"name": "look", "description": "Looks.", "parameters": path},
        },
        {
            "type": "function",
            "function": {"name": "wait", "description": "", "parameters": nothing},
        },
    ]


async def test_without_tools_none_are_offered(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Servers refuse an empty list."""
    chat.play(text("ok"))
    await collect(openai.stream(ask()))
    assert "tools" not in chat.bodies[0]


async def test_names_go_there_and_come_back(chat: FakeChat, openai: OpenAIProvider) -> None:
    """The server sees names that the API allows, contextd its own; so also for calls of before."""
    chat.play(text("ok"))
    request = ask_after(user("Q"), asked("", call("i", "old:one")), tools=[offer("files.read")])
    await collect(openai.stream(request))
    sent = chat.bodies[0]
    offered = sent["tools"][0]["function"]["name"]
    before = sent["messages"][1]["tool_calls"][0]["function"]["name"]
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in (offered, before))
    body = [called(0, "i", offered, "{}"), called(1, "j", before, "{}"), chunk("tool_calls"), DONE]
    chat.play(Play(body))
    made = calls(await collect(openai.stream(request)))
    assert [each.name for each in made] == ["files.read", "old:one"]


async def test_a_name_that_was_not_offered_stays(chat: FakeChat, openai: OpenAIProvider) -> None:
    """The model is told that there is no such tool."""
    chat.play(Play([called(0, "i", "files_read", "{}"), called(1, "j", "b.c", "{}"), DONE]))
    events = await collect(openai.stream(ask(tools=[offer("files.read")])))
    assert [made.name for made in calls(events)] == ["files_read", "b.c"]
    assert written(events) == []
