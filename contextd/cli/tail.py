"""`tail`: everything that happens in a context, as it happens."""

from collections.abc import Iterator
from contextlib import aclosing
from typing import assert_never

import rich_click as click

from contextd.cli import options
from contextd.cli.calls import CALL_KINDS, Waits, header
from contextd.cli.terminal import Terminal, Transcript, complain, run
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
from contextd.client.errors import patiently
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
    cursor: str | None = None
    held: dict[str, int] = {}
    async with Client(url) as client:
        await client.get_context(context_id)  # `follow` would wait for a server that is not there
        display = _Lines(terminal) if as_json else _Transcript(client, context_id, terminal)
        waits = Waits(client, context_id, display.say)
        if from_start:
            async for page in client.message_pages(context_id, content=True):
                cursor = cursor or page.stream_cursor
                for message in page.items:
                    held[message.id] = message.content_sequence or 0
                    for event in _as_events(message):
                        await display.tell(event)
        async with aclosing(client.follow(context_id, cursor=cursor, held=held)) as events:
            async for event in events:
                await display.tell(event)
                if isinstance(event, StateChange):
                    await waits.note(event.state)
        display.end()


def _as_events(message: Message) -> Iterator[Event]:
    """What a follower who was there from the start would have been told."""
    sequence = message.content_sequence or 0
    facts = {"message_id": message.id, "role": message.role.value, "kind": message.kind}
    if sequence:
        yield Text(**facts, from_sequence=0, sequence=sequence, content=message.content or "")
    if message.final_sequence is not None:
        yield Closed(**facts, status=message.status.value, final_sequence=message.final_sequence)


class _Lines:
    """JSON, an event a line."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.say = complain

    async def tell(self, event: Event) -> None:
        """Called in order, for each event."""
        self._terminal.line(event)

    def end(self) -> None:
        """Each line has ended."""


class _Transcript:
    """Texts under their headers, and what else happens between them."""

    def __init__(self, client: Client, context_id: str, terminal: Terminal) -> None:
        self._client = client
        self._context_id = context_id
        self._transcript = Transcript(terminal)
        self._headers: dict[str, str] = {}

    def say(self, line: str) -> None:
        """On standard error, which may be the same screen."""
        self._transcript.end_line()
        complain(line)

    def end(self) -> None:
        """Nothing follows."""
        self._transcript.end_line()

    async def tell(self, event: Event) -> None:
        """Called in order, for each event."""
        note = self._transcript.note
        match event:
            case Text():
                header = await self._header(event)
                self._transcript.text(event.message_id, event.kind, event.content, header=header)
            case Closed():
                if event.status != "completed":
                    note(f"{event.status}: {event.message_id}")
            case Restarted():
                note(f"some of it is lost, again from the start: {event.message_id}")
            case StateChange():
                note(event.state)
            case Disconnected():
                note(f"connection lost ({event.reason}), trying again")
            case Current():
                pass
            case _:
                assert_never(event)

    async def _header(self, event: Text) -> str:
        """Only the message itself knows its tool's name."""
        if event.kind not in CALL_KINDS:
            return f"{event.role} {event.kind} {event.message_id}"
        if event.message_id not in self._headers:
            place = (self._context_id, event.message_id)
            message = await patiently(lambda: self._client.get_message(*place), tries_max=None)
            self._headers[event.message_id] = header(message)
        return self._headers[event.message_id]
