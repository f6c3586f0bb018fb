"""`send`: one message, and its answer as it is written."""

import asyncio
import signal
import sys
from contextlib import aclosing
from typing import Protocol

import rich_click as click

from contextd.cli import options
from contextd.cli.calls import CALL_KINDS, Waits, title
from contextd.cli.terminal import INTERRUPTED, Terminal, Transcript, complain, run
from contextd.client import (
    ApiError,
    Client,
    ClientError,
    Closed,
    Current,
    Event,
    Restarted,
    StateChange,
    Text,
)
from contextd.client.errors import patiently
from contextd.core.message import Message, MessageStatus, Role, SendAnswer
from contextd.core.turn import Turn, TurnStatus

CANCEL_WAIT_S = 5.0  # for the turn's last words after Ctrl-C; a second Ctrl-C waits for nothing
ENDED = frozenset({TurnStatus.COMPLETED, TurnStatus.CANCELLED, TurnStatus.FAILED})


@click.command()
@options.context_id
@click.argument("text")
@click.option("--create", is_flag=True, help="Create the context first if there is none.")
@click.option(
    "--no-wait", is_flag=True, help="Print the turn's id, and do not wait for the answer."
)
@options.as_json
@options.url
def send(
    *, context_id: str, text: str, create: bool, no_wait: bool, as_json: bool, url: str
) -> int:
    """Send TEXT and print the answer as it is written.

    TEXT `-` is standard input, as it is. Into a pipe goes the answer's text and nothing else, each
    message once it is complete. A call of a tool that waits for somebody is named on standard error;
    `contextd decide` lets it go on. The exit code is 0 if the turn completed, 1 if it failed or was
    cancelled. Ctrl-C cancels it.
    """
    given = _given(text)
    return run(_send(context_id, given, create=create, no_wait=no_wait, as_json=as_json, url=url))


def _given(text: str) -> str:
    try:
        given = sys.stdin.buffer.read() if text == "-" else text.encode()
        return given.decode()
    except UnicodeError:
        raise click.UsageError("TEXT is not valid UTF-8.") from None


async def _send(
    context_id: str, text: str, *, create: bool, no_wait: bool, as_json: bool, url: str
) -> int:
    terminal = Terminal()
    async with Client(url) as client:
        # The cursor of before: a repeated send is answered with a later one, after the first words.
        cursor = await _cursor(client, context_id, create)
        answer = await client.send(context_id, text)
        if no_wait:
            terminal.line(answer) if as_json else terminal.write(f"{answer.turn_id}\n")
            return 0
        show = _choose_display(terminal, as_json)
        turn = await _until_end(client, answer, cursor, show)
        if turn is None:
            return INTERRUPTED
    if as_json:
        terminal.line({"type": "turn", "turn": turn})
    if turn.status == TurnStatus.COMPLETED:
        return 0
    reason = f": {turn.error.message} ({turn.error.type})" if turn.error else ""
    verb = "was" if turn.status == TurnStatus.CANCELLED else "has"
    complain(f"the turn {verb} {turn.status}{reason}")
    return 1


async def _cursor(client: Client, context_id: str, create: bool) -> str:
    try:
        return (await client.get_context(context_id)).stream_cursor
    except ApiError as error:
        if not create or error.code != "context_not_found":
            raise
        return (await client.create_context(id=context_id)).stream_cursor


async def _until_end(
    client: Client, answer: SendAnswer, cursor: str, show: "Display"
) -> Turn | None:
    """Shows the turn to its end; none if Ctrl-C ended it."""
    loop, interrupted = asyncio.get_running_loop(), asyncio.Event()
    watch = asyncio.create_task(_Watch(client, answer, show).until_end(cursor))
    interrupt = asyncio.create_task(interrupted.wait())
    loop.add_signal_handler(signal.SIGINT, interrupted.set)
    try:
        await asyncio.wait({watch, interrupt}, return_when=asyncio.FIRST_COMPLETED)
        loop.remove_signal_handler(signal.SIGINT)
        if watch.done():
            return watch.result()
        await _cancel(client, answer, watch)
        return None
    finally:
        for task in (watch, interrupt):
            task.cancel()
        await asyncio.gather(watch, interrupt, return_exceptions=True)


async def _cancel(client: Client, answer: SendAnswer, watch: "asyncio.Task[Turn]") -> None:
    try:
        await client.cancel(answer.context_id, answer.turn_id)
        turn = await asyncio.wait_for(watch, CANCEL_WAIT_S)
    except (ClientError, TimeoutError) as error:
        complain(f"interrupted; it is not known whether the turn was cancelled: {error}")
    else:
        complain(f"interrupted; the turn is {turn.status}")


