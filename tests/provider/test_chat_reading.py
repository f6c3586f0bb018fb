"""The reader of an answer by itself: its forms, its bounds, and what an error says."""

import email.utils
import json
import time
from typing import Any

import msgspec
import pytest
from asking import ask, ask_after, asked, call, collect, offer, result, user, written
from fake_chat import FakeChat, Play, chunk
from test_chat_corpus import MODEL, read

from contextd.core.message import Role
from contextd.provider import (
    FatalError,
    HistoryCall,
    HistoryMessage,
    InputTooLongError,
    ThinkingDelta,
    ToolCallFacts,
    TransientError,
)
from contextd.provider.chat_answer import KEPT_CHARS_MAX, Answer
from contextd.provider.chat_arguments import Arguments
from contextd.provider.chat_chunk import KEPT_NAMES_MAX
from contextd.provider.chat_errors import RETRY_AFTER_S_MAX, Refusal, failure, words_of
from contextd.provider.chat_request import FunctionNames, attach, messages, tools
from contextd.provider.chat_stream import EVENT_BYTES_MAX, PayloadReader
from contextd.provider.openai import OpenAIProvider


def values(*pieces: bytes) -> list[object]:
    reader = PayloadReader()
    return [value for piece in pieces for value in reader.feed(piece)] + list(reader.end())


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_any_way(end: bytes) -> None:
    """An event of several lines too, and wherever it is cut."""
    raw = b'data: {"a":' + end + b"data: 1}" + end + end + b'data: {"b":2}' + end + end
    assert values(raw) == [{"a": 1}, {"b": 2}]
    assert values(*(raw[at : at + 1] for at in range(len(raw)))) == [{"a": 1}, {"b": 2}]


def test_nothing_is_read_after_done() -> None:
    """Also where it comes with the same bytes."""
    assert values(b'data: {"a":1}\n\ndata: [DONE]\n\n', b"") == [{"a": 1}]
    reader = PayloadReader()
    assert list(reader.feed(b"data: [DONE]\n\ndata: {}\n\n")) == []
    assert reader.done


def test_an_event_is_bounded() -> None:
    """However many lines it has."""
    line = b"data: " + b"x" * (EVENT_BYTES_MAX // 4) + b"\n"
    with pytest.raises(ValueError, match="larger than"):
        values(*[line] * 5)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_what_is_nested_too_deeply_is_no_value(text: str) -> None:
    """It ends in a named error."""
    got = read([f"data: {text}\n\n".encode()])
    assert got.error is not None
    assert got.error.type == "invalid_stream"


def test_a_number_of_many_digits_costs_its_field() -> None:
    """The answer goes on."""
    raw = '{"created":%s,"choices":[{"delta":{"content":"Yes"},"finish_reason":"stop"}]}'
    got = read([f"data: {raw % ('9' * 10_000)}\n\n".encode()])
    assert got.says() == [["text", "Yes"]]


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


def attached(*payloads: dict[str, Any]) -> dict[str, Any]:
    """What goes back with the one call that follows `payloads`."""
    answer = Answer()
    for payload in payloads:
        list(answer.read(payload))
    called = delta(tool_calls=[{"id": "c", "function": {"name": "a", "arguments": "{}"}}])
    events = [*answer.read(called), *answer.end(done=True)]
    found = [event.attached for event in events if isinstance(event, ToolCallFacts)]
    return found[0] if found else {}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", ["x" * KEPT_CHARS_MAX, nested(900)])
def test_what_is_to_go_back_is_bounded(value: Any) -> None:
    """What is too large or nested too deeply is lost, and the answer is not."""
    assert not attached(delta(extra_content={"a": value}))


def test_pieces_of_what_goes_back_are_bounded() -> None:
    """Each costs only itself."""
    piece = delta(reasoning_details=[{"type": "reasoning.text", "text": "abcd"}])
    assert attached(*[piece] * 1000) == {
        "answer": {"reasoning_details": [{"type": "reasoning.text", "text": "abcd" * 1000}]}
    }
    items = [{"type": str(number)} for number in range(KEPT_CHARS_MAX + 1)]
    assert not attached(delta(reasoning_details=items))


def test_names_of_what_goes_back_are_bounded() -> None:
    """Of the answer and of a call."""
    many = [{f"field_{number}": 1} for number in range(KEPT_NAMES_MAX + 1)]
    assert not attached(*[delta(extra_content=one) for one in many])
    call_ = {"id": "c", "function": {"name": "a"}}
    assert not attached(*[delta(tool_calls=[{**call_, **one}]) for one in many])


def test_halves_of_surrogate_pairs_can_go_back() -> None:
    """In names and in values."""
    kept = attached(delta(extra_content={"\ud800": "\udc00\0"}))
    assert kept == {"answer": {"extra_content": {"\ufffd": "\ufffd\ufffd"}}}


def test_thinking_is_no_text_however_it_comes() -> None:
    """As details alone too."""
    answer = Answer()
    details = [{"type": "reasoning.summary", "summary": "So"}]
    assert list(answer.read(delta(reasoning_details=details))) == [ThinkingDelta("So")]


def said(*pieces: str) -> str:
    made = Arguments()
    text = ""
    for piece in pieces:
        made.add(piece)
        text += made.take()
    made.finish()
    return text + made.rest()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (['{"a":1}'], '{"a":1}'),
        (["{}", '{"a":1}'], '{"a":1}'),
        (['{"a":1}', "{}"], '{"a":1}{}'),
        (["{}", '{"a":1}', '{"a":1}'], '{"a":1}'),
        (['{"a":1}', '{"a": 1}'], '{"a":1}'),
        (['"{\\"a\\":1}"'], '{"a":1}'),
        (['{"a":1}', '"{\\"a\\":1}"'], '{"a":1}'),
        (['{"a":1}', '{"a":2}'], '{"a":1}{"a":2}'),
        (['{"a":1}', '{"a":true}'], '{"a":1}{"a":true}'),
        (['{"a":'], '{"a":'),
        (["{}", "{}"], "{}"),
        (['"x"'], '"x"'),
        (["[" * 5000], "[" * 5000),
        (['{"a":' + "9" * 5000 + "}"], '{"a":' + "9" * 5000 + "}"),
    ],
)
def test_arguments(pieces: list[str], expected: str) -> None:
    """One object, or what stands there: it is not made into what nobody wrote."""
    assert said(*pieces) == said(*"".join(pieces)) == expected


