"""A call of a tool has one outcome, whatever the tool does (§8)."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, tzinfo
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from contextd.core.text import storable
from contextd.core.values import JsonObject
from contextd.tools import Outcome, Tool, ToolError, execution
from contextd.tools.execution import NOTHING, execute
from contextd.tools.text import clip, one_line
from contextd.tools.threads import Threads, ThreadsExhaustedError

LONG_S = 60.0
SHORT_S = 0.02
ROOM_BYTES = 10_000


def of(run: Callable[[JsonObject], Awaitable[object]]) -> Tool:
    return Tool(name="t", description="", parameters={"type": "object"}, run=run)


def returning(value: object) -> Tool:
    async def run(_arguments: JsonObject) -> object:
        return value

    return of(run)


def raising(error: BaseException) -> Tool:
    async def run(_arguments: JsonObject) -> object:
        raise error

    return of(run)


async def outcome(
    tool: Tool, *, timeout_s: float = LONG_S, bytes_max: int = ROOM_BYTES, **arguments: Any
) -> Outcome:
    return await execute(tool, arguments, timeout_s=timeout_s, result_bytes_max=bytes_max)


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the loop is told of errors that nobody took."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, about: found.append(about))
    return found


class Row(msgspec.Struct):
    """A value of a type of its own."""

    x: int


class Odd(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no")


class Fatal(Exception):
    """What it says would end the process."""

    def __str__(self) -> str:
        raise SystemExit(3)


class Nowhere(tzinfo):
    """A zone that cannot be told, and a word that is nobody's business."""

    def utcoffset(self, when: datetime | None) -> timedelta:
        raise SystemExit("secret")

    def tzname(self, when: datetime | None) -> str:
        return "nowhere"

    def dst(self, when: datetime | None) -> timedelta:
        return timedelta()


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        ("", NOTHING),
        (None, NOTHING),
        (b"", NOTHING),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        (bytearray(b"ab"), "ab"),
        (memoryview(b"ab"), "ab"),
        ("a\x00b", "a\ufffdb"),
        (b"a\x00b", "a\ufffdb"),
        ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),
        (3, "3"),
        (0, "0"),
        (False, "false"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ([Row(1)], '[{"x":1}]'),
        ({"a": "\ud83d\ude00\ud83d"}, '{"a":"\U0001f600\ufffd"}'),
        (["\x00"], '["\\u0000"]'),
        (float("nan"), "null"),
    ],
)
async def test_every_answer_becomes_text_that_can_be_stored(value: object, content: str) -> None:
    """Text as it is, bytes as UTF-8, anything else as JSON; nothing at all is said in words."""
    assert await outcome(returning(value)) == Outcome(status="succeeded", content=content)


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


async def test_an_answer_that_cannot_be_told_is_a_failure_too() -> None:
    """What makes it JSON may run the tool's code, which may raise anything."""
    with capture_logs() as logs:
        ended = await outcome(returning(datetime(2020, 1, 1, tzinfo=Nowhere())))
    assert (ended.status, ended.error) == ("failed", "invalid_result")
    assert "secret" not in ended.content
    assert "secret" not in repr(logs)


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, endless()])
async def test_an_answer_without_json_is_a_failure_that_says_so(value: object) -> None:
    """It ran, so that is said too."""
    ended = await outcome(returning(value))
    assert (ended.status, ended.error) == ("failed", "invalid_result")
    assert f"The tool ran, but its answer, of type {type(value).__name__}" in ended.content


@pytest.mark.parametrize("value", ["é" * 25_000_000, b"\xe2\x82\xac" * 17_000_000, ["é"] * 999_999])
async def test_a_huge_answer_is_cut_on_a_character_and_says_so(value: object) -> None:
    """Fifty megabytes come back as what there is room for."""
    ended = await outcome(returning(value), bytes_max=1001)
    assert ended.status == "succeeded"
    assert 990 <= len(ended.content.encode()) <= 1001
    assert ended.content.endswith("[Cut here: a result may have 1001 bytes.]")
    assert "\ufffd" not in ended.content


@given(st.text(), st.integers(min_value=1, max_value=40), st.text(alphabet="no😀é", max_size=9))
def test_clipped_text_fits_and_is_a_beginning(text: str, bytes_max: int, note: str) -> None:
    """What fits is whole. What does not ends with the note, and never within a character."""
    clipped = clip(text, bytes_max, note)
    assert len(clipped.encode()) <= bytes_max
    whole = storable(text)
    if len(whole.encode()) <= bytes_max:
        assert clipped == whole
    elif len(f"\n{note}".encode()) <= bytes_max:
        assert clipped.endswith(f"\n{note}")
        assert whole.startswith(clipped.removesuffix(f"\n{note}"))


