"""The scripted provider plays scripts word by word as §13 says."""

import asyncio
import json
import re
import tracemalloc
from contextlib import aclosing
from typing import Any

import pytest
from asking import ask, collect, reasons, written
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.message import Usage
from contextd.provider import (
    Event,
    FatalError,
    Finished,
    TextDelta,
    ThinkingDelta,
    TransientError,
    UsageReport,
)
from contextd.provider.scripted import ScriptedProvider, parse, rounds, words

RATE = 50.0
LATE_S = 0.0007
FAILS_TWICE = {"text": "a "}, {"error": "transient", "times": 2}, {"text": "b"}


class LateTime:
    """A clock of its own. Each sleep wakes up late, as real ones do."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s + LATE_S


def script(*steps: Any) -> str:
    return json.dumps({"script": steps})


async def play(*steps: Any, attempt: int = 1) -> list[Event]:
    return await collect(ScriptedProvider(rate=0).stream(ask(script(*steps), attempt=attempt)))


async def timed(text: str, rate: float = RATE) -> list[float]:
    """When each chunk goes out, in seconds after the first."""
    time = LateTime()
    provider = ScriptedProvider(rate=rate, sleep=time.sleep, clock=time.clock)
    at = [
        time.now_s
        async for event in provider.stream(ask(text))
        if isinstance(event, TextDelta | ThinkingDelta)
    ]
    return [moment - at[0] for moment in at]


async def test_says_a_plain_text_back_a_chunk_a_word() -> None:
    """A chunk is a run of non-space with the white space after it."""
    events = await collect(ScriptedProvider(rate=0).stream(ask("Hello  big\nworld")))
    assert written(events) == ["You ", "said: ", "Hello  ", "big\n", "world"]
    assert events[-1] == Finished("stop")


@given(st.text())
def test_words_join_to_the_text_again(text: str) -> None:
    """Nothing is lost, leading white space included, and each chunk but the first starts a word."""
    chunks = list(words(text))
    assert "".join(chunks) == text
    assert all(chunks)
    assert all(re.fullmatch(r"\S+\s*", chunk) for chunk in chunks[1:])


def test_leading_white_space_goes_with_the_first_word() -> None:
    """A text may start with white space, or hold nothing else."""
    assert list(words("  a b")) == ["  a ", "b"]
    assert list(words(" \n ")) == [" \n "]
    assert list(words("")) == []


async def test_answers_the_last_message_of_the_user() -> None:
    """What came before, and what others said, is no script."""
    request = ask(script({"text": "now"}), history=[("user", script({"text": "before"}))])
    assert written(await collect(ScriptedProvider(rate=0).stream(request))) == ["now"]


@pytest.mark.parametrize(
    "text",
    [
        '{"script": 5}',
        '{"script": {"text": "a"}}',
        '{"other": []}',
        '[{"script": []}]',
        '{"script": [',
        '{"script": [{"rate": NaN}]}',
        '{"script": [{"tool_call": {"name": "a", "arguments": {"x": 1e999}}}]}',
        '{"script":' + "[" * 100_000,
        "{}",
    ],
)
async def test_a_text_that_is_no_script_is_said_back(text: str) -> None:
    """Only a JSON object with a list `script` is one."""
    events = await collect(ScriptedProvider(rate=0).stream(ask(text)))
    assert "".join(written(events)) == f"You said: {text}"


async def test_plays_texts_and_exact_chunks_in_order() -> None:
    """`text` is cut into words, `chunks` are not."""
    events = await play({"text": "one two"}, {"chunks": ["th ree", "\n"]}, {"text": ""})
    assert written(events) == ["one ", "two", "th ree", "\n"]


async def test_repeats_a_chunk() -> None:
    """Exactly n times; 0 times is nothing."""
    events = await play({"repeat": 5000, "text": "ab c"}, {"repeat": 0, "text": "x"})
    assert written(events) == ["ab c"] * 5000


async def test_a_huge_repeat_is_not_built() -> None:
    """Ten million chunks cost no memory before they are asked for."""
    request = ask(script({"repeat": 10_000_000, "text": "x"}))
    tracemalloc.start()
    try:
        async with aclosing(ScriptedProvider(rate=0).stream(request)) as events:
            assert await anext(events) == TextDelta("x")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


async def test_thinks_a_chunk_a_word() -> None:
    """Reasoning is chunked like text."""
    events = await play({"thinking": "let me see"}, {"text": "ok"})
    expected = [ThinkingDelta("let "), ThinkingDelta("me "), ThinkingDelta("see"), TextDelta("ok")]
    assert events[:-1] == expected


async def test_reports_usage() -> None:
    """As the step says."""
    events = await play({"usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    assert events == [
        UsageReport(Usage(prompt_tokens=3, completion_tokens=4)),
        Finished("stop"),
    ]


async def test_an_empty_script_says_nothing_and_ends() -> None:
    """No step, no chunk."""
    assert await play() == [Finished("stop")]


async def test_what_cannot_be_stored_is_replaced() -> None:
    """JSON can escape what no text may hold; pairs stay."""
    text = '{"script": [{"chunks": ["a\\u0000", "\\ud83d", "\\ud83d\\ude00"]}]}'
    events = await collect(ScriptedProvider(rate=0).stream(ask(text)))
    assert written(events) == ["a\ufffd", "\ufffd", "😀"]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", [""]),
        ("tt", ["tt"]),
        ("tcct", ["tcc", "t"]),
        ("c", ["c", ""]),
        ("ctct", ["c", "tc", "t"]),
        ("tctc", ["tc", "tc", ""]),
    ],
)
def test_a_script_is_cut_after_each_run_of_tool_calls(kinds: str, expected: list[str]) -> None:
    """One round for each request to the model; the last one calls nothing."""
    steps = {"t": {"text": "t"}, "c": {"tool_call": {"name": "c", "arguments": {}}}}
    plan = parse(script(*(steps[kind] for kind in kinds)))
    assert rounds(plan) == [parse(script(*(steps[k] for k in round_))) for round_ in expected]


@pytest.mark.parametrize("attempt", [1, 2])
async def test_fails_transiently_in_the_first_attempts(attempt: int) -> None:
    """`times` counts the attempts that break; each says what stands before the error."""
    stream = ScriptedProvider(rate=0).stream(ask(script(*FAILS_TWICE), attempt=attempt))
    assert await anext(stream) == TextDelta("a ")
    with pytest.raises(TransientError) as caught:
        await anext(stream)
    assert caught.value.type == "scripted_error"


async def test_succeeds_after_the_attempts_that_fail() -> None:
    """Each attempt starts the script anew."""
    assert written(await play(*FAILS_TWICE, attempt=3)) == ["a ", "b"]


async def test_fails_transiently_always_without_times() -> None:
    """However often it is tried."""
    with pytest.raises(TransientError):
        await play({"error": "transient"}, attempt=100)


async def test_fails_fatally() -> None:
    """Another try would end the same way."""
    with pytest.raises(FatalError) as caught:
        await play({"error": "fatal"})
    assert caught.value.type == "scripted_error"


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (5, "script[1]:"),
        ({}, "script[1]:"),
        ({"shout": "secret"}, "script[1]:"),
        ({"text": 5}, "script[1].text:"),
        ({"text": "secret", "extra": 1}, "`extra`"),
        ({"text": "secret", "chunks": []}, "`chunks`"),
        ({"chunks": "secret"}, "script[1].chunks:"),
        ({"chunks": ["secret", ""]}, "script[1].chunks[1]:"),
        ({"repeat": 2}, "`text`"),
        ({"repeat": 2, "text": ""}, "script[1].text:"),
        ({"repeat": -1, "text": "secret"}, "script[1].repeat:"),
        ({"repeat": 1.5, "text": "secret"}, "script[1].repeat:"),
        ({"repeat": 10_000_001, "text": "secret"}, "script[1].repeat:"),
        ({"repeat": 10_000_000, "text": "secret" * 100}, "'repeat'"),
        ({"delay_ms": -1}, "script[1].delay_ms:"),
        ({"delay_ms": 10**12}, "script[1].delay_ms:"),
        ({"rate": -0.5}, "script[1].rate:"),
        ({"rate": True}, "script[1].rate:"),
        ({"rate": 10**7}, "script[1].rate:"),
        ({"thinking": None}, "script[1].thinking:"),
        ({"tool_call": {"name": "secret"}}, "`arguments`"),
        ({"tool_call": {"name": "", "arguments": {}}}, "script[1].tool_call.name:"),
        ({"tool_call": {"name": "a", "arguments": "secret"}}, "script[1].tool_call.arguments:"),
        ({"error": "secret"}, "'error'"),
        ({"error": "transient", "times": -1}, "script[1].times:"),
        ({"error": "fatal", "times": 1}, "'times'"),
        ({"usage": {"prompt_tokens": -1}}, "script[1].usage.prompt_tokens:"),
        ({"usage": {"tokens": 1}}, "`tokens`"),
    ],
)
async def test_a_wrong_step_is_named_before_anything_is_written(step: Any, where: str) -> None:
    """Which step, which field, and nothing of what the script would have said."""
    stream = ScriptedProvider(rate=0).stream(ask(script({"text": "fine"}, step)))
    with pytest.raises(FatalError) as caught:
        await anext(stream)
    assert caught.value.type == "invalid_script"
    assert where in caught.value.message
    assert "script[1]" in caught.value.message
    assert "secret" not in caught.value.message


async def test_the_name_of_a_field_cannot_break_the_message() -> None:
    """One line, and short, whatever a field is called."""
    with pytest.raises(FatalError) as caught:
        await play({"text": "a", "x\n" * 1000: 1})
    assert "\n" not in caught.value.message
    assert len(caught.value.message) <= 500


async def test_the_rate_holds_without_drift() -> None:
    """Chunk k goes out k / rate after the first, late by one wake-up and not by k of them."""
    at = await timed(script({"repeat": 500, "text": "x"}))
    assert len(at) == 500
    for index, moment in enumerate(at[1:], 1):
        assert index / RATE - 1e-6 <= moment <= index / RATE + LATE_S + 1e-6


async def test_a_rate_holds_from_its_step_on() -> None:
    """The chunk before it keeps its time; the one after it comes one new interval later."""
    at = await timed(script({"text": "a b"}, {"rate": 4}, {"text": "c d"}))
    assert at == pytest.approx([0, 0.02, 0.27, 0.52], abs=2 * LATE_S)


async def test_rate_0_does_not_wait() -> None:
    """As fast as it can, also in the middle of an answer."""
    at = await timed(
        script({"text": "a "}, {"rate": 0}, {"text": "b c d "}, {"rate": 1}, {"text": "e f"})
    )
    assert at == pytest.approx([0, 0, 0, 0, 0, 1], abs=2 * LATE_S)


async def test_a_delay_is_not_made_up_for() -> None:
    """After it the pacing starts anew, with no burst of what would have been due."""
    at = await timed(script({"text": "a "}, {"delay_ms": 1000}, {"text": "b c"}))
    assert at == pytest.approx([0, 1, 1.02], abs=3 * LATE_S)


async def test_only_chunks_are_paced() -> None:
    """Usage takes no chunk's time."""
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert await timed(script({"text": "a "}, usage, usage, {"text": "b"})) == pytest.approx(
        [0, 0.02], abs=2 * LATE_S
    )


async def test_others_run_while_it_is_as_fast_as_it_can() -> None:
    """The event loop is let go of now and then."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(tick())
    events = await play({"repeat": 2000, "text": "x"})
    other.cancel()
    assert len(written(events)) == 2000
    assert ticks >= 2000 // 256


async def test_is_deterministic() -> None:
    """The same request gives the same events."""
    steps = {"thinking": "a b"}, {"text": "c"}, {"tool_call": {"name": "d", "arguments": {"e": 1}}}
    first, second = await play(*steps), await play(*steps)
    assert first == second
    assert reasons(first) == ["tool_calls"]
