"""Calls of tools as people see them: what stands above their text, and which of them wait."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from contextd.client import DEFAULT_URL, Client
from contextd.client.errors import patiently
from contextd.core.machine import State
from contextd.core.message import Message
from contextd.core.tool_call import TOOL_CALL, TOOL_RESULT, ToolCall, ToolCallStatus

CALL_KINDS = frozenset({TOOL_CALL, TOOL_RESULT})
ARGUMENTS_CHARS_MAX = 200  # of a line that only says that a call waits; `show` has them whole


def header(message: Message) -> str:
    """What stands above a message's text."""
    what = title(message) if message.kind in CALL_KINDS else f"{message.role} {message.kind}"
    return f"{what} {message.id}"


def title(message: Message) -> str:
    """What a message of one of the `CALL_KINDS` is, with its tool's name."""
    name = _line(message.metadata.get("name", "a tool"))
    error = message.metadata.get("error") if message.kind == TOOL_RESULT else None
    verb = "call of" if message.kind == TOOL_CALL else "result of"
    return f"{verb} {name}" + (f" ({_line(error)})" if error else "")


def described(call: ToolCall, *, chars_max: int | None = None) -> str:
    """One line: name, arguments as JSON (cut after `chars_max`), id."""
    arguments = msgspec.json.encode(call.arguments).decode()
    if chars_max is not None and len(arguments) > chars_max:
        arguments = f"{arguments[:chars_max]}…"
    return f"{call.name} {arguments}, call {call.id}"


async def waiting_for_people(client: Client, context_id: str) -> list[ToolCall]:
    """The calls that somebody has to decide."""
    statuses = [ToolCallStatus.PENDING]
    return [call async for call in client.tool_calls(context_id, statuses=statuses)]


class Waits:
    """Says, once for each call, that a context stands still until somebody does something.

    `say` gets one line at a time. Questions outlast a restart of the server, as `follow` does.
    """

    def __init__(self, client: Client, context_id: str, say: Callable[[str], None]) -> None:
        self._client = client
        self._context_id = context_id
        self._say = say
        self._url = "" if client.base_url == DEFAULT_URL else f" --url {client.base_url}"
        self._said: set[str] = set()

    async def note(self, state: str) -> None:
        """To be told of each state."""
        if state == State.AWAITING_TOOL_APPROVAL:
            new = self._tell("waits for a decision on", await self._calls(ToolCallStatus.PENDING))
            if new:  # by their ids: others may wait by the time that somebody decides
                named = "".join(f" --call {call.id}" for call in new)
                command = f"contextd decide {self._context_id} approve{named}{self._url}"
                self._say(f"decide with: {command} (or deny)")
        elif state == State.AWAITING_TOOL_RESULTS:
            called = await self._calls(ToolCallStatus.APPROVED)
            self._tell("waits for the result of", [call for call in called if call.external])

    def _tell(self, what: str, calls: Sequence[ToolCall]) -> list[ToolCall]:
        """Those that had not been told of."""
        new = [call for call in calls if f"{what} {call.id}" not in self._said]
        for call in new:
            self._said.add(f"{what} {call.id}")
            self._say(f"{what} {described(call, chars_max=ARGUMENTS_CHARS_MAX)}")
        return new

    async def _calls(self, status: ToolCallStatus) -> list[ToolCall]:
        async def ask() -> list[ToolCall]:
            calls = self._client.tool_calls(self._context_id, statuses=[status])
            return [call async for call in calls]

        return await patiently(ask, tries_max=None)


def _line(value: Any) -> str:
    """Metadata may be a producer's: anything, on many lines."""
    return " ".join(str(value).split())