@given(st.text(), st.integers(min_value=1, max_value=40))
def test_one_line_is_one_line(text: str, chars_max: int) -> None:
    """Short, and without a break."""
    line = one_line(text, chars_max)
    assert len(line) <= chars_max
    assert line.splitlines() in ([line], [])


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (ToolError("No such city."), "No such city."),
        (ToolError(), "The tool could not do it."),
    ],
)
async def test_a_tool_error_is_its_own_words(error: ToolError, content: str) -> None:
    """It is for the model, so nothing is added and nothing is logged."""
    with capture_logs() as logs:
        ended = await outcome(raising(error))
    assert ended == Outcome(status="failed", content=content, error="tool_error")
    assert logs == []


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (ValueError("wrong\nvalue"), "The tool failed: ValueError: wrong value"),
        (KeyError("k"), "The tool failed: KeyError: 'k'"),
        (RuntimeError(), "The tool failed: RuntimeError"),
        (RuntimeError("\x00\ud800"), "The tool failed: RuntimeError: \ufffd\ufffd"),
        (Odd(), "The tool failed: Odd"),
        (Fatal(), "The tool failed: Fatal"),
        (TimeoutError(), "The tool failed: TimeoutError"),
        (SystemExit(2), "The tool failed: SystemExit: 2"),
        (KeyboardInterrupt(), "The tool failed: KeyboardInterrupt"),
        (GeneratorExit(), "The tool failed: GeneratorExit"),
        (asyncio.CancelledError(), "The tool failed: CancelledError"),
        (StopAsyncIteration(), "The tool failed: "),
        (StopIteration(), "The tool failed: "),
    ],
)
async def test_an_exception_is_a_failure_and_never_the_server_s_end(
    error: BaseException, content: str
) -> None:
    """Also one that would end the loop. Its class and message go to the model."""
    ended = await outcome(raising(error))
    assert (ended.status, ended.error) == ("failed", "tool_exception")
    assert ended.content.startswith(content)


async def test_the_log_says_where_and_nothing_of_what() -> None:
    """An exception's message may be chat text, as may the arguments."""

    async def run(arguments: JsonObject) -> object:
        raise ValueError(f"secret {arguments}")

    with capture_logs() as logs:
        ended = await outcome(of(run), word="secret")
    assert "secret" in ended.content
    assert "secret" not in repr(logs)
    assert [(line["tool"], line["exception"]) for line in logs] == [("t", "ValueError")]
    assert logs[0]["frames"][-1].endswith(" run")
    assert __file__ in logs[0]["frames"][-1]


async def test_an_exception_s_words_are_bounded() -> None:
    """A megabyte of message is not sent to the model."""
    ended = await outcome(raising(ValueError("x" * 1_000_000)))
    assert len(ended.content) < 600


@pytest.mark.parametrize(
    "tool", [raising(SystemExit()), raising(ToolError("é" * 999)), returning("é" * 999)]
)
async def test_failures_are_cut_too(tool: Tool) -> None:
    """No content is larger than the limit."""
    assert 0 < len((await outcome(tool, bytes_max=20)).content.encode()) <= 20


async def test_a_tool_that_is_no_coroutine_function_is_a_failure() -> None:
    """A `Tool` made by hand with a plain function is told of, not a crash."""
    ended = await outcome(of(lambda _arguments: "text"))  # type: ignore[arg-type, return-value]
    assert (ended.status, ended.error) == ("failed", "tool_exception")


async def test_time_runs_out_and_the_tool_is_cancelled() -> None:
    """It hears of it, and can clean up."""
    cleaned = asyncio.Event()

    async def run(_arguments: JsonObject) -> object:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        return None

    ended = await outcome(of(run), timeout_s=SHORT_S)
    assert (ended.status, ended.error) == ("timed_out", "timed_out")
    assert "0.02 s" in ended.content
    assert cleaned.is_set()


async def test_a_tool_that_refuses_to_be_cancelled_is_left_behind() -> None:
    """The outcome does not wait for it, and it leaves nothing when it ends after all."""
    let_go = asyncio.Event()

    async def run(_arguments: JsonObject) -> object:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        raise ValueError("too late")

    assert (await outcome(of(run), timeout_s=SHORT_S)).status == "timed_out"
    (left,) = execution._abandoned
    let_go.set()
    await asyncio.wait([left])
    await asyncio.sleep(0)
    assert not execution._abandoned


