"""The scripted provider calls tools and goes on with its script when they have answered (§13)."""

import json
from typing import Any

import pytest
from asking import (
    TURN_ID,
    answered,
    ask,
    ask_after,
    asked,
    call,
    calls,
    collect,
    pieces,
    reasons,
    result,
    user,
    written,
)
from hypothesis import given
from hypothesis import strategies as st

from contextd.provider import Event, Finished, ModelRequest, TransientError
from contextd.provider.scripted import ScriptedProvider


def script(*steps: Any) -> str:
    return json.dumps({"script": steps})


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_call": {"name": name, "arguments": arguments}}


async def stream(request: ModelRequest) -> list[Event]:
    return await collect(ScriptedProvider(rate=0).stream(request))


async def turn(*steps: Any) -> list[list[Event]]:
    """The answers to all requests of a turn that gives each call a result."""
    request = ask(script(*steps))
    answers = [await stream(request)]
    while made := calls(answers[-1]):
        request = answered(request, answers[-1], ["ok"] * len(made))
        answers.append(await stream(request))
    return answers


async def test_consecutive_tool_calls_make_one_request() -> None:
    """The steps after them answer the results, so the stream ends before these."""
    events = await stream(
        ask(script({"text": "hm"}, calling("a", x=[1]), calling("b"), {"text": "done"}))
    )
    assert [(made.name, made.arguments) for made in calls(events)] == [
        ("a", '{"x":[1]}'),
        ("b", "{}"),
    ]
    assert written(events) == ["hm"]
    assert events[-1] == Finished("tool_calls")


async def test_arguments_come_in_chunks_of_16_characters() -> None:
    """Compact JSON, its characters as they are."""
    events = await stream(ask(script(calling("a", text="é😀" * 10, n=1.5))))
    whole = '{"text":"' + "é😀" * 10 + '","n":1.5}'
    assert [piece.content for piece in pieces(events)] == [whole[:16], whole[16:32], whole[32:]]


async def test_chunks_of_arguments_keep_the_rate() -> None:
    """They can be watched as any chunk can."""
    slept = []

    async def sleep(duration_s: float) -> None:
        slept.append(duration_s)

    provider = ScriptedProvider(rate=50, sleep=sleep, clock=lambda: sum(slept))
    events = await collect(provider.stream(ask(script({"text": "a"}, calling("a", x="y" * 40)))))
    assert len(pieces(events)) == 3
    assert slept == pytest.approx([0.02] * 3)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text("ab"), json_values, max_size=4))
async def test_any_arguments_come_through(arguments: dict[str, Any]) -> None:
    """What the script asks for is what the pieces say."""
    (made,) = calls(await stream(ask(script(calling("a", **arguments)))))
    assert json.loads(made.arguments) == arguments


async def test_a_turn_plays_the_whole_script() -> None:
    """Request by request: each answers the results of the calls before."""
    answers = await turn(
        {"text": "one "},
        calling("a"),
        calling("b"),
        {"thinking": "hm"},
        calling("c"),
        calling("d"),
        {"text": "two"},
    )
    assert [[made.name for made in calls(events)] for events in answers] == [
        ["a", "b"],
        ["c", "d"],
        [],
    ]
    assert [written(events) for events in answers] == [["one "], [], ["two"]]
    assert [reasons(events) for events in answers] == [["tool_calls"], ["tool_calls"], ["stop"]]


async def test_a_script_may_end_with_a_call() -> None:
    """The results are answered with nothing."""
    answers = await turn(calling("a"))
    assert answers[-1] == [Finished("stop")]


async def test_ids_of_tool_calls_name_turn_and_step() -> None:
    """No two of a turn are the same, and each is the same whenever it is asked for."""
    steps = calling("a"), {"text": "x"}, calling("a"), calling("a")
    ids = [made.id for events in await turn(*steps) for made in calls(events)]
    assert ids == [f"call_{TURN_ID}_{step}" for step in (0, 2, 3)]
    again = calls(await stream(ask(script(*steps), attempt=2)))
    assert [made.id for made in again] == ids[:1]


