"""Any server that speaks the Chat Completions streaming API, by way of the official SDK.

What it raises:

| type | error | when |
|---|---|---|
| `provider_unreachable` | transient | no connection |
| `provider_timeout` | transient | nothing came for `timeout_s`; HTTP 408 |
| `provider_rate_limited` | transient | HTTP 429 |
| `provider_unavailable` | transient | HTTP 409, 425, 498, 5xx; an error within the stream |
| `incomplete_stream` | transient | the stream broke before the model said why it stopped |
| `provider_quota` | fatal | HTTP 402, or another status with words for a spent quota |
| `input_too_long` | fatal | the request is larger than the model takes |
| `provider_auth` | fatal | HTTP 401, 403; no key for the default server |
| `provider_rejected` | fatal | any other HTTP status; a redirect to another server; no event stream |
| `invalid_stream` | fatal | what came is not a Chat Completions chunk |
| `invalid_tool_call` | fatal | a tool call without a name; too many calls, too large arguments |
| `no_model` | fatal | no model is named, and the server does not say which it has |

A message is one line of at most 500 characters and never holds the API key. It may hold the server's
own words, which may quote the request: it is for the client, not for a log. What servers do otherwise
than the API says is met in `chat_chunk`, `chat_calls`, `chat_request` and `chat_errors`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx2
import msgspec
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpxClient,
    NotFoundError,
    OpenAIError,
)

from contextd.core.values import JsonObject
from contextd.provider import (
    Event,
    FatalError,
    ModelRequest,
    ProviderError,
    SignOfLife,
    ToolCallFacts,
    TransientError,
)
from contextd.provider.chat_answer import INCOMPLETE, Answer
from contextd.provider.chat_errors import Refusal, RefusedError, failure, words_of
from contextd.provider.chat_request import FunctionNames, attach, messages, tools
from contextd.provider.chat_stream import PayloadReader
from contextd.provider.openai_server import checked_key, checked_url
from contextd.provider.redirects import RedirectRefusedError, staying_on
from contextd.settings import environment_name

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MESSAGE_CHARS_MAX = 500
AFTER_LAST_WORD_S = 5.0  # for the usage, which comes after the model has said why it stopped

_NO_KEY = "none"  # local servers ask for no key, but the SDK insists on one


class OpenAIProvider:
    """Streams from one server over one pool of connections.

    `timeout_s` bounds the connecting and the wait for each piece of the answer. Without `base_url`
    the server is OpenAI's, and a key is needed. Raises `SettingsError` for a URL or key of wrong form.
    """

    name = "openai"

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str | None,
        model: str | None,
        timeout_s: float,
        think_tags: bool = True,
    ) -> None:
        self._key = checked_key(api_key)
        self._model = model
        self._think_tags = think_tags
        self._is_default_server = not base_url
        url, query = _without_query(checked_url(base_url) if base_url else DEFAULT_BASE_URL)
        # URL and key are always given: the SDK would take them from an environment that means another
        # server. Its own retries are off: the turn counts attempts and backs off.
        self._client = AsyncOpenAI(
            base_url=url,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [staying_on(url)]}),
            default_query=query,
            api_key=self._key or _NO_KEY,
            timeout=timeout_s,
            max_retries=0,
        )
        self._listed_model: str | None = None
        self._listing = asyncio.Lock()
        self._takes_stream_options: bool | None = None  # null until the server has shown it

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        """The model's answer; usage and `Finished` come at its end.

        Raises `ProviderError` as listed at the top of this module.
        """
        names = FunctionNames(request)
        try:
            model = await self._model_of(request)
            body = await self._open(request, names, model)
        except OpenAIError as error:
            raise self._refused(error) from None
        async with body:
            answer = Answer(names, think_tags=self._think_tags)
            payloads = PayloadReader()
            try:
                async for event in _events(body, payloads, answer):
                    yield event
            except (httpx2.RequestError, RefusedError, ValueError, RecursionError) as error:
                # What breaks after the model's last word (a missing usage, say) costs no attempt.
                if answer.finish_reason is None:
                    raise self._broken(error) from None
            _require_answer(body, payloads)
            for event in answer.end(done=payloads.done):
                yield _with_model(event, model)

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def _model_of(self, request: ModelRequest) -> str:
        if self._is_default_server and not self._key:
            name = environment_name("openai_api_key")
            raise FatalError("provider_auth", f"OpenAI's server needs a key: set {name}.")
        return request.model or self._model or await self._served_model()

    async def _open(self, request: ModelRequest, names: FunctionNames, model: str) -> "_ByteStream":
        said = messages(request, names, model)
        body = {"model": model, "messages": said, "stream": True, **tools(request, names)}
        try:
            return await self._post_with_usage(body)
        except APIStatusError as error:
            if error.status_code == 404:
                self._listed_model = None  # the server may have been started anew with another
            raise

    async def _post_with_usage(self, body: JsonObject) -> "_ByteStream":
        """Asks for the usage too, where the server knows how: some refuse what they don't know."""
        if self._takes_stream_options is False:
            return await self._post(body)
        try:
            answer = await self._post({**body, "stream_options": {"include_usage": True}})
        except APIStatusError as error:
            if not self._may_be_stream_options(error):
                raise
            answer = await self._post(body)
            self._takes_stream_options = False
        else:
            self._takes_stream_options = True
        return answer

    def _may_be_stream_options(self, error: APIStatusError) -> bool:
        if error.status_code not in (400, 422):
            return False
        return self._takes_stream_options is None or "stream_options" in error.response.text

    async def _post(self, body: JsonObject) -> "_ByteStream":
        # The bytes are read here: the SDK's own reader ends an answer at the first odd field, and does
        # not show the comments by which a server says that it is at work.
        return await self._client.post(
            "/chat/completions", cast_to=bytes, body=body, stream=True, stream_cls=_ByteStream
        )

    async def _served_model(self) -> str:
        """The first model of a server that was named by its URL: a local one has just one."""
        if self._is_default_server:
            raise _no_model("No model is named")
        async with self._listing:
            if self._listed_model is None:
                self._listed_model = await self._first_listed_model()
        return self._listed_model

    async def _first_listed_model(self) -> str:
        try:
            listed = msgspec.convert(await self._client.get("/models", cast_to=object), _Models)
        except (NotFoundError, ValueError):
            raise _no_model("No model is named, and the server has no list of its own") from None
        if not listed.data:
            raise _no_model("No model is named, and the server lists none")
        return listed.data[0].id

    def _refused(self, error: OpenAIError) -> ProviderError:
        """What went wrong before the answer began."""
        match error:
            case APITimeoutError():
                message = "The model's server did not answer in time."
                return TransientError("provider_timeout", message)
            case APIConnectionError(__cause__=RedirectRefusedError() as cause):
                message = self._line("The model's server cannot be used", cause)
                return FatalError("provider_rejected", message)
            case APIConnectionError():
                message = self._line("The model's server cannot be reached", error.__cause__)
                return TransientError("provider_unreachable", message)
            case APIStatusError(status_code=status):
                body = error.response.text
                message = self._line(f"The model's server said HTTP {status}", words_of(body))
                headers = error.response.headers
                return failure(Refusal(status=status, body=body, headers=headers), message)
            case _:
                return FatalError("provider_rejected", self._line("The request failed", error))

    def _broken(self, error: Exception) -> ProviderError:
        """What went wrong within the answer."""
        match error:
            case httpx2.TimeoutException():
                return TransientError("provider_timeout", "The model's server fell silent.")
            case httpx2.RequestError():
                return TransientError("incomplete_stream", INCOMPLETE)
            case RefusedError(refusal=refusal):
                words = words_of(refusal.body)
                return failure(refusal, self._line("The model's server broke off", words))
            case _:
                what = "The model's server sent what is no chunk of an answer"
                return FatalError("invalid_stream", self._line(what, error))

    def _line(self, what: str, detail: object = None) -> str:
        """One line, short, without the key."""
        text = f"{what}: {detail}" if str(detail or "") else f"{what}."
        if self._key:
            text = text.replace(self._key, "…")
        printable = "".join(c if c.isprintable() else " " for c in text)
        line = " ".join(printable.split())
        return line if len(line) <= MESSAGE_CHARS_MAX else line[: MESSAGE_CHARS_MAX - 1] + "…"


