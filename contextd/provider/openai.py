"""Any server that speaks the Chat Completions streaming API, by way of the official SDK.

What it raises:

| type | error | when |
|---|---|---|
| `provider_unreachable` | transient | no connection |
| `provider_timeout` | transient | nothing came for `timeout_s`; HTTP 408 |
| `provider_rate_limited` | transient | HTTP 429 |
| `provider_unavailable` | transient | HTTP 409, 425, 5xx; an error within the stream |
| `incomplete_stream` | transient | the stream broke before the model said why it stopped |
| `provider_auth` | fatal | HTTP 401, 403; no key for the default server |
| `provider_rejected` | fatal | any other HTTP status; a redirect to another server; no event stream |
| `invalid_stream` | fatal | what came is not a Chat Completions chunk |
| `invalid_tool_call` | fatal | a tool call without a name; too many calls, too large arguments |
| `no_model` | fatal | no model is named, and the server does not say which it has |

A message is one line of at most 500 characters and never holds the API key. It may hold the server's
own words, which may quote the request: it is for the client, not for a log.
"""

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from openai import (
    APIConnectionError,
    APIError,
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
    TransientError,
)
from contextd.provider.chat_answer import INCOMPLETE, Answer
from contextd.provider.chat_request import FunctionNames, functions, messages
from contextd.provider.openai_server import checked_key, checked_url
from contextd.provider.redirects import RedirectRefusedError, staying_on
from contextd.settings import environment_name

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MESSAGE_CHARS_MAX = 500
RETRY_AFTER_S_MAX = 3600.0
AFTER_LAST_WORD_S = 5.0  # for the usage, which comes after the model has said why it stopped

_NO_KEY = "none"  # local servers ask for no key, but the SDK insists on one
_TRANSIENT_STATUSES = {
    408: "provider_timeout",
    409: "provider_unavailable",
    425: "provider_unavailable",
    429: "provider_rate_limited",
}
_ERROR_STATUS = re.compile("[45][0-9]{2}")


