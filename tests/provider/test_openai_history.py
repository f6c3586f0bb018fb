"""A history as Chat Completions messages: well-formed whatever it holds."""

import json
import re
from typing import Any

import pytest
from asking import ask, ask_after, asked, call, offer, result, user
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.message import Role
from contextd.provider import HistoryMessage, ModelRequest
from contextd.provider.chat_request import NO_RESULT, FunctionNames, messages

FUNCTION_NAME = "[a-zA-Z0-9_-]{1,64}"


def sent(request: ModelRequest) -> list[dict[str, Any]]:
    return messages(request, FunctionNames(request))


def said(*history: HistoryMessage) -> list[dict[str, Any]]:
    return sent(ask_after(*history))


def function(id_: str, name: str = "look", arguments: str = "{}") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def back(id_: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


@pytest.mark.parametrize(
    ("system_prompt", "history", "expected"),
    [
        (None, [], [("user", "Q")]),
        ("", [], [("user", "Q")]),
        ("S", [("system", "T")], [("system", "S\n\nT"), ("user", "Q")]),
        (None, [("user", "a"), ("user", "b")], [("user", "a\n\nb\n\nQ")]),
        (None, [("user", "a"), ("assistant", "")], [("user", "a\n\nQ")]),
        (
            "S",
            [("user", "a"), ("assistant", "b"), ("tool", "t"), ("assistant", "c")],
            [("system", "S"), ("user", "a"), ("assistant", "b\n\nc"), ("user", "Q")],
        ),
    ],
)
def test_messages_alternate(
    system_prompt: str | None, history: list[tuple[str, str]], expected: list[tuple[str, str]]
) -> None:
    """System prompt first, one message a run of the same role, none empty."""
    request = ask("Q", system_prompt=system_prompt, history=history)
    assert sent(request) == [{"role": role, "content": content} for role, content in expected]


def test_calls_and_their_results() -> None:
    """As the model made them; without text the content is null."""
    arguments = '{"at" : "é"}'
    history = [user("Q"), asked("", call("i", "look", arguments)), result("i", "found")]
    assert said(*history, asked("A")) == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [function("i", "look", arguments)]},
        back("i", "found"),
        {"role": "assistant", "content": "A"},
    ]


def test_all_of_one_answer_is_one_message() -> None:
    """Its text and its calls, whether they come as one message or as several."""
    expected = [
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": "hm\n\nwell",
            "tool_calls": [function("i"), function("j")],
        },
        back("i", "1"),
        back("j", "2"),
    ]
    results = [result("i", "1"), result("j", "2")]
    whole = asked("hm\n\nwell", call("i"), call("j"))
    assert said(user("Q"), whole, *results) == expected
    parts = [asked("hm"), asked("", call("i")), asked("well"), asked("", call("j"))]
    assert said(user("Q"), *parts, *results) == expected


def test_an_answer_to_results_is_one_of_its_own() -> None:
    """Calls that follow results are not joined to the calls before."""
    first = [asked("", call("i")), result("i", "1")]
    assert said(user("Q"), *first, asked("", call("j")), result("j", "")) == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [function("i")]},
        back("i", "1"),
        {"role": "assistant", "content": None, "tool_calls": [function("j")]},
        back("j", ""),
    ]


def test_results_follow_their_calls_at_once() -> None:
    """In the order of the calls, also where they came otherwise or something was said between."""
    history = [
        asked("", call("i"), call("j")),
        result("j", "2"),
        user("by the way"),
        result("i", "1"),
        user("and"),
    ]
    assert said(user("Q"), *history) == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [function("i"), function("j")]},
        back("i", "1"),
        back("j", "2"),
        {"role": "user", "content": "by the way\n\nand"},
    ]


def test_a_call_without_a_result_gets_one() -> None:
    """A call that nobody answers is refused, and left out the model would not know of it."""
    assert said(user("Q"), asked("", call("i"), call("j")), result("j", "2"), user("R"))[2:] == [
        back("i", NO_RESULT),
        back("j", "2"),
        {"role": "user", "content": "R"},
    ]


@pytest.mark.parametrize(
    "history",
    [
        [result("i", "t"), user("Q"), asked("A")],
        [user("Q"), result("i", "t"), asked("A")],
        [user("Q"), result(None, "t"), asked("A")],
        [user("Q"), asked("A"), result("i", "t")],
    ],
)
def test_a_result_without_its_call_is_left_out(history: list[HistoryMessage]) -> None:
    """As a tool's it would be refused, and nobody else said it."""
    assert said(*history) == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]


def test_a_second_result_of_a_call_is_left_out() -> None:
    """Each call has one."""
    history = [asked("", call("i")), result("i", "1"), result("i", "2")]
    assert said(user("Q"), *history)[2:] == [back("i", "1")]