def test_arguments_of_any_depth_are_said() -> None:
    """Also where reading them is just possible, and comparing them is not. Who runs them refuses them."""
    for depth in range(900, 1000):
        text = '{"a":' + "[" * depth + "]" * depth + "}"
        assert said(text, text).startswith(text)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"error":{"message":"a"}}', "a"),
        ('{"error":"a"}', "a"),
        ('[{"error":{"message":"a"}}]', "a"),
        ('{"message":"a"}', "a"),
        ('{"detail":"a"}', "a"),
        ('{"detail":[{"msg":"a"},{"msg":"b"}]}', "a; b"),
        ('{"errors":[{"message":"a"}]}', "a"),
        ('{"error":{"message":"{\\"error\\":{\\"message\\":\\"a\\"}}"}}', "a"),
        ("a", "a"),
        ("<html>a</html>", ""),
        ("<Error><Message>a</Message></Error>", "a"),
        ("null", ""),
        ("[" * 100_000, "[" * 100_000),
        ("{" + '"error":{' * 50, "{" + '"error":{' * 50),
        (7, ""),
    ],
)
def test_words(body: object, expected: str) -> None:
    """What a person should read, in whatever form."""
    assert words_of(body) == expected


def refused(
    message: str, *, status: int = 429, headers: dict[str, str] | None = None, **more: Any
) -> Any:
    body = json.dumps({"error": {"message": message, **more}})
    return failure(Refusal(status=status, body=body, headers=headers or {}), message)


@pytest.mark.parametrize(
    ("words", "expected_s"),
    [
        ("Please try again in 1.5s.", 1.5),
        ("Please try again in 20ms.", 0.02),
        ("Please try again in 2m3s.", 123),
        ("Please try again in 1h2m3s.", RETRY_AFTER_S_MAX),
        ("Please retry after 12 seconds.", 12),
        ("Retry in 2 minutes", 120),
        ("Try again in a while", None),
        ("Try again in " + "9" * 5000 + "h", None),
    ],
)
def test_when_to_try_again_by_the_words(words: str, expected_s: float | None) -> None:
    """Where no header says it."""
    assert refused(words).retry_after_s == expected_s


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "1500", "retry-after": "3"}, 1.5),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, 0),
        ({"retry-after": "9" * 5000}, RETRY_AFTER_S_MAX),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_when_to_try_again_by_the_headers(
    headers: dict[str, str], expected_s: float | None
) -> None:
    """Seconds, milliseconds, or a date."""
    assert refused("Slow down", headers=headers).retry_after_s == expected_s


