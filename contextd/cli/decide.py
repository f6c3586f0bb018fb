"""`decide`: what a person says to calls of tools that wait."""

from typing import Any, Literal, TypeAlias

import msgspec
import rich_click as click

from contextd.cli import options
from contextd.cli.calls import described, waiting_for_people
from contextd.cli.terminal import Terminal, run
from contextd.client import Client, ClientError, ToolDecision

Verdict: TypeAlias = Literal["approve", "deny"]

DONE: dict[Verdict, str] = {"approve": "approved", "deny": "denied"}


@click.command()
@options.context_id
@click.argument("decision", type=click.Choice(["approve", "deny"]))
@click.option(
    "--call",
    "call_ids",
    multiple=True,
    metavar="CALL",
    help="Only this call; may be repeated. Without it: all that wait.",
)
@click.option("--reason", help="Why it is denied, for the model to know.")
@click.option("--arguments", metavar="JSON", help="An object in place of the model's arguments.")
@options.as_json
@options.url
def decide(
    *,
    context_id: str,
    decision: Verdict,
    call_ids: tuple[str, ...],
    reason: str | None,
    arguments: str | None,
    as_json: bool,
    url: str,
) -> int:
    """Approve or deny calls of tools that wait for a person, all that are meant or none.

    With the last of them the turn goes on. `contextd show ID` has the calls with their arguments.
    """
    if reason is not None and decision == "approve":
        raise click.UsageError("--reason goes with deny: nobody is told why a call was approved.")
    if arguments is not None and decision == "deny":
        raise click.UsageError("--arguments goes with approve: a denied call does not run.")
    changed = None if arguments is None else _object(arguments)
    said = ToolDecision(tool_call_id="", decision=decision, reason=reason, arguments=changed)
    return run(_decide(url, context_id, call_ids, said, as_json=as_json))


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError):
        raise click.UsageError("--arguments is not a JSON object.") from None


async def _decide(
    url: str, context_id: str, call_ids: tuple[str, ...], said: ToolDecision, *, as_json: bool
) -> None:
    """`said` to each call that is meant."""
    async with Client(url) as client:
        chosen = await _choose(client, context_id, call_ids)
        if said.arguments is not None and len(chosen) > 1:
            raise click.UsageError(f"--arguments is for one call, and {len(chosen)} are meant.")
        decisions = [msgspec.structs.replace(said, tool_call_id=call_id) for call_id in chosen]
        answer = await client.decide(context_id, decisions)
    terminal = Terminal()
    if as_json:
        terminal.line({"state": answer.state, "decisions": decisions})
        return
    for name in chosen.values():
        terminal.write(f"{DONE[said.decision]} {name}\n")
    terminal.write(f"the context is {answer.state}\n")


async def _choose(client: Client, context_id: str, call_ids: tuple[str, ...]) -> dict[str, str]:
    """The ids of the calls that are meant, and what to call them."""
    if call_ids:
        return {call_id: f"call {call_id}" for call_id in call_ids}
    waiting = await waiting_for_people(client, context_id)
    if not waiting:
        raise ClientError("no call waits for a decision")
    return {call.id: described(call) for call in waiting}
