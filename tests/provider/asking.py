"""How the tests of providers ask, and what they do with the answer."""

from collections.abc import AsyncIterator, Sequence

from contextd.core.message import Role
from contextd.provider import Event, Finished, HistoryMessage, ModelRequest, TextDelta

KEY = "sk-very-secret"
TURN_ID = "0199c0de-0000-7000-8000-000000000001"


def ask(
    text: str = "Hello",
    *,
    attempt: int = 1,
    model: str | None = "some-model",
    system_prompt: str | None = None,
    history: Sequence[tuple[str, str]] = (),
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
    )


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    """All events, to the end."""
    return [event async for event in events]


def written(events: Sequence[Event]) -> list[str]:
    """The chunks of the answer's text."""
    return [event.content for event in events if isinstance(event, TextDelta)]


def reasons(events: Sequence[Event]) -> list[str]:
    """Why the model stopped, once for each time that it said so."""
    return [event.reason for event in events if isinstance(event, Finished)]