def test_when_to_try_again_by_a_date_to_come() -> None:
    """It counts from now."""
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 50 < refused("Slow down", headers={"retry-after": date}).retry_after_s <= 100


@pytest.mark.parametrize(
    ("words", "tokens_max"),
    [
        ("This model's maximum prompt length is 131072 but the request contains 150000.", 131072),
        ("`inputs` tokens + `max_new_tokens` must be <= 4097. Given: 5000", 4097),
        ("Input tokens exceed the configured limit of 272,000 tokens.", 272000),
        ("maximum context length is " + "9" * 5000, None),
    ],
)
def test_an_input_that_is_too_long(words: str, tokens_max: int | None) -> None:
    """The limit is read where there is one. The corpus has the words of each server."""
    error = refused(words, status=400)
    assert isinstance(error, InputTooLongError)
    assert error.tokens_max == tokens_max


@pytest.mark.parametrize("status", [401, 403, 404])
def test_words_of_a_limit_do_not_hide_another_error(status: int) -> None:
    """The status says more."""
    assert not isinstance(refused("maximum context length", status=status), InputTooLongError)


@pytest.mark.parametrize(
    ("status", "words", "more"),
    [
        (402, "Pay", {}),
        (429, "x", {"code": "insufficient_quota"}),
        (429, "x", {"type": "exceeded_current_quota_error"}),
        (403, "Your credit balance is too low", {}),
        (400, "x", {"type": "budget_exceeded"}),
    ],
)
def test_a_spent_quota_is_fatal(status: int, words: str, more: dict[str, Any]) -> None:
    """Another try costs the user time, and helps nobody."""
    error = refused(words, status=status, **more)
    assert isinstance(error, FatalError)
    assert error.type == "provider_quota"


def test_a_quota_that_passes_is_transient() -> None:
    """Where the server says when."""
    assert isinstance(refused("Quota exhausted", headers={"retry-after": "3"}), TransientError)


def sent(*history: HistoryMessage, model: str = MODEL, system: str | None = None) -> list[Any]:
    request = msgspec.structs.replace(ask_after(*history), system_prompt=system)
    return messages(request, FunctionNames(request), model)


def test_system_messages_stand_at_the_start() -> None:
    """In one."""
    late = HistoryMessage(role=Role.SYSTEM, content="Late")
    assert [
        (one["role"], one["content"]) for one in sent(user("a"), late, user("b"), system="S")
    ] == [
        ("system", "S\n\nLate"),
        ("user", "a\n\nb"),
    ]


def test_a_user_speaks_first() -> None:
    """Also before calls, and behind the system message."""
    roles = [one["role"] for one in sent(asked("", call("i")), result("i", "x"), system="S")]
    assert roles == ["system", "user", "assistant", "tool"]


def test_tools_are_declared_while_calls_are_shown() -> None:
    """None of them may be called, where none is on offer."""
    request = ask_after(user("a"), asked("", call("i", "old")), result("i", "x"))
    members = tools(request, FunctionNames(request))
    assert members["tool_choice"] == "none"
    assert [tool["function"]["name"] for tool in members["tools"]] == ["old"]
    assert "tool_choice" not in tools(
        ask(tools=[offer("a")]), FunctionNames(ask(tools=[offer("a")]))
    )


@pytest.mark.parametrize(("model", "goes_back"), [(MODEL, True), ("another", False)])
def test_what_was_attached_goes_back_to_its_model_alone(model: str, goes_back: bool) -> None:
    """The call's own, the answer's, and the reasoning under the name that it came with."""
    kept = {
        "call": {"extra": 1},
        "answer": {"thinking_blocks": [2], "reasoning_field": "reasoning"},
    }
    made = HistoryCall(id="i", name="a", arguments="{}", attached=attach(kept, MODEL))
    answer = HistoryMessage(role=Role.ASSISTANT, content="", thinking="So", calls=[made])
    told = sent(user("a"), answer, result("i", "x"), model=model)[1]
    assert ("extra" in told["tool_calls"][0]) is goes_back
    assert (told.get("thinking_blocks"), told.get("reasoning")) == (
        ([2], "So") if goes_back else (None, None)
    )


async def test_what_comes_before_a_broken_end_is_said(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Also where all of it comes in one piece."""
    chat.play(Play([chunk(content="Yes") + chunk("stop") + b"data: {broken\n\n"]))
    assert written(await collect(openai.stream(ask()))) == ["Yes"]
