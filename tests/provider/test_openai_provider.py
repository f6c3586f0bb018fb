"""The openai provider against a server that plays recorded streams, byte for byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asking import KEY, ask, collect, reasons, written
from fake_chat import DONE, FakeChat, Play, chunk, data, listing, problem, text, usage
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.message import Usage
from contextd.provider import (
    FatalError,
    Finished,
    TextDelta,
    ThinkingDelta,
    TransientError,
    UsageReport,
)
from contextd.provider import openai as openai_module
from contextd.provider.chat_answer import Answer
from contextd.provider.openai import OpenAIProvider
from contextd.settings import SettingsError


async def test_streams_an_answer(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Text as it comes, then usage, then the model's word for why it stopped."""
    role, empty = chunk(role="assistant", content=""), chunk(content=None)
    body = [
        role,
        chunk(content="Hel"),
        empty,
        chunk(content="lo"),
        chunk("stop"),
        usage(3, 2),
        DONE,
    ]
    chat.play(Play(body))
    assert await collect(openai.stream(ask())) == [
        TextDelta("Hel"),
        TextDelta("lo"),
        UsageReport(Usage(prompt_tokens=3, completion_tokens=2)),
        Finished("stop"),
    ]


async def test_asks_as_the_api_wants_it(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Model, messages, streaming with usage, and the key as bearer token."""
    chat.play(text("ok"))
    await collect(openai.stream(ask("Hello", system_prompt="Be brief.")))
    assert chat.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert chat.bodies == [
        {
            "model": "some-model",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_a_stream_may_be_cut_anywhere(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Where the network cuts the bytes, through a character or not, says nothing."""
    content = {"choices": [{"index": 0, "delta": {"content": "é\u2028😀"}}]}
    raw = b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\r\n\r\n"
    stream = b": keep-alive\n\n" + raw + b"id: 1\nevent: ping\n\n" + chunk("stop") + DONE
    chat.play(Play([bytes([byte]) for byte in stream]))
    assert written(await collect(openai.stream(ask()))) == ["é\u2028😀"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_becomes_thinking(
    chat: FakeChat, openai: OpenAIProvider, field: str
) -> None:
    """Under either name that servers use."""
    body = [chunk(**{field: "hm "}), chunk(**{field: "so"}, content=""), chunk(content="42")]
    chat.play(Play([*body, chunk("stop"), DONE]))
    events = await collect(openai.stream(ask()))
    assert events[:3] == [ThinkingDelta("hm "), ThinkingDelta("so"), TextDelta("42")]


async def test_reasoning_under_both_names_is_said_once(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Some servers send it twice; what is not text is not for us."""
    twice = chunk(reasoning="hm", reasoning_content="hm")
    chat.play(Play([twice, chunk(reasoning={"effort": "high"}), chunk("stop"), DONE]))
    assert await collect(openai.stream(ask())) == [ThinkingDelta("hm"), Finished("stop")]


async def test_a_refusal_is_the_answer(chat: FakeChat, openai: OpenAIProvider) -> None:
    """What the model says instead of an answer is text too."""
    chat.play(Play([chunk(refusal="I won't."), chunk("stop"), DONE]))
    assert written(await collect(openai.stream(ask()))) == ["I won't."]


async def test_usage_may_come_with_a_choice(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Some servers count along; the last count is reported, once."""
    choice = {"index": 0, "delta": {"content": "a"}}
    counts = [
        {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": n}} for n in (1, 2)
    ]
    chat.play(Play([*map(data, counts), chunk("stop"), DONE]))
    events = await collect(openai.stream(ask()))
    reports = [event for event in events if isinstance(event, UsageReport)]
    assert reports == [UsageReport(Usage(prompt_tokens=1, completion_tokens=2))]


@pytest.mark.parametrize("counted", ["many", {"prompt_tokens": -1, "completion_tokens": 1.5}])
async def test_odd_usage_loses_no_answer(
    chat: FakeChat, openai: OpenAIProvider, counted: Any
) -> None:
    """Counts that are none are taken as 0."""
    chat.play(Play([chunk("length", content="a"), data({"choices": [], "usage": counted}), DONE]))
    events = await collect(openai.stream(ask()))
    assert written(events) == ["a"]
    assert reasons(events) == ["length"]
    assert all(event.usage == Usage() for event in events if isinstance(event, UsageReport))


async def test_a_server_that_says_done_needs_no_reason(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """`[DONE]` is an end, too."""
    chat.play(Play([chunk(content="a"), DONE]))
    assert await collect(openai.stream(ask())) == [TextDelta("a"), Finished("stop")]


@pytest.mark.parametrize("then", ["end", "cut"])
async def test_a_reason_is_an_end(chat: FakeChat, openai: OpenAIProvider, then: Any) -> None:
    """Once the model has said why it stopped, a missing `[DONE]` costs nothing."""
    chat.play(Play([chunk(content="a"), chunk("length")], then=then))
    assert await collect(openai.stream(ask())) == [TextDelta("a"), Finished("length", whole=False)]


async def test_a_stream_left_open_after_the_last_word_is_not_waited_for(
    chat: FakeChat, openai: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete answer does not end in a time-out because its server forgets to hang up."""
    monkeypatch.setattr(openai_module, "AFTER_LAST_WORD_S", 0.01)
    chat.play(Play([chunk(content="a"), chunk("stop")], then="hang"))
    events = await asyncio.wait_for(collect(openai.stream(ask())), 5)
    assert events == [TextDelta("a"), Finished("stop")]
    await asyncio.wait_for(chat.left.wait(), 5)


async def test_split_surrogate_pairs_are_joined(chat: FakeChat, openai: OpenAIProvider) -> None:
    """A pair cut by the escapes of two deltas is one character, held until it is whole."""
    halves = (
        b'{"choices":[{"delta":{"content":"a\\ud83d"}}]}',
        b'{"choices":[{"delta":{"content":"\\ude00b"}}]}',
    )
    chat.play(Play([*(b"data: " + half + b"\n\n" for half in halves), chunk("stop"), DONE]))
    assert written(await collect(openai.stream(ask()))) == ["a", "😀b"]


async def test_what_cannot_be_stored_is_replaced(chat: FakeChat, openai: OpenAIProvider) -> None:
    """U+0000 and a half without its other become U+FFFD, at the end of the stream too."""
    body = [chunk(content="a\0b"), chunk(content="\udc00x"), chunk(content="\ud83d")]
    chat.play(Play([*body, chunk(reasoning="\ud83d"), chunk("st\0p"), DONE]))
    assert await collect(openai.stream(ask())) == [
        TextDelta("a\ufffdb"),
        TextDelta("\ufffdx"),
        ThinkingDelta("\ufffd"),
        TextDelta("\ufffd"),
        Finished("st\ufffdp", whole=False),
    ]


@given(st.text(st.characters(exclude_categories=()), min_size=1), st.data())
def test_any_text_in_any_pieces_can_be_stored(content: str, draw: st.DataObject) -> None:
    """Cut between any two UTF-16 units, it is what it would have been in one piece."""
    encoded = content.encode("utf-16-le", "surrogatepass")
    units = [
        encoded[at : at + 2].decode("utf-16-le", "surrogatepass")
        for at in range(0, len(encoded), 2)
    ]
    cuts = draw.draw(st.lists(st.booleans(), min_size=len(units), max_size=len(units)))
    pieces = [""]
    for unit, cut in zip(units, cuts, strict=True):
        if cut:
            pieces.append("")
        pieces[-1] += unit
    answer = Answer()
    events = [
        e for piece in pieces for e in answer.read({"choices": [{"delta": {"content": piece}}]})
    ]
    events += answer.end(done=True)
    assert all(written(events))
    expected = encoded.decode("utf-16-le", "replace").replace("\0", "\ufffd")
    expected = "" if expected.isspace() else expected  # white space alone is no message
    assert "".join(written(events)) == expected


async def test_only_the_first_choice_is_read(chat: FakeChat, openai: OpenAIProvider) -> None:
    """One answer was asked for; servers that give more do not mix them into it."""
    other = data(
        {"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "stop"}]}
    )
    chat.play(Play([chunk(content="a"), other, chunk("length"), DONE]))
    assert await collect(openai.stream(ask())) == [TextDelta("a"), Finished("length", whole=False)]


async def test_odd_but_harmless_chunks_are_read(chat: FakeChat, openai: OpenAIProvider) -> None:
    """Nulls where objects belong, and chunks without choices."""
    odd = [{}, {"choices": None}, {"choices": [{"delta": None}]}, {"choices": [], "usage": None}]
    chat.play(Play([*map(data, odd), chunk("stop", content="a"), DONE]))
    assert await collect(openai.stream(ask())) == [TextDelta("a"), Finished("stop")]


@pytest.mark.parametrize("status", [400, 422])
async def test_stream_options_are_left_out_where_they_are_refused(
    chat: FakeChat, openai: OpenAIProvider, status: int
) -> None:
    """Once asked without, the server is not asked with them again."""
    chat.play(problem(status, "Unknown field"), text("a"), text("b"))
    assert written(await collect(openai.stream(ask()))) == ["a"]
    assert written(await collect(openai.stream(ask()))) == ["b"]
    assert ["stream_options" in body for body in chat.bodies] == [True, False, False]


async def test_a_request_refused_for_itself_is_not_the_options_fault(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Refused either way, the options are tried again next time, and the usage is not lost."""
    chat.play(
        problem(400, "too long"), problem(400, "too long"), text("a"), problem(400, "too long")
    )
    with pytest.raises(FatalError):
        await collect(openai.stream(ask()))
    assert written(await collect(openai.stream(ask()))) == ["a"]
    with pytest.raises(
        FatalError, match="too long"
    ):  # the server has taken them: no second request
        await collect(openai.stream(ask()))
    assert ["stream_options" in body for body in chat.bodies] == [True, False, True, True]


async def test_aclose_closes_the_connection(chat: FakeChat, openai: OpenAIProvider) -> None:
    """The server sees its reader go when the iterator is closed in the middle (§6)."""
    chat.play(Play([chunk(content="a")], then="repeat"))
    stream = openai.stream(ask())
    assert await anext(stream) == TextDelta("a")
    assert not chat.left.is_set()
    await stream.aclose()
    await asyncio.wait_for(chat.left.wait(), 5)


@pytest.mark.parametrize("body", [[], [chunk(content="a")]])
async def test_a_cancelled_reader_closes_the_connection(
    chat: FakeChat, openai: OpenAIProvider, body: list[bytes]
) -> None:
    """Also while it waits for a server that says nothing (§6)."""
    chat.play(Play(body, then="hang"))
    waiting = asyncio.Event()

    async def read() -> None:
        stream = openai.stream(ask())
        for _ in body:
            await anext(stream)
        waiting.set()
        await anext(stream)

    reader = asyncio.create_task(read())
    await waiting.wait()
    await chat.asked.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(chat.left.wait(), 5)


@pytest.fixture
async def local(chat: FakeChat) -> AsyncIterator[OpenAIProvider]:
    """The provider on a server of one's own: no key, no model."""
    provider = OpenAIProvider(base_url=chat.url, api_key=None, model=None, timeout_s=10)
    yield provider
    await provider.aclose()


async def test_a_local_server_needs_neither_key_nor_model(
    chat: FakeChat, local: OpenAIProvider
) -> None:
    """The server is asked once for its models, also by two at the same time, and has the first."""
    chat.models = listing("first.gguf", "second.gguf")
    chat.play(text("a"), text("a"), text("a"))
    nameless = ask(model=None)
    await asyncio.gather(collect(local.stream(nameless)), collect(local.stream(nameless)))
    await collect(local.stream(nameless))
    assert [body["model"] for body in chat.bodies] == ["first.gguf"] * 3
    assert [asked.path for asked in chat.requests].count("/v1/models") == 1


async def test_a_key_of_the_environment_is_not_sent(
    chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was meant for another server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    provider = OpenAIProvider(base_url=chat.url, api_key=None, model="m", timeout_s=10)
    chat.play(text("a"))
    await collect(provider.stream(ask()))
    await provider.aclose()
    assert KEY not in str(chat.requests[0].headers)


async def test_the_requests_model_comes_first(chat: FakeChat) -> None:
    """The context's, then the provider's own."""
    provider = OpenAIProvider(base_url=chat.url, api_key=None, model="default", timeout_s=10)
    chat.play(text("a"), text("a"))
    await collect(provider.stream(ask(model="mine")))
    await collect(provider.stream(ask(model=None)))
    await provider.aclose()
    assert [body["model"] for body in chat.bodies] == ["mine", "default"]


@pytest.mark.parametrize(
    "models", [listing(), problem(404, "?"), Play([b"<html>"], 200, {"content-type": "text/html"})]
)
async def test_without_any_model_the_setting_is_named(
    chat: FakeChat, local: OpenAIProvider, models: Play
) -> None:
    """A server without a list of models cannot be guessed for."""
    chat.models = models
    with pytest.raises(FatalError, match="CONTEXTD_MODEL") as caught:
        await collect(local.stream(ask(model=None)))
    assert caught.value.type == "no_model"


async def test_a_server_that_is_down_is_no_missing_model(
    chat: FakeChat, local: OpenAIProvider
) -> None:
    """Asking for the models fails as any request does, and is asked again next time."""
    chat.models = problem(503, "loading")
    with pytest.raises(TransientError):
        await collect(local.stream(ask(model=None)))
    chat.models = listing("first.gguf")
    chat.play(text("a"))
    assert written(await collect(local.stream(ask(model=None)))) == ["a"]


async def test_a_model_that_is_gone_is_asked_for_again(
    chat: FakeChat, local: OpenAIProvider
) -> None:
    """A local server may be started anew with another model."""
    chat.models = listing("old")
    chat.play(problem(404, "no such model"), text("a"))
    with pytest.raises(FatalError):
        await collect(local.stream(ask(model=None)))
    chat.models = listing("new")
    await collect(local.stream(ask(model=None)))
    assert [body["model"] for body in chat.bodies] == ["old", "new"]


async def test_openais_own_server_needs_a_model_and_a_key() -> None:
    """Both are said before anything is sent."""
    keyless = OpenAIProvider(base_url=None, api_key=None, model="m", timeout_s=1)
    with pytest.raises(FatalError, match="CONTEXTD_OPENAI_API_KEY") as caught:
        await collect(keyless.stream(ask()))
    assert caught.value.type == "provider_auth"
    nameless = OpenAIProvider(base_url=None, api_key=KEY, model=None, timeout_s=1)
    with pytest.raises(FatalError, match="CONTEXTD_MODEL") as caught:
        await collect(nameless.stream(ask(model=None)))
    assert caught.value.type == "no_model"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8080/v1",
        "ftp://h/v1",
        "http://",
        "http://h:x/",
        "//h",
        "http://h\n/v1",
        "http://h\x7f/v1",
    ],
)
def test_a_wrong_url_is_refused_at_once(url: str) -> None:
    """By the name of its setting."""
    with pytest.raises(SettingsError, match="CONTEXTD_OPENAI_BASE_URL"):
        OpenAIProvider(base_url=url, api_key=None, model=None, timeout_s=1)


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-sécret"])
def test_a_key_that_no_header_can_hold_is_refused_at_once(key: str) -> None:
    """By the name of its setting, and without a word of it."""
    with pytest.raises(SettingsError, match="CONTEXTD_OPENAI_API_KEY") as caught:
        OpenAIProvider(base_url=None, api_key=key, model=None, timeout_s=1)
    assert "cret" not in str(caught.value)


async def test_white_space_around_a_key_is_no_part_of_it(chat: FakeChat) -> None:
    """A key read from a file ends in a line break."""
    provider = OpenAIProvider(base_url=chat.url, api_key=f" {KEY}\n", model="m", timeout_s=10)
    chat.play(text("a"))
    await collect(provider.stream(ask()))
    await provider.aclose()
    assert chat.requests[0].headers["authorization"] == f"Bearer {KEY}"