def test_an_id_used_again_is_replaced() -> None:
    """Some servers count from 0 in each answer; each result stays with its own call."""
    first = [asked("", call("call_0")), result("call_0", "1")]
    second = [user("R"), asked("", call("call_0")), result("call_0", "2")]
    once, twice = said(user("Q"), *first), said(user("Q"), *first, *second)
    assert twice[: len(once)] == once
    _, new = (message["tool_calls"][0]["id"] for message in twice if "tool_calls" in message)
    assert new != "call_0"
    assert twice[-1] == back(new, "2")
    assert said(user("Q"), *first, *second) == twice


@pytest.mark.parametrize("id_", ["", "call_0199c0de-0000-7000-8000-000000000001_0"])
def test_an_id_that_the_api_does_not_take_is_replaced(id_: str) -> None:
    """Over 40 characters it is refused; the context may have had another provider before."""
    answer, found = said(user("Q"), asked("", call(id_)), result(id_, "1"))[1:]
    assert re.fullmatch("call_[0-9a-f]{32}", answer["tool_calls"][0]["id"])
    assert found == back(answer["tool_calls"][0]["id"], "1")


@pytest.mark.parametrize(
    "arguments", ["", '{"x": ', "[1]", "null", '{"x": NaN}', "[" * 100_000, "so what"]
)
def test_arguments_that_are_no_object_go_as_text_in_one(arguments: str) -> None:
    """Servers that parse them would refuse this request and each one after it."""
    answer = said(user("Q"), asked("", call("i", "look", arguments)))[1]
    sent_arguments = answer["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent_arguments) == {"invalid_arguments": arguments}


def test_names_that_the_api_allows_stay() -> None:
    """Also the longest."""
    request = ask(tools=[offer("read_file"), offer("a-B_9"), offer("n" * 64)])
    names = FunctionNames(request)
    for name in ("read_file", "a-B_9", "n" * 64):
        assert names.function(name) == name
        assert names.tool(name) == name


def test_a_name_is_mostly_the_same_in_every_request() -> None:
    """What else is on offer does not matter, so what a model has seen stays true."""
    alone = FunctionNames(ask(tools=[offer("files.read")]))
    among = FunctionNames(ask(tools=[offer("files:read"), offer("x"), offer("files.read")]))
    assert alone.function("files.read") == among.function("files.read")


def test_no_name_takes_that_of_another_tool() -> None:
    """Also of one that is called what another would be called."""
    taken = FunctionNames(ask(tools=[offer("files.read")])).function("files.read")
    for tools in ([offer("files.read"), offer(taken)], [offer(taken), offer("files.read")]):
        names = FunctionNames(ask(tools=tools))
        assert names.function(taken) == taken
        assert names.function("files.read") != taken
        assert names.tool(names.function("files.read")) == "files.read"


@given(st.lists(st.text(st.sampled_from("a.:é_ \n") | st.characters(codec="utf-8"), max_size=80)))
def test_names_there_and_back(tools: list[str]) -> None:
    """Allowed by the API, no two the same, and each comes back as what it was."""
    half = len(tools) // 2
    before = asked("", *(call(str(at), name) for at, name in enumerate(tools[:half])))
    names = FunctionNames(ask_after(before, tools=[offer(name) for name in tools[half:]]))
    functions = {name: names.function(name) for name in tools}
    assert all(re.fullmatch(FUNCTION_NAME, function) for function in functions.values())
    assert len(set(functions.values())) == len(functions)
    assert all(names.tool(function) == name for name, function in functions.items())


history_messages = st.builds(
    HistoryMessage,
    role=st.sampled_from(Role),
    content=st.sampled_from(["", "a", "b"]),
    call_id=st.sampled_from([None, "i", "j", "k"]),
) | st.builds(
    asked,
    st.sampled_from(["", "a"]),
    st.sampled_from("ijk").map(call),
)


@given(st.lists(history_messages, max_size=12))
def test_any_history_is_well_formed(history: list[HistoryMessage]) -> None:
    """What the API asks for: each call answered at once and once, ids unique, nothing without a use."""
    seen: set[str] = set()
    due: list[str] = []
    last = None
    for message in said(*history):
        if message["role"] == "tool":
            assert message["tool_call_id"] == due.pop(0)
            last = "tool"
            continue
        assert due == []
        assert message["role"] != last
        assert message["content"] or message.get("tool_calls")
        due = [made["id"] for made in message.get("tool_calls", [])]
        assert not seen.intersection(due)
        assert len(set(due)) == len(due)
        seen.update(due)
        last = message["role"]
    assert due == []
