"""The port to a model: what contextd asks of whatever writes the answers.

A provider streams `Event`s and knows nothing of contexts, SQL or HTTP. It raises `TransientError` when
another try may help and `FatalError` when it will not; anything else it raises counts as fatal and is
logged as a defect. It is closed (`aclose` of the iterator) as soon as its turn is stopped, and must
then let go of its connection within 250 ms (§6).
"""

from collections.abc import AsyncGenerator
from typing import Protocol, TypeAlias

import msgspec

from contextd.core.message import Role, Usage
from contextd.core.values import JsonObject


class HistoryCall(msgspec.Struct, frozen=True, kw_only=True):
    """One tool call of an earlier answer. `arguments` is JSON text as the model wrote it.

    So it may be no JSON at all, and its name may be one that no tool has. `attached` is what the
    provider said of it in `ToolCallFacts`, whichever provider that was.
    """

    id: str
    name: str
    arguments: str
    attached: JsonObject = {}


class HistoryMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One earlier message as the model is shown it.

    `calls` are an assistant's. A message of role `tool` is the result of the call `call_id`, which
    went to the tool `call_name`; a result that was an error is one like any other. `thinking` is the
    reasoning of an answer with calls, which some models want back with them.
    """

    role: Role
    content: str
    thinking: str = ""
    calls: list[HistoryCall] = []
    call_id: str | None = None
    call_name: str | None = None


class ToolOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the model may call. `parameters` is the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: JsonObject


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to the model. `attempt` counts from 1 within its turn, over all its requests.

    `history` ends with the message to answer, or with the results of the calls that the model made
    in its last answer. `model` and `system_prompt` are null where neither the context nor the
    settings name one.
    """

    context_id: str
    turn_id: str
    attempt: int
    system_prompt: str | None
    model: str | None
    history: list[HistoryMessage]
    tools: list[ToolOffer] = []


class TextDelta(msgspec.Struct, frozen=True):
    """More of the answer: one chunk, never empty."""

    content: str


class ThinkingDelta(msgspec.Struct, frozen=True):
    """More of the model's reasoning: one chunk of a message of kind `thinking`, never empty."""

    content: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """More of the arguments of one tool call: a piece of their JSON text, never empty.

    The pieces of one call come in order and join to its arguments, `{}` where it has none; those of
    several calls may be interleaved. Each piece has the same `id`, an id (§1) that no other call of
    the answer has, and the same whole `name`. The arguments may be no JSON, and the name none that
    was offered: the model wrote both.
    """

    id: str
    name: str
    content: str


class ToolCallFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a call once all of it was said, after its last delta.

    `refusal`: why it must not run, in words for the model, where it cannot be told what was meant.
    `attached`: what the provider wants back with the call, which nobody else reads.
    """

    id: str
    refusal: str | None = None
    attached: JsonObject = {}


class SignOfLife(msgspec.Struct, frozen=True):
    """The model's server shows that it is at work, and says nothing yet."""


class UsageReport(msgspec.Struct, frozen=True):
    """Tokens counted by the model's server for this request."""

    usage: Usage


class Finished(msgspec.Struct, frozen=True):
    """The model's own word for why it stopped: `stop`, `length`, … Ends the stream.

    It is `tool_calls` where the model called tools and wants the results. `whole` is false where the
    model was stopped before it was through: by a limit, a filter, or for a reason that is not known.
    The calls of such an answer must not run.
    """

    reason: str
    whole: bool = True


Event: TypeAlias = (
    TextDelta | ThinkingDelta | ToolCallDelta | ToolCallFacts | SignOfLife | UsageReport | Finished
)


class ProviderError(Exception):
    """The model did not answer. `type` is a stable word, `message` is fit for a client's eyes."""

    def __init__(self, type_: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.type = type_
        self.message = message
        self.retry_after_s = retry_after_s


class TransientError(ProviderError):
    """Another try may help: connection, 429, 5xx, a time-out."""


class FatalError(ProviderError):
    """Another try would end the same way: bad request, bad key, a refused model."""


class InputTooLongError(FatalError):
    """The request is larger than the model takes: `tokens_max`, null where the server did not say it."""

    def __init__(self, type_: str, message: str, *, tokens_max: int | None = None) -> None:
        super().__init__(type_, message)
        self.tokens_max = tokens_max


class Provider(Protocol):
    """Streams a model's answer."""

    @property
    def name(self) -> str:
        """What contexts and settings call it."""
        ...

    def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        """The answer to `request`, as it comes. Raises `ProviderError`. Cancellation-safe."""
        ...

    async def aclose(self) -> None:
        """Lets go of what is held between requests. Called once, at the end."""
        ...
