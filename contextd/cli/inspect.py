"""`ls`, `show` and `cancel`: what there is, and how to stop it."""

from collections.abc import Iterator
from typing import Any

import msgspec
import rich_click as click
from rich.table import Table
from rich.text import Text

from contextd.cli import options
from contextd.cli.calls import described, header, waiting_for_people
from contextd.cli.terminal import Terminal, Transcript, run, visible
from contextd.client import Client
from contextd.core.context import Context


@click.command()
@click.option("--state", multiple=True, help="Only contexts in this state; may be repeated.")
@options.as_json
@options.url
def ls(state: tuple[str, ...], as_json: bool, url: str) -> int:
    """List contexts, newest activity first."""
    return run(_ls(url, state, as_json))


async def _ls(url: str, state: tuple[str, ...], as_json: bool) -> None:
    async with Client(url) as client:
        contexts = [context async for context in client.contexts(state=state)]
    terminal = Terminal()
    if as_json:
        terminal.line(contexts)
    else:
        terminal.console.print(_table(contexts))


def _table(contexts: list[Context]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("ID", "STATE", "MESSAGES", "UPDATED", "TITLE"):
        table.add_column(heading, justify="right" if heading == "MESSAGES" else "left")
    for context in contexts:
        table.add_row(
            Text(context.id),
            Text(context.state),
            Text(str(context.message_count)),
            Text(context.updated_at),
            # A title is one line here, whatever is in it: --json has it as it is.
            Text(visible(" ".join((context.title or "").split()))),
        )
    return table


@click.command()
@options.context_id
@options.as_json
@options.url
def show(context_id: str, as_json: bool, url: str) -> int:
    """Show a context and its messages with their text."""
    return run(_show(url, context_id, as_json))


async def _show(url: str, context_id: str, as_json: bool) -> None:
    terminal = Terminal()
    async with Client(url) as client:
        context = await client.get_context(context_id)
        messages = [message async for message in client.messages(context_id, content=True)]
        waiting = await waiting_for_people(client, context_id) if context.pending_tool_calls else []
    if as_json:
        shown = {"context": context, "messages": messages, "pending_tool_calls": waiting}
        terminal.line(shown)
        return
    for name, value in _facts(context):
        terminal.dim(f"{name:<16}")
        terminal.write(f"{value}\n")
    transcript = Transcript(terminal)
    for message in messages:
        transcript.text(message.id, message.kind, message.content or "", header=header(message))
        if message.status != "completed":
            transcript.note(message.status)
    for call in waiting:
        transcript.note(f"waits for a decision: {described(call)}")
    transcript.end_line()


def _facts(context: Context) -> Iterator[tuple[str, str]]:
    """The fields that say something, each as one line."""
    fields: dict[str, Any] = msgspec.to_builtins(context)
    for name, value in fields.items():
        if value not in (None, [], {}, ""):
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            yield name, " ".join(text.split())


@click.command()
@options.context_id
@click.option("--turn", "turn_id", metavar="TURN", help="Only this turn, running or queued.")
@options.url
def cancel(context_id: str, turn_id: str | None, url: str) -> int:
    """Cancel the turn that runs; what it wrote stays."""
    return run(_cancel(url, context_id, turn_id))


async def _cancel(url: str, context_id: str, turn_id: str | None) -> None:
    async with Client(url) as client:
        answer = await client.cancel(context_id, turn_id)
    done = f"cancelled turn {answer.cancelled_turn_id}"
    outcome = done if answer.cancelled_turn_id else "nothing to cancel"
    Terminal().write(f"{outcome}; the context is {answer.state}\n")