class OpenAIProvider:
    """Streams from one server over one pool of connections.

    `timeout_s` bounds the connecting and the wait for each piece of the answer. Without `base_url`
    the server is OpenAI's, and a key is needed. Raises `SettingsError` for a URL or key of wrong form.
    """

    name = "openai"

    def __init__(
        self, *, base_url: str | None, api_key: str | None, model: str | None, timeout_s: float
    ) -> None:
        self._key = checked_key(api_key)
        self._model = model
        self._is_default_server = not base_url
        # URL and key are always given: the SDK would take them from an environment that means another
        # server. Its own retries are off: the turn counts attempts and backs off.
        url = checked_url(base_url) if base_url else DEFAULT_BASE_URL
        self._client = AsyncOpenAI(
            base_url=url,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [staying_on(url)]}),
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
            chunks = await self._open(request, names)
        except OpenAIError as error:
            raise self._refused(error) from None
        async with chunks:
            answer = Answer(names.tool)
            try:
                async for chunk in _until_silent(chunks, answer):
                    for event in answer.read(chunk):
                        yield event
            except OpenAIError as error:
                # What breaks after the model's last word (a missing usage, say) costs no attempt.
                if answer.finish_reason is None:
                    raise self._broken(error) from None
            except (ValueError, RecursionError) as error:
                message = self._line("The model's server sent what is no chunk of an answer", error)
                raise FatalError("invalid_stream", message) from None
            _require_event_stream(chunks)
            for event in answer.end(done=chunks.done):
                yield event

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def _open(self, request: ModelRequest, names: FunctionNames) -> "_ChunkStream":
        if self._is_default_server and not self._key:
            name = environment_name("openai_api_key")
            raise FatalError("provider_auth", f"OpenAI's server needs a key: set {name}.")
        model = request.model or self._model or await self._served_model()
        body = {"model": model, "messages": messages(request, names), "stream": True}
        if request.tools:
            body["tools"] = functions(request.tools, names)
        try:
            return await self._post_with_usage(body)
        except APIStatusError as error:
            if error.status_code == 404:
                self._listed_model = None  # the server may have been started anew with another
            raise

    async def _post_with_usage(self, body: JsonObject) -> "_ChunkStream":
        """Asks for the usage too, where the server knows how: some refuse what they don't know."""
        if self._takes_stream_options is False:
            return await self._post(body)
        try:
            chunks = await self._post({**body, "stream_options": {"include_usage": True}})
        except APIStatusError as error:
            if not self._may_be_stream_options(error):
                raise
            chunks = await self._post(body)
            self._takes_stream_options = False
        else:
            self._takes_stream_options = True
        return chunks

    def _may_be_stream_options(self, error: APIStatusError) -> bool:
        if error.status_code not in (400, 422):
            return False
        return self._takes_stream_options is None or "stream_options" in error.response.text

    async def _post(self, body: JsonObject) -> "_ChunkStream":
        # `cast_to=object` gives the JSON as it came. The SDK's models are built without a check, so
        # a server's null or a list where text should be would show up only where they are used.
        return await self._client.post(
            "/chat/completions", cast_to=object, body=body, stream=True, stream_cls=_ChunkStream
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
                message = self._line(f"The model's server said HTTP {status}", _words(error.body))
                retry_after = error.response.headers.get("retry-after")
                return _by_status(status, message, _retry_after_s(retry_after, time.time()))
            case _:
                return FatalError("provider_rejected", self._line("The request failed", error))

    def _broken(self, error: OpenAIError) -> ProviderError:
        """What went wrong within the answer."""
        match error:
            case APITimeoutError():
                return TransientError("provider_timeout", "The model's server fell silent.")
            case APIConnectionError():
                return TransientError("incomplete_stream", INCOMPLETE)
            case APIError():
                message = self._line("The model's server broke off", _words(error.body))
                return _by_status(_status_of(error), message, None)
            case _:
                return FatalError("provider_rejected", self._line("The request failed", error))

    def _line(self, what: str, detail: object = None) -> str:
        """One line, short, without the key."""
        text = f"{what}: {detail}" if str(detail or "") else f"{what}."
        if self._key:
            text = text.replace(self._key, "…")
        printable = "".join(c if c.isprintable() else " " for c in text)
        line = " ".join(printable.split())
        return line if len(line) <= MESSAGE_CHARS_MAX else line[: MESSAGE_CHARS_MAX - 1] + "…"


class _ChunkStream(AsyncStream[object]):
    """The SDK's event stream, which also tells what came: any data, and the server's `[DONE]`."""

    begun = False
    done = False

    async def _iter_events(self) -> AsyncIterator[Any]:
        async for event in super()._iter_events():
            if event.data:  # one that only keeps the connection alive has none
                self.begun = True
                self.done = event.data.startswith("[DONE]")
                yield event


async def _until_silent(chunks: _ChunkStream, answer: Answer) -> AsyncIterator[object]:
    """The chunks, until there are no more, or none comes soon after the model's last word.

    Some servers leave the stream open then; a complete answer should not end in a time-out.
    """
    while True:
        limit_s = None if answer.finish_reason is None else AFTER_LAST_WORD_S
        try:
            async with asyncio.timeout(limit_s):
                chunk = await anext(chunks)
        except (StopAsyncIteration, TimeoutError):
            return
        yield chunk


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _by_status(status: int, message: str, retry_after_s: float | None) -> ProviderError:
    transient = _TRANSIENT_STATUSES.get(status, "provider_unavailable" if status >= 500 else None)
    if transient:
        return TransientError(transient, message, retry_after_s=retry_after_s)
    return FatalError("provider_auth" if status in (401, 403) else "provider_rejected", message)


def _status_of(error: APIError) -> int:
    """The HTTP status that an error within a stream stands for: its code, or by its words."""
    if _ERROR_STATUS.fullmatch(error.code or ""):
        return int(error.code or "")
    words = f"{error.code} {error.type}"
    for word, status in (("rate_limit", 429), ("authentication", 401), ("invalid_request", 400)):
        if word in words:
            return status
    return 503


def _words(body: object) -> str:
    """The server's own words in the body of an error, in one of the forms that servers use."""
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail") if body.get(key)), "")
    text = body if isinstance(body, str) else ""
    return "" if text.startswith("<") else text  # a proxy's page says nothing


def _retry_after_s(value: str | None, now_s: float) -> float | None:
    """A `Retry-After` header in seconds from now, null where there is none that can be read."""
    if value is None:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - now_s
        except ValueError:
            return None
    return None if math.isnan(wait_s) else min(max(wait_s, 0.0), RETRY_AFTER_S_MAX)


def _require_event_stream(chunks: _ChunkStream) -> None:
    """A page or a plain document with status 200 holds no event: say so, as its URL is wrong."""
    content_type = chunks.response.headers.get("content-type", "")
    if chunks.begun or content_type.startswith("text/event-stream"):
        return
    name = environment_name("openai_base_url")
    raise FatalError(
        "provider_rejected",
        f"The model's server answered without an event stream. Check {name}: it mostly ends in /v1.",
    )


def _no_model(why: str) -> FatalError:
    return FatalError("no_model", f"{why}: set {environment_name('model')}.")
