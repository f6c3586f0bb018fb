"""How tool calls come together from the pieces of a Chat Completions stream. No I/O.

By the API each piece names its call by `index`, and the first has the call's id and name. Servers
differ: they count no index or the same for all calls, give no ids, or a new one with each piece, cut the
name, repeat it, or repeat the whole call. What they have in common is that a call begins with a name. So
a piece without one goes on with a call that has begun, and a piece with one goes on with its call only if
it can: neither index, id nor name is another's, and the arguments so far are not a whole object already.

A call that may be another one said again is held back until the end; then it is left out if it says the
same. Where it cannot be told what was meant, no call that it may concern is run, and the model is told
why: arguments that may belong to several unfinished calls, and one call with two sets of arguments.
"""

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Protocol

from contextd.core.text import storable
from contextd.core.values import LABEL_CHARS_MAX, WHOLE_ID_PATTERN, JsonObject
from contextd.provider import FatalError, ToolCallDelta, ToolCallFacts
from contextd.provider.chat_arguments import Arguments
from contextd.provider.chat_chunk import KEPT_NAMES_MAX, CallPart

CALLS_MAX = 128
CALLS_CHARS_MAX = 1024 * 1024  # of the arguments of all calls of one answer

NO_ARGUMENTS = "{}"
MIXED_UP = "the pieces of this answer's calls do not say which call the arguments belong to"
SAID_TWICE = "this call came twice under one id, with other arguments each time"
NO_END = "the answer ended without a word on why, before this call had arguments"


class Names(Protocol):
    """What the functions on offer are called."""

    def tool(self, function: str) -> str:
        """The tool that is meant by a function's name."""
        ...

    def offered(self, function: str) -> bool:
        """Whether it is on offer."""
        ...

    def begins(self, piece: str) -> bool:
        """Whether the name of one on offer begins like this."""
        ...


class AnyNames:
    """Nothing is known of what is on offer."""

    def tool(self, function: str) -> str:
        return function

    def offered(self, function: str) -> bool:
        return False

    def begins(self, piece: str) -> bool:
        return False


