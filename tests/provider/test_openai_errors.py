"""What goes wrong with a model's server, and whether another try may help."""

import asyncio
from typing import Any

import pytest
from asking import KEY, ask, saying
from fake_chat import FakeChat, Play, chunk, data, problem, serving

from contextd.provider import FatalError, ProviderError, TextDelta, TransientError
from contextd.provider.openai import OpenAIProvider


async def failure(openai: OpenAIProvider, *events: Any) -> ProviderError:
    """The error that ends the stream after exactly `events`."""
    stream = saying(openai.stream(ask()))
    for event in events:
        assert await anext(stream) == event
    with pytest.raises(ProviderError) as caught:
        await anext(stream)
    return caught.value


@pytest.mark.parametrize(
    ("status", "error", "type_"),
    [
        (408, TransientError, "provider_timeout"),
        (409, TransientError, "provider_unavailable"),
        (425, TransientError, "provider_unavailable"),
        (429, TransientError, "provider_rate_limited"),
        (500, TransientError, "provider_unavailable"),
        (502, TransientError, "provider_unavailable"),
        (599, TransientError, "provider_unavailable"),
        (401, FatalError, "provider_auth"),
        (403, FatalError, "provider_auth"),
        (404, FatalError, "provider_rejected"),
        (413, FatalError, "provider_rejected"),
        (418, FatalError, "provider_rejected"),
    ],
)
async def test_refusals_by_status(
    chat: FakeChat, openai: OpenAIProvider, status: int, error: type[ProviderError], type_: str
) -> None:
    """The server is asked once: the turn backs off, not the SDK."""
    chat.play(problem(status, "because"))
    caught = await failure(openai)
    assert type(caught) is error
    assert caught.type == type_
    assert caught.message == f"The model's server said HTTP {status}: because"
    assert caught.retry_after_s is None
    assert len(chat.bodies) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m", "type": "t"}}', "The model's server said HTTP 500: m"),
        (b'{"error": "m"}', "The model's server said HTTP 500: m"),
        (b'{"message": "m"}', "The model's server said HTTP 500: m"),
        (b'{"detail": "m"}', "The model's server said HTTP 500: m"),
        (b'{"detail": [{"loc": []}]}', "The model's server said HTTP 500."),
        (b'{"error": {"message": null}}', "The model's server said HTTP 500."),
        (
            b'{"error": {"message": "a\\n\\u0000 b\\ud800"}}',
            "The model's server said HTTP 500: a b",
        ),
        (b"plain\r\nwords", "The model's server said HTTP 500: plain words"),
        (b"<html>Bad gateway</html>", "The model's server said HTTP 500."),
        (b"", "The model's server said HTTP 500."),
        (b"[1]", "The model's server said HTTP 500."),
        (b"null", "The model's server said HTTP 500."),
    ],
)
async def test_the_servers_words_are_passed_on(
    chat: FakeChat, openai: OpenAIProvider, body: bytes, message: str
) -> None:
    """In whatever form the server puts them, on one line."""
    chat.play(Play([body], 500, {"content-type": "application/json"}))
    assert (await failure(openai)).message == message


