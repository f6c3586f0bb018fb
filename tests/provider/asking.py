"""How the tests of providers ask, and what they do with the answer."""

from collections.abc import AsyncIterator, Sequence

import msgspec

from contextd.core.message import Role
from contextd.provider import (
    Event,
    Finished,
    HistoryCall,
    HistoryMessage,
    ModelRequest,
    SignOfLife,
    TextDelta,
    ToolCallDelta,
    ToolOffer,
)

KEY = "sk-very-secret"
TURN_ID = "0199c0de-0000-7000-8000-000000000001"


def ask(
    text: str = "Hello",
    *,
    attempt: int = 1,
    model: str | None = "some-model",
    system_prompt: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    tools: Sequence[ToolOffer] = (),
) -> ModelRequest:
    """A request to answer `text`, after `history` of roles and contents."""
    said = [*history, ("user", text)]
    return ModelRequest(
        context_id="c1",
        turn_id=TURN_ID,
        attempt=attempt,
        system_prompt=system_prompt,
        model=model,
        history=[HistoryMessage(role=Role(role), content=content) for role, content in said],
        tools=list(tools),
    )


def ask_after(*history: HistoryMessage, tools: Sequence[ToolOffer] = ()) -> ModelRequest:
    """A request with exactly this history."""
    return msgspec.structs.replace(ask(tools=tools), history=list(history))


def answered(
    request: ModelRequest, events: Sequence[Event], results: Sequence[str], *, attempt: int = 1
) -> ModelRequest:
    """The next request of the turn: `events` answered `request`, and `results` their calls."""
    made = calls(events)
    answer = asked("".join(written(events)), *made)
    back = [result(call.id, content) for call, content in zip(made, results, strict=True)]
    history = [*request.history, answer, *back]
    return msgspec.structs.replace(request, history=history, attempt=attempt)


def user(content: str) -> HistoryMessage:
    """What a user said."""
    return HistoryMessage(role=Role.USER, content=content)


def asked(content: str, *calls: HistoryCall) -> HistoryMessage:
    """What an assistant said and called."""
    return HistoryMessage(role=Role.ASSISTANT, content=content, calls=list(calls))


def call(id_: str, name: str = "look", arguments: str = "{}") -> HistoryCall:
    """One call of an earlier answer."""
    return HistoryCall(id=id_, name=name, arguments=arguments)


def result(call_id: str | None, content: str) -> HistoryMessage:
    """What a tool answered."""
    return HistoryMessage(role=Role.TOOL, content=content, call_id=call_id, call_name="look")


def offer(name: str, description: str = "", **parameters: object) -> ToolOffer:
    """A tool that the model may call."""
    return ToolOffer(name=name, description=description, parameters=parameters)


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    """All events, to the end, but for those that only say that the server is at work."""
    return [event async for event in saying(events)]


async def saying(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events that say something."""
    async for event in events:
        if not isinstance(event, SignOfLife):
            yield event


def written(events: Sequence[Event]) -> list[str]:
    """The chunks of the answer's text."""
    return [event.content for event in events if isinstance(event, TextDelta)]


def pieces(events: Sequence[Event]) -> list[ToolCallDelta]:
    """The pieces of all tool calls, as they came."""
    return [event for event in events if isinstance(event, ToolCallDelta)]


def calls(events: Sequence[Event]) -> list[HistoryCall]:
    """The tool calls, their arguments joined, in the order in which they began.

    None has an empty piece, and each has one name.
    """
    texts: dict[tuple[str, str], str] = {}
    for piece in pieces(events):
        assert piece.content
        texts[piece.id, piece.name] = texts.get((piece.id, piece.name), "") + piece.content
    assert len({id_ for id_, _ in texts}) == len(texts)
    return [call(id_, name, text) for (id_, name), text in texts.items()]


def reasons(events: Sequence[Event]) -> list[str]:
    """Why the model stopped, once for each time that it said so."""
    return [event.reason for event in events if isinstance(event, Finished)]