class Display(Protocol):
    """What becomes of the events of the turn's own messages."""

    def tell(self, event: Text | Closed | Restarted, message: Message) -> None:
        """Called in order, for each event; `message` is the one that it is of."""

    def end_line(self) -> None:
        """Called before something is said that is not of the turn."""


class _Lines:
    """JSON, an event a line."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def tell(self, event: Text | Closed | Restarted, _message: Message) -> None:
        self._terminal.line(event)

    def end_line(self) -> None:
        """Each is one."""


class _Screen:
    """The answer as it grows; thoughts and tools are dimmed."""

    def __init__(self, terminal: Terminal) -> None:
        self._transcript = Transcript(terminal)

    def tell(self, event: Text | Closed | Restarted, message: Message) -> None:
        match event:
            case Text(role=Role.USER):
                pass
            case Text():
                header = title(message) if event.kind in CALL_KINDS else ""
                self._transcript.text(message.id, event.kind, event.content, header=header)
            case Closed():
                self._transcript.end_line()
                if event.status == MessageStatus.INTERRUPTED:
                    self._transcript.note("broke off; another attempt is made")
            case Restarted():
                self._transcript.note("some of it is lost, again from the start")

    def end_line(self) -> None:
        """Standard error may be the same screen."""
        self._transcript.end_line()


class _Pipe:
    """Only the answer's text, a message when it is closed: a broken attempt's is not in it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._texts: dict[str, list[str]] = {}
        self._separator = ""

    def tell(self, event: Text | Closed | Restarted, _message: Message) -> None:
        match event:
            case Text(role=Role.ASSISTANT, kind="text"):
                self._texts.setdefault(event.message_id, []).append(event.content)
            case Restarted():
                self._texts.pop(event.message_id, None)
            case Closed():
                text = "".join(self._texts.pop(event.message_id, []))
                if text and event.status != MessageStatus.INTERRUPTED:
                    self._terminal.write(self._separator + text)
                    self._separator = "" if text.endswith("\n") else "\n"
            case _:
                pass

    def end_line(self) -> None:
        """Not a byte that is not the answer's."""


def _choose_display(terminal: Terminal, as_json: bool) -> Display:
    if as_json:
        return _Lines(terminal)
    return _Screen(terminal) if terminal.is_tty else _Pipe(terminal)


class _Watch:
    """Follows one turn. Its questions outlast a restart of the server, as `follow` does."""

    def __init__(self, client: Client, answer: SendAnswer, display: Display) -> None:
        self._client = client
        self._answer = answer
        self._display = display
        self._messages: dict[str, Message] = {}
        self._closed: set[str] = set()
        self._turn: Turn | None = None
        self._waits = Waits(client, answer.context_id, self._say)

    async def until_end(self, cursor: str) -> Turn:
        """The turn as it ended, after all its messages' text has been told."""
        context_id = self._answer.context_id
        async with aclosing(self._client.follow(context_id, cursor=cursor)) as events:
            async for event in events:
                await self._note(event)
                turn = self._turn
                if turn and turn.status in ENDED and self._closed.issuperset(turn.message_ids):
                    return turn
        raise ClientError("the context was deleted")

    async def _note(self, event: Event) -> None:
        match event:
            case Text() | Closed() | Restarted():
                message = await self._get_message(event.message_id)
                if message.turn_id == self._answer.turn_id:
                    self._display.tell(event, message)
                if isinstance(event, Closed):
                    self._closed.add(event.message_id)
            case StateChange(state="deleted"):
                pass
            case StateChange():
                self._turn = await self._get_turn()
                await self._waits.note(event.state)
            case Current():
                self._turn = await self._get_turn()
            case _:
                pass

    def _say(self, line: str) -> None:
        self._display.end_line()
        complain(line)

    async def _get_message(self, message_id: str) -> Message:
        """As it was when it was first heard of."""
        if message_id not in self._messages:
            context_id = self._answer.context_id
            self._messages[message_id] = await patiently(
                lambda: self._client.get_message(context_id, message_id), tries_max=None
            )
        return self._messages[message_id]

    async def _get_turn(self) -> Turn:
        turn_id = self._answer.turn_id or ""  # only a send that asks for no answer has none
        return await patiently(
            lambda: self._client.get_turn(self._answer.context_id, turn_id), tries_max=None
        )
