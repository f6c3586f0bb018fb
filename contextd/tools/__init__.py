"""The port to tools: what contextd can run for a model (§8).

A tool knows nothing of contexts, SQL or HTTP. It gets arguments that fit its JSON Schema and answers
text. What it raises goes back to the model as an error result, never to the user as a crash.
"""

from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

import msgspec

from contextd.core.values import JsonObject

ToolCallable: TypeAlias = Callable[[JsonObject], Awaitable[object]]


class ToolError(Exception):
    """The tool could not do it; its words are for the model to read."""


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """One tool. `run` answers text, or a value that is given to the model as JSON.

    `read_only`: it changes nothing, so it is offered in the mode `plan`. `idempotent`: running it
    twice does no more than once, so it may be run again after a crash. `requires_approval`: it waits
    for a person unless the context's policy allows it by name.
    """

    name: str
    description: str
    parameters: JsonObject
    run: ToolCallable
    read_only: bool = False
    idempotent: bool = False
    requires_approval: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call of a tool ended. `content` is what the model gets, also of one that failed.

    `error` is a stable word, and null where it succeeded.
    """

    status: Literal["succeeded", "failed", "timed_out"]
    content: str
    error: str | None = None


# Last, as they stand on the types above.
from contextd.tools.functions import tool as tool  # noqa: E402
from contextd.tools.functions import tool_of as tool_of  # noqa: E402