async def test_a_message_is_short_and_holds_no_key(chat: FakeChat, openai: OpenAIProvider) -> None:
    """A server may quote the key, anywhere in as many words as it likes."""
    chat.play(problem(401, f"bad key {KEY} " + "x" * (500 - 45) + KEY * 100))
    message = (await failure(openai)).message
    assert len(message) == 500
    assert KEY not in message
    assert "sk-" not in message


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("7", 7.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("-3", 0.0),
        ("99999", 3600.0),
        ("inf", 3600.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 9998 23:59:59 GMT", 3600.0),
        ("Fri, 99 Dec 1999 23:59:59 GMT", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after(
    chat: FakeChat, openai: OpenAIProvider, status: int, header: str, expected: float | None
) -> None:
    """In seconds or as a date, at most an hour; what cannot be read is none."""
    chat.play(problem(status, "later", retry_after=header))
    caught = await failure(openai)
    assert isinstance(caught, TransientError)
    assert caught.retry_after_s == expected


async def test_a_server_that_is_not_there() -> None:
    """A port that nobody listens on."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    provider = OpenAIProvider(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, model=None, timeout_s=5
    )
    caught = await failure(provider)
    await provider.aclose()
    assert isinstance(caught, TransientError)
    assert caught.type == "provider_unreachable"


@pytest.mark.parametrize("begun", [False, True])
async def test_a_server_that_says_nothing(chat: FakeChat, begun: bool) -> None:
    """Before or within its answer: the wait is bounded."""
    provider = OpenAIProvider(base_url=chat.url, api_key=None, model=None, timeout_s=0.05)
    chat.play(Play([chunk(content="a")] if begun else [], then="hang"))
    caught = await failure(provider, *([TextDelta("a")] if begun else []))
    await provider.aclose()
    assert isinstance(caught, TransientError)
    assert caught.type == "provider_timeout"


@pytest.mark.parametrize("then", ["end", "cut"])
@pytest.mark.parametrize("rest", [b"", b'data: {"choices":[{"delta":{"content":"lost'])
async def test_a_stream_that_breaks(
    chat: FakeChat, openai: OpenAIProvider, then: Any, rest: bytes
) -> None:
    """Without a reason and without `[DONE]` the answer is not complete, however it ended."""
    chat.play(Play([chunk(content="a"), rest] if rest else [chunk(content="a")], then=then))
    caught = await failure(openai, TextDelta("a"))
    assert isinstance(caught, TransientError)
    assert caught.type == "incomplete_stream"


async def test_a_stream_that_never_begins(chat: FakeChat, openai: OpenAIProvider) -> None:
    """An event stream without an event is broken, too."""
    chat.play(Play())
    caught = await failure(openai)
    assert isinstance(caught, TransientError)
    assert caught.type == "incomplete_stream"


@pytest.mark.parametrize(
    ("error", "kind", "type_"),
    [
        ({"message": "m", "code": 502}, TransientError, "provider_unavailable"),
        ({"message": "m", "code": "429"}, TransientError, "provider_rate_limited"),
        ({"message": "m", "code": 401}, FatalError, "provider_auth"),
        ({"message": "m", "code": 400, "type": "BadRequest"}, FatalError, "provider_rejected"),
        ({"message": "m", "type": "server_error"}, TransientError, "provider_unavailable"),
        ({"message": "m", "code": "rate_limit_exceeded"}, TransientError, "provider_rate_limited"),
        ({"message": "m", "type": "invalid_request_error"}, FatalError, "provider_rejected"),
        ({"message": "m", "type": "authentication_error"}, FatalError, "provider_auth"),
        ("m", TransientError, "provider_unavailable"),
    ],
)
async def test_an_error_within_the_stream(
    chat: FakeChat, openai: OpenAIProvider, error: Any, kind: type[ProviderError], type_: str
) -> None:
    """By its code, or by its words; without either another try may help."""
    chat.play(Play([chunk(content="a"), data({"error": error})], then="hang"))
    caught = await failure(openai, TextDelta("a"))
    assert type(caught) is kind
    assert caught.type == type_
    assert caught.message == "The model's server broke off: m"
    await asyncio.wait_for(chat.left.wait(), 5)


@pytest.mark.parametrize(
    "junk",
    [
        b"data: {not json}\n\n",
        b"data: [1]\n\n",
        b"data: \xff\xfe\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
)
async def test_what_is_no_chunk_is_fatal(
    chat: FakeChat, openai: OpenAIProvider, junk: bytes
) -> None:
    """A server that speaks another language will do so next time; its connection is closed."""
    chat.play(Play([chunk(content="a"), junk], then="hang"))
    caught = await failure(openai, TextDelta("a"))
    assert isinstance(caught, FatalError)
    assert caught.type == "invalid_stream"
    await asyncio.wait_for(chat.left.wait(), 5)


@pytest.mark.parametrize("body", [b"<html></html>", b"no such page", b""])
async def test_a_page_is_no_answer(chat: FakeChat, openai: OpenAIProvider, body: bytes) -> None:
    """Status 200 and something else than events: the URL is wrong, and its setting is named."""
    chat.play(Play([body], 200, {"content-type": "text/html"}))
    caught = await failure(openai)
    assert isinstance(caught, FatalError)
    assert caught.type == "provider_rejected"
    assert "CONTEXTD_OPENAI_BASE_URL" in caught.message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_redirect_to_another_server_is_refused(
    chat: FakeChat, openai: OpenAIProvider, status: int, host: str
) -> None:
    """Neither the key nor the conversation goes there, be it another port or another name."""
    async with serving(FakeChat()) as other:
        port = other.url.split(":")[2].split("/")[0]
        place = f"http://{host}:{port}/v1/chat/completions?a=secret"
        chat.play(Play(status=status, headers={"location": place}))
        caught = await failure(openai)
        assert (type(caught), caught.type) == (FatalError, "provider_rejected")
        assert f"redirects to another server, http://{host}:{port}" in caught.message
        assert "secret" not in caught.message
        assert other.requests == []


async def test_a_redirect_on_the_server_itself_is_followed(
    chat: FakeChat, openai: OpenAIProvider
) -> None:
    """Some servers send a path with another ending on."""
    moved = {"location": "/v1/elsewhere/chat/completions"}
    chat.play(Play(status=307, headers=moved), Play([chunk("stop", content="hello")]))
    events = [event async for event in openai.stream(ask())]
    assert TextDelta("hello") in events