async def test_no_more_tools_are_left_behind_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that calls are not run, and the model is told; when one ends there is room again."""
    monkeypatch.setattr(execution, "ABANDONED_MAX", 2)
    let_go = asyncio.Event()
    runs: list[int] = []

    async def run(_arguments: JsonObject) -> object:
        runs.append(1)
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        return "free"

    for _ in range(2):
        assert (await outcome(of(run), timeout_s=SHORT_S)).status == "timed_out"
    ended = await outcome(of(run), timeout_s=SHORT_S)
    assert (ended.status, ended.error, len(runs)) == ("failed", "overloaded", 2)
    left = list(execution._abandoned)
    let_go.set()
    await asyncio.wait(left)
    await asyncio.sleep(0)
    assert (await outcome(of(run))).content == "free"


async def test_a_cancelled_caller_stops_the_tool(complaints: list[dict[str, Any]]) -> None:
    """At once, and what the tool raises then is nobody's unretrieved exception."""
    started = asyncio.Event()
    stopped = asyncio.Event()

    async def run(_arguments: JsonObject) -> object:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
            raise ValueError("while it is cancelled")

    call = asyncio.create_task(outcome(of(run)))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert stopped.is_set()
    del call
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_cancelled_caller_does_not_wait_for_a_tool_that_goes_on() -> None:
    """It is through long before the tool is."""
    let_go = asyncio.Event()
    started = asyncio.Event()

    async def run(_arguments: JsonObject) -> object:
        while not let_go.is_set():
            started.set()
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        return None

    call = asyncio.create_task(outcome(of(run)))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    left = list(execution._abandoned)
    assert len(left) == 1
    let_go.set()
    await asyncio.wait(left)


async def test_a_call_that_is_cancelled_before_it_starts_leaves_nothing(
    complaints: list[dict[str, Any]],
) -> None:
    """No coroutine that nobody awaited, no task, no exception."""
    call = asyncio.create_task(outcome(raising(ValueError())))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gc.collect()
    assert complaints == []
    assert not execution._abandoned


async def test_a_function_that_hangs_in_its_thread_holds_up_nobody() -> None:
    """Time runs out for it as for any other, the loop goes on, and its thread is free when it ends."""
    threads = Threads(1)
    let_go = threading.Event()
    hanging = of(lambda _arguments: threads.run(let_go.wait))
    assert (await outcome(hanging, timeout_s=SHORT_S)).status == "timed_out"

    ended = await outcome(of(lambda _arguments: threads.run(lambda: "x")))
    assert (ended.status, ended.error) == ("failed", "overloaded")
    assert "1 others are at work or hang" in ended.content

    let_go.set()
    _join_tool_threads()
    assert (await outcome(of(lambda _arguments: threads.run(lambda: "x")))).content == "x"


def _join_tool_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "tool":
            thread.join(LONG_S)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), OSError("x")]
)
async def test_what_a_thread_raises_is_an_outcome_too(error: BaseException) -> None:
    """Also what would end an interpreter or confuse a coroutine."""

    def function() -> None:
        raise error

    ended = await outcome(of(lambda _arguments: Threads(1).run(function)))
    assert (ended.status, ended.error) == ("failed", "tool_exception")
    assert type(error).__name__ in ended.content


async def test_threads_are_daemons_and_given_back() -> None:
    """None keeps the process alive, and however it ends there is room for the next."""
    threads = Threads(1)
    assert await threads.run(lambda: threading.current_thread().daemon)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)


async def test_more_threads_than_allowed_are_refused_at_once() -> None:
    """They do not queue: a queue behind functions that hang would never move."""
    threads = Threads(2)
    let_go = threading.Event()
    busy = [asyncio.create_task(threads.run(let_go.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ThreadsExhaustedError):
        await threads.run(lambda: None)
    let_go.set()
    assert await asyncio.gather(*busy) == [True, True]


def test_a_thread_that_outlives_its_loop_is_quiet() -> None:
    """Nobody is left to be told."""
    let_go = threading.Event()
    ended: list[threading.ExceptHookArgs] = []
    hook, threading.excepthook = threading.excepthook, ended.append

    async def leave() -> None:
        await outcome(of(lambda _arguments: Threads(1).run(let_go.wait)), timeout_s=SHORT_S)

    try:
        asyncio.run(leave())
        let_go.set()
        _join_tool_threads()
    finally:
        threading.excepthook = hook
    assert ended == []
