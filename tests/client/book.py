"""A reader that uses events as a program would, and checks that they fit together."""

from collections.abc import AsyncGenerator, Callable

from contextd.client import Closed, Current, Event, Restarted, StateChange, Text


class Book:
    """What a reader has after all events: the way a program would use them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.texts: dict[str, str] = {}
        self.sequences: dict[str, int] = {}
        self.closed: dict[str, str] = {}

    def note(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Text():
                assert event.from_sequence == self.sequences.get(event.message_id, 0)
                assert event.sequence > event.from_sequence
                assert event.message_id not in self.closed
                self.texts[event.message_id] = self.texts.get(event.message_id, "") + event.content
                self.sequences[event.message_id] = event.sequence
            case Closed():
                assert event.message_id not in self.closed
                assert self.sequences.get(event.message_id, 0) == event.final_sequence
                self.closed[event.message_id] = event.status
            case Restarted():
                self.texts.pop(event.message_id)
                self.sequences.pop(event.message_id)
                self.closed.pop(event.message_id, None)
            case _:
                pass


async def read(
    events: AsyncGenerator[Event], book: Book, until: Callable[[Event], bool] = lambda _: False
) -> Event | None:
    """Notes events to the first for which `until` is true, or to the end."""
    async for event in events:
        book.note(event)
        if until(event):
            return event
    return None


def is_current(event: Event) -> bool:
    return isinstance(event, Current)


def is_state(state: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StateChange) and event.state == state