class ToolCalls:
    """The calls of one answer. `names` are those of the functions on offer."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._calls: list[_Call] = []
        self._ids: set[str] = set()
        self._chars = 0

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, part: CallPart) -> Iterator[ToolCallDelta]:
        """What can be said with this piece. Raises `FatalError` where the calls grow too large."""
        name = part.name.strip()
        self._chars += len(part.arguments)
        if self._chars > CALLS_CHARS_MAX:
            raise FatalError("invalid_tool_call", "The arguments of the tool calls are too large.")
        call = self._call_of(part, name) or self._begin(part, name)
        call.given_id = call.given_id or part.id
        call.function = self._joined_name(call, name) or call.function or name
        call.attach(part.attached)
        call.arguments.add(part.arguments)
        for one in self._calls:
            if one.repeats is None:
                if self._is_settled(one.function):
                    yield from self._delta(one, one.arguments.take())
                if not one.id:
                    return  # calls are said in the order in which they began

    def end(self, *, whole: bool, has_reason: bool) -> Iterator[ToolCallDelta | ToolCallFacts]:
        """What is left to be said, and the facts of each call. Raises `FatalError` where one has no name.

        `whole`: the model was through; else a call without a name is one that was cut off. `has_reason`:
        the server said why the answer ended.
        """
        for number, call in enumerate(self._calls, 1):
            if not call.function and whole:
                message = f"The model's tool call {number} is wrong: it has no name."
                raise FatalError("invalid_tool_call", message)
            call.arguments.finish()
        for call in self._meant():
            refusal = self._refusal(call, has_reason=has_reason)
            yield from self._delta(call, call.arguments.rest() or ("" if call.id else NO_ARGUMENTS))
            yield ToolCallFacts(id=call.id, refusal=refusal, attached=call.attached)

    def _meant(self) -> list["_Call"]:
        """The calls without those that say another one again."""
        left_out: set[int] = set()
        for call in self._calls:
            first = call.repeats
            if first is None:
                continue
            unsaid = not call.arguments.begun or call.arguments.empty
            if call.arguments.same_as(first.arguments) or (unsaid and call.has_id_of(first)):
                left_out.add(id(call))
            elif call.has_id_of(first) and not first.id and not first.arguments.begun:
                left_out.add(id(first))
            elif call.has_id_of(first) and call.may_have(first.index, first.given_id):
                first.refusal = call.refusal = SAID_TWICE
        return [call for call in self._calls if call.function and id(call) not in left_out]

    def _refusal(self, call: "_Call", *, has_reason: bool) -> str | None:
        unended = None if call.arguments.begun or has_reason else NO_END
        return call.refusal or unended

    def _call_of(self, part: CallPart, name: str) -> "_Call | None":
        """The call that goes on with `part`, null where it begins one."""
        if not name:
            return self._continued(part)
        call = self._last(lambda call: call.may_have(part.index, part.id))
        if call is None or not call.function:
            return call
        if name != call.function:
            return call if self._joined_name(call, name) else None
        if not call.arguments.whole or not part.arguments.strip():
            return call
        # An empty object that is said again with members was a placeholder for them.
        is_placeholder = call.arguments.empty and bool(part.id) and part.id == call.given_id
        return call if is_placeholder else None

    def _joined_name(self, call: "_Call", name: str) -> str | None:
        """The name of a call whose name comes in pieces; null where this piece is none of it."""
        if not name or call.arguments.begun:
            return None
        if self._names.offered(name) and not name.startswith(call.function):
            return None
        if self._names.offered(name) and self._names.offered(call.function):
            return None
        joined = name if name.startswith(call.function) else call.function + name
        return joined if call.function and self._names.begins(joined) else None

    def _is_settled(self, function: str) -> bool:
        """Whether the name is whole, as far as can be known."""
        return bool(function) and (
            self._names.offered(function) or not self._names.begins(function)
        )

    def _continued(self, part: CallPart) -> "_Call | None":
        """Of calls with the same id or index the last one. Some servers count the index up with each
        piece, so one that names nothing known goes on with the newest call.
        """

        with_id = [call for call in self._calls if part.id and call.given_id == part.id]
        with_index = [
            call for call in self._calls if part.index is not None and call.index == part.index
        ]
        both = [call for call in with_id if call in with_index]
        fitting = both or with_id or with_index or ([] if part.id else self._calls)
        unfinished = [call for call in fitting if not call.arguments.whole]
        if part.arguments and any(call is not fitting[-1] for call in unfinished):
            for call in (*unfinished, fitting[-1]):
                call.refusal = MIXED_UP
        return fitting[-1] if fitting else None

    def _last(self, fits: Callable[["_Call"], bool]) -> "_Call | None":
        return next((call for call in reversed(self._calls) if fits(call)), None)

    def _begin(self, part: CallPart, name: str) -> "_Call":
        if len(self._calls) == CALLS_MAX:
            raise FatalError("invalid_tool_call", f"More than {CALLS_MAX} tool calls at once.")
        repeats = self._last(
            lambda call: (
                bool(name)
                and call.repeats is None
                and call.function == name
                and (
                    call.may_have(part.index, part.id)
                    or (bool(part.id) and call.given_id == part.id)
                )
            )
        )
        for call in self._calls:
            if call is not repeats:
                call.arguments.settle()
        self._calls.append(_Call(part.index, repeats))
        return self._calls[-1]

    def _delta(self, call: "_Call", content: str) -> Iterator[ToolCallDelta]:
        if not content:
            return
        if not call.id:
            call.id = self._new_id(call.given_id)
            # No tool has a name that long: what is cut off changes nothing.
            call.name = storable(self._names.tool(call.function))[:LABEL_CHARS_MAX]
        yield ToolCallDelta(id=call.id, name=call.name, content=content)

    def _new_id(self, given_id: str) -> str:
        """The model's own where it is an id and is not taken, else one that is made up."""
        free = re.match(WHOLE_ID_PATTERN, given_id) and given_id not in self._ids
        id_ = given_id if free else f"call_{uuid.uuid4().hex}"
        self._ids.add(id_)
        return id_


class _Call:
    """One call. `id` and `name` are settled with its first delta, and empty until then.

    `repeats`: the call that this one may be, said again. `refusal`: why it must not run.
    """

    def __init__(self, index: int | None, repeats: "_Call | None") -> None:
        self.index = index
        self.repeats = repeats
        self.given_id = ""
        self.function = ""
        self.id = ""
        self.name = ""
        self.arguments = Arguments()
        self.attached: JsonObject = {}
        self._attaches = True
        self.refusal: str | None = None

    def may_have(self, index: int | None, id_: str) -> bool:
        """Whether neither is another call's."""
        same_index = index is None or self.index is None or index == self.index
        return same_index and (not id_ or not self.given_id or id_ == self.given_id)

    def attach(self, attached: JsonObject) -> None:
        """More that goes back with the call; nothing goes back where it is too much."""
        self._attaches = self._attaches and len({**self.attached, **attached}) <= KEPT_NAMES_MAX
        self.attached = {**self.attached, **attached} if self._attaches else {}

    def has_id_of(self, other: "_Call") -> bool:
        return bool(self.given_id) and self.given_id == other.given_id