class _ByteStream(AsyncStream[bytes]):
    """The bytes of an answer as they come. Raises `httpx2.RequestError` where they end too early."""

    async def __stream__(self) -> AsyncIterator[bytes]:
        async for raw in self.response.aiter_bytes():
            yield raw


async def _events(
    body: _ByteStream, payloads: PayloadReader, answer: Answer
) -> AsyncIterator[Event]:
    """What the bytes say. Where they say nothing, they are at least a sign of life."""
    async for raw in _until_silent(body, answer):
        is_silent = True
        for payload in payloads.feed(raw):
            for event in answer.read(payload):
                is_silent = False
                yield event
        if is_silent:
            yield SignOfLife()
        if payloads.done:
            return
    for payload in payloads.end():
        for event in answer.read(payload):
            yield event


async def _until_silent(body: _ByteStream, answer: Answer) -> AsyncIterator[bytes]:
    """The bytes, until there are no more, or none come soon after the model's last word.

    Some servers leave the stream open then; a complete answer should not end in a time-out.
    """
    while True:
        limit_s = None if answer.finish_reason is None else AFTER_LAST_WORD_S
        try:
            async with asyncio.timeout(limit_s):
                raw = await anext(body)
        except (StopAsyncIteration, TimeoutError):
            return
        yield raw


def _with_model(event: Event, model: str) -> Event:
    """What a call keeps goes back to the model that it came from, and to no other."""
    if isinstance(event, ToolCallFacts) and event.attached:
        return msgspec.structs.replace(event, attached=attach(event.attached, model))
    return event


def _without_query(url: str) -> tuple[str, dict[str, object]]:
    """A base URL, and its query apart: it belongs behind the path of each request."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="", fragment="")), dict(parse_qsl(parts.query))


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _require_answer(body: _ByteStream, payloads: PayloadReader) -> None:
    """A page with status 200 is no answer: say so, as its URL is wrong."""
    content_type = body.response.headers.get("content-type", "")
    is_silent = not payloads.begun and not payloads.done
    if payloads.is_page or (is_silent and not content_type.startswith("text/event-stream")):
        name = environment_name("openai_base_url")
        raise FatalError(
            "provider_rejected",
            f"The model's server answered without an event stream. Check {name}: "
            "it mostly ends in /v1.",
        )


def _no_model(why: str) -> FatalError:
    return FatalError("no_model", f"{why}: set {environment_name('model')}.")
