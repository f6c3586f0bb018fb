"""How tool calls come together from the pieces of a Chat Completions stream.

By the API each piece names its call by `index`, and the first has the call's id and name. Servers
differ: they count no index or the same for all calls, give no ids, or a new one with each piece, and
repeat the name. What they have in common is that a call begins with a name. So a piece without one
goes on with a call that has begun, and a piece with one goes on with its call only if it can: neither
index, id nor name is another's, and the arguments so far are not a whole object already.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from contextd.core.text import TextPieces, storable
from contextd.core.values import LABEL_CHARS_MAX, WHOLE_ID_PATTERN
from contextd.provider import FatalError, ToolCallDelta

CALLS_MAX = 128
CALLS_CHARS_MAX = 1024 * 1024  # of the arguments of all calls of one answer

NO_ARGUMENTS = "{}"

_JSON_SPACE = " \t\r\n"


class FunctionPart(msgspec.Struct):
    """What a piece says of the function. Arguments are text; some servers send the object itself."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class CallPart(msgspec.Struct):
    """A piece of a call, as it comes."""

    index: int | None = None
    id: str | None = None
    function: FunctionPart | None = None


class ToolCalls:
    """The calls of one answer. `tool_name` says which tool is meant by a function's name."""

    def __init__(self, tool_name: Callable[[str], str]) -> None:
        self._tool_name = tool_name
        self._calls: list[_Call] = []
        self._ids: set[str] = set()
        self._chars = 0

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, part: CallPart) -> Iterator[ToolCallDelta]:
        """What can be said with this piece. Raises `FatalError` where the calls grow too large."""
        function = part.function or FunctionPart()
        name, arguments = function.name or "", _text(function.arguments)
        self._chars += len(arguments)
        if self._chars > CALLS_CHARS_MAX:
            raise FatalError("invalid_tool_call", "The arguments of the tool calls are too large.")
        call = self._call_of(part, name, arguments) or self._begin(part.index)
        call.given_id = call.given_id or part.id or ""
        call.function = call.function or name
        if content := call.add(arguments):
            yield self._delta(call, content)

    def end(self) -> Iterator[ToolCallDelta]:
        """What is left to be said. Raises `FatalError` where a call has no name."""
        for number, call in enumerate(self._calls, 1):
            if not call.function:
                message = f"The model's tool call {number} is wrong: it has no name."
                raise FatalError("invalid_tool_call", message)
            if content := call.rest():
                yield self._delta(call, content)

    def _call_of(self, part: CallPart, name: str, arguments: str) -> "_Call | None":
        """The call that goes on with `part`, null where it begins one."""
        if not name:
            return self._continued(part)
        call = self._last(lambda call: call.may_have(part.index, part.id))
        return None if call is None or call.is_over(name, arguments) else call

    def _continued(self, part: CallPart) -> "_Call | None":
        """Of calls with the same id or index the last one. Some servers count the index up with each
        piece, so one that names nothing known goes on with the newest call.
        """

        def has_id(call: _Call) -> bool:
            return bool(part.id) and call.given_id == part.id

        def has_index(call: _Call) -> bool:
            return part.index is not None and call.index == part.index

        return (
            self._last(lambda call: has_id(call) and has_index(call))
            or self._last(has_id)
            or self._last(has_index)
            or (None if part.id else self._last(lambda _: True))
        )

    def _last(self, fits: Callable[["_Call"], bool]) -> "_Call | None":
        return next((call for call in reversed(self._calls) if fits(call)), None)

    def _begin(self, index: int | None) -> "_Call":
        if len(self._calls) == CALLS_MAX:
            raise FatalError("invalid_tool_call", f"More than {CALLS_MAX} tool calls at once.")
        self._calls.append(_Call(index))
        return self._calls[-1]

    def _delta(self, call: "_Call", content: str) -> ToolCallDelta:
        if not call.id:
            call.id = self._new_id(call.given_id)
            # No tool has a name that long: what is cut off changes nothing.
            call.name = storable(self._tool_name(call.function))[:LABEL_CHARS_MAX]
        return ToolCallDelta(id=call.id, name=call.name, content=content)

    def _new_id(self, given_id: str) -> str:
        """The model's own where it is an id and is not taken, else one that is made up."""
        free = re.match(WHOLE_ID_PATTERN, given_id) and given_id not in self._ids
        id_ = given_id if free else f"call_{uuid.uuid4().hex}"
        self._ids.add(id_)
        return id_


class _Call:
    """One call. `id` and `name` are settled with its first delta, and empty until then."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.given_id = ""
        self.function = ""
        self.id = ""
        self.name = ""
        self._text = TextPieces()
        self._unsaid: list[str] = []
        self._object = _ObjectEnd()

    def may_have(self, index: int | None, id_: str | None) -> bool:
        """Whether neither is another call's."""
        same_index = index is None or self.index is None or index == self.index
        return same_index and (not id_ or not self.given_id or id_ == self.given_id)

    def is_over(self, name: str, arguments: str) -> bool:
        """Whether a piece with a name and these arguments cannot be one of this call."""
        if not self.function:
            return False
        return name != self.function or (self._object.reached and not _is_blank(arguments))

    def add(self, arguments: str) -> str:
        """What can be said now: nothing before the name is known, no white space before the rest."""
        self._object.read(arguments)
        self._unsaid.append(self._text.add(arguments))
        return self._say() if self.function else ""

    def rest(self) -> str:
        """What is left at the end."""
        self._unsaid.append(self._text.rest())
        return self._say() or ("" if self.id else NO_ARGUMENTS)

    def _say(self) -> str:
        content = "".join(self._unsaid)
        self._unsaid.clear()
        return content if self.id else content.lstrip(_JSON_SPACE)


class _ObjectEnd:
    """Whether JSON text that comes in pieces has come to the end of its object."""

    def __init__(self) -> None:
        self.reached = False
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def read(self, piece: str) -> None:
        for character in piece:
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.reached = self._depth == 0


def _text(arguments: str | dict[str, Any] | None) -> str:
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    return arguments or ""


def _is_blank(arguments: str) -> bool:
    return not arguments.strip(_JSON_SPACE)
