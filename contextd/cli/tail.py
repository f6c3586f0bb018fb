"""`tail`: everything that happens in a context, as it happens."""

from collections.abc import Iterator
from contextlib import aclosing
from typing import assert_never

import rich_click as click

from contextd.cli import options
from contextd.cli.terminal import Terminal, Transcript, run
from contextd.client import (
    Client,
    Closed,
    Current,
    Disconnected,
    Event,
    Restarted,
    StateChange,
    Text,
)
from contextd.core.message import Message


@click.command()
@options.context_id
@click.option("--from-start", is_flag=True, help="Begin with the messages that are there already.")
@options.as_json
@options.url
def tail(context_id: str, from_start: bool, as_json: bool, url: str) -> int:
    """Follow a context until Ctrl-C, or until it is deleted.

    Without --from-start the newest turn's answer comes first. With --json each event is a line.
    """
    return run(_tail(url, context_id, from_start, as_json))


async def _tail(url: str, context_id: str, from_start: bool, as_json: bool) -> None:
    terminal = Terminal()
    transcript = Transcript(terminal, headers=True)
    cursor: str | None = None
    held: dict[str, int] = {}
    async with Client(url) as client:
        await client.get_context(context_id)  # `follow` would wait for a server that is not there
        if from_start:
            async for page in client.message_pages(context_id, content=True):
                cursor = cursor or page.stream_cursor
                for message in page.items:
                    held[message.id] = message.content_sequence or 0
                    for event in _as_events(message):
                        _tell(event, terminal, transcript, as_json)
        async with aclosing(client.follow(context_id, cursor=cursor, held=held)) as events:
            async for event in events:
                _tell(event, terminal, transcript, as_json)
    transcript.end_line()


def _as_events(message: Message) -> Iterator[Event]:
    """What a follower who was there from the start would have been told."""
    sequence = message.content_sequence or 0
    facts = {"message_id": message.id, "role": message.role.value, "kind": message.kind}
    if sequence:
        yield Text(**facts, from_sequence=0, sequence=sequence, content=message.content or "")
    if message.final_sequence is not None:
        yield Closed(**facts, status=message.status.value, final_sequence=message.final_sequence)


def _tell(event: Event, terminal: Terminal, transcript: Transcript, as_json: bool) -> None:
    if as_json:
        terminal.line(event)
        return
    match event:
        case Text():
            transcript.text(event.message_id, event.role, event.kind, event.content)
        case Closed():
            if event.status != "completed":
                transcript.note(f"{event.status}: {event.message_id}")
        case Restarted():
            transcript.note(f"some of it is lost, again from the start: {event.message_id}")
        case StateChange():
            transcript.note(event.state)
        case Disconnected():
            transcript.note(f"connection lost ({event.reason}), trying again")
        case Current():
            pass
        case _:
            assert_never(event)