async def test_a_rate_holds_for_the_requests_after_it() -> None:
    """The script is one, however many requests it takes."""
    slept: list[float] = []

    async def sleep(duration_s: float) -> None:
        slept.append(duration_s)

    request = ask(script({"rate": 9}, {"text": ""}, {"rate": 4}, calling("a"), {"text": "x y"}))
    provider = ScriptedProvider(rate=50, sleep=sleep, clock=lambda: sum(slept))
    request = answered(request, await collect(provider.stream(request)), ["ok"])
    assert written(await collect(provider.stream(request))) == ["x ", "y"]
    assert slept == [0.25]


async def test_results_of_turns_before_are_not_counted() -> None:
    """The same script sent again begins at its beginning."""
    text = script(calling("a"), {"text": "done"})
    before = [user(text), asked("", call("call_other_0", "a")), result("call_other_0", "ok")]
    events = await stream(ask_after(*before, asked("done"), user(text)))
    assert [made.name for made in calls(events)] == ["a"]


async def test_a_result_of_no_call_is_not_counted() -> None:
    """Anybody can store a message of role tool."""
    text = script(calling("a"), {"text": "done"})
    events = await stream(ask_after(user(text), result("x", "ok"), result(None, "ok")))
    assert [made.name for made in calls(events)] == ["a"]


@pytest.mark.parametrize("at", [2, 3])
async def test_a_message_stored_while_tools_run_is_no_script(at: int) -> None:
    """The turn goes on with the message that it answers."""
    text = script(calling("a"), {"text": "done"})
    id_ = f"call_{TURN_ID}_0"
    history = [user(text), asked("", call(id_, "a")), result(id_, "ok")]
    history.insert(at, user("by the way"))
    assert written(await stream(ask_after(*history))) == ["done"]


async def test_a_call_without_its_result_is_asked_for_again() -> None:
    """Results that are half there answer nothing."""
    text = script(calling("a"), calling("b"), {"text": "done"})
    a, b = f"call_{TURN_ID}_0", f"call_{TURN_ID}_1"
    events = await stream(ask_after(user(text), asked("", call(a), call(b)), result(a, "ok")))
    assert [made.name for made in calls(events)] == ["a", "b"]


BREAKS = (
    {"text": "a "},
    calling("x"),
    {"text": "b "},
    {"error": "transient", "times": 2},
    {"text": "c"},
)


async def test_an_attempt_plays_anew_only_its_own_request() -> None:
    """What has been answered is not played again; the number of the attempt is the turn's."""
    request = ask(script(*BREAKS))
    first = await stream(request)
    assert written(first) == ["a "]
    for attempt in (1, 2):
        with pytest.raises(TransientError):
            await stream(answered(request, first, ["ok"], attempt=attempt))
    events = await stream(answered(request, first, ["ok"], attempt=3))
    assert written(events) == ["b ", "c"]


async def test_attempts_of_earlier_requests_count() -> None:
    """`times` n is the first n attempts of the turn: what broke before is used up."""
    error = {"error": "transient", "times": 1}
    request = ask(script(error, calling("x"), error, {"text": "c"}))
    with pytest.raises(TransientError):
        await stream(request)
    request = ask(script(error, calling("x"), error, {"text": "c"}), attempt=2)
    first = await stream(request)
    events = await stream(answered(request, first, ["ok"], attempt=2))
    assert written(events) == ["c"]


async def test_a_plain_text_calls_nothing() -> None:
    """Whatever stands before it."""
    request = ask("Hello", history=[("user", script(calling("a"))), ("assistant", "x")])
    events = await stream(request)
    assert "".join(written(events)) == "You said: Hello"
    assert reasons(events) == ["stop"]
