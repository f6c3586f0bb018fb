"""How much of an MCP server's words is taken, and what is said when it is more (§8).

A message is bounded before it is put together: a line of a child, an event or a body over HTTP. What is
too long costs the call that it answers, where that can be told; else it costs the connection.
"""

import re
from collections.abc import Iterator
from typing import Any

import mcp_types
import msgspec
from pydantic import ValidationError

from contextd.settings import environment_name

SKIPPED_MAX = 16  # times the limit: a line that is longer still ends the connection
# The SDK makes a model of each part, which takes 10 to 60 µs of the loop's time.
PARTS_MAX = 500  # of one answer
TOOLS_MAX = 1000  # of one server; more are left out
OBJECTS_MAX = 10_000  # and arrays, of one message
VALUES_MAX = 200_000
_PREFIX_BYTES = 512
_WRONG = "contextd/wrong"  # in the `_meta` of what stands for a tool of wrong form

# What the SDK's client looks at. Others are many, and nobody waits for them.
LIST_CHANGED = "notifications/tools/list_changed"
_HEARD = (LIST_CHANGED, "notifications/subscriptions/")

# In what a message begins with: its id, before anything that has members of its own.
_ID = re.compile(rb'\s*\{[^{}\[\]]*?"id"\s*:\s*(\d{1,15}|"[^"\\]{0,64}")')


# What this module says of a message, as it comes back in an error of the SDK's.
_SAID = re.compile(r"a[n]? (?:message|answer|list) of more than \d+ [a-z]+(?: \([A-Z_]+\))?")


def limit_said(words: str) -> str | None:
    """Which limit an error of the SDK's is about; null where it is about none."""
    found = _SAID.search(words)
    return None if found is None else found[0]


class McpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`message_bytes_max` bounds one message; `log_stderr` says whether complaints are logged."""

    message_bytes_max: int = 4 * 1024 * 1024
    log_stderr: bool = False

    @property
    def too_long(self) -> str:
        """The words for what is more than that."""
        name = environment_name("mcp_message_bytes_max")
        return f"a message of more than {self.message_bytes_max} bytes ({name})"


class TooLong(msgspec.Struct, frozen=True):
    """In place of a line. `answers` is the id of the request that it would have answered, if it says so."""

    answers: int | str | None


class TooManyError(Exception):
    """A message has more in it than can be read in a moment; its text says of what."""


class EndlessLineError(Exception):
    """A line that has no end within reason."""


class Lines:
    """Cuts bytes into lines of at most `bytes_max`; holds no more than that of one."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._parts: list[bytes] = []
        self._size = 0
        self._skipping = False

    def take(self, data: bytes) -> Iterator[bytes | TooLong]:
        """The lines that end in `data`, and where one becomes too long. Raises `EndlessLineError`."""
        *ended, rest = data.split(b"\n")
        for piece in ended:
            yield from self._add(piece)
            if not self._skipping:
                yield b"".join(self._parts)
            self._parts, self._size, self._skipping = [], 0, False
        yield from self._add(rest)

    def _add(self, piece: bytes) -> Iterator[TooLong]:
        self._size += len(piece)
        if self._skipping:
            if self._size > SKIPPED_MAX * self._bytes_max:
                raise EndlessLineError
            return
        self._parts.append(piece)
        if self._size > self._bytes_max:
            beginning = b"".join(self._parts)[:_PREFIX_BYTES]
            self._parts, self._skipping = [], True
            yield TooLong(answered_id(beginning))


def answered_id(line: bytes) -> int | str | None:
    """The id of the request that a broken answer is for; null where it does not say."""
    found = _ID.match(line[:_PREFIX_BYTES])
    if found is None or b'"method"' in found[0]:
        return None
    id_: int | str = msgspec.json.decode(found[1])
    return id_


class _Result(msgspec.Struct):
    tools: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    content: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class _Answer(msgspec.Struct):
    result: _Result | msgspec.UnsetType = msgspec.UNSET


def is_heard(method: str) -> bool:
    """Whether a notification is for anybody."""
    return method.startswith(_HEARD)


def readable(message: bytes) -> bytes:
    """The message as it may be given to the SDK, which stops the loop while it reads one.

    Of a list of tools no more than are taken; one that the SDK would refuse, and with it the whole list,
    is replaced by its name and what is wrong (`wrong_with`). Raises `TooManyError`, and `ValueError` or
    `RecursionError` for what is no message.
    """
    if message.count(b"{") + message.count(b"[") <= PARTS_MAX:
        message = message if message.count(b",") <= VALUES_MAX else _counted(message)
        return _with_good_tools(message)
    if message.count(b"{") + message.count(b"[") > 20 * OBJECTS_MAX:
        message = _counted(message)  # before anything is made of so many
    result = msgspec.json.decode(message, type=_Answer).result
    if result is not msgspec.UNSET:
        if result.content is not msgspec.UNSET and len(result.content) > PARTS_MAX:
            raise TooManyError(f"an answer of more than {PARTS_MAX} parts")
        if result.tools is not msgspec.UNSET and len(result.tools) > TOOLS_MAX:
            # One more than are taken, so that it is told that some are left out.
            message = _with_tools(message, result.tools[: TOOLS_MAX + 1])
    return _with_good_tools(_counted(message))


def wrong_with(tool: mcp_types.Tool) -> str | None:
    """What was wrong with a tool that `readable` has replaced; null for one that stands as it came."""
    return (tool.meta or {}).get(_WRONG)


def _with_good_tools(message: bytes) -> bytes:
    if b'"tools"' not in message:
        return message
    result = msgspec.json.decode(message, type=_Answer).result
    if result is msgspec.UNSET or result.tools is msgspec.UNSET:
        return message
    tools = [_good(msgspec.json.decode(tool)) for tool in result.tools]
    if all(was is None for _, was in tools):
        return message
    return _with_tools(message, [msgspec.Raw(msgspec.json.encode(tool)) for tool, _ in tools])


def _good(tool: Any) -> tuple[Any, str | None]:
    """The tool as it is, or what stands for it and what is wrong with it."""
    wrong = _wrong(tool)
    if wrong is None:
        return tool, None
    named = isinstance(tool, dict) and isinstance(tool.get("name"), str)
    name = tool["name"] if named else "(without a name)"
    return {"name": name, "inputSchema": {"type": "object"}, "_meta": {_WRONG: wrong}}, wrong


def _wrong(tool: Any) -> str | None:
    if not isinstance(tool, dict):
        return "it is no object"
    for field in ("inputSchema", "outputSchema"):
        schema = tool.get(field)
        is_missing = field == "outputSchema" and schema is None
        if not is_missing and (not isinstance(schema, dict) or schema.get("type") != "object"):
            return f"its {field} is not of type object"
    try:
        mcp_types.Tool.model_validate(tool, by_name=False)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        return f"its {place[:100]} is of wrong form"
    return None


def _with_tools(message: bytes, tools: list[msgspec.Raw]) -> bytes:
    whole = msgspec.json.decode(message, type=dict[str, msgspec.Raw])
    result = msgspec.json.decode(whole["result"], type=dict[str, msgspec.Raw])
    result["tools"] = msgspec.Raw(msgspec.json.encode(tools))
    return msgspec.json.encode({**whole, "result": result})


def _counted(message: bytes) -> bytes:
    """Counts what stands outside of texts, whose quotes come in pairs."""
    if message.count(b"{") + message.count(b"[") > OBJECTS_MAX or message.count(b",") > VALUES_MAX:
        plain = message.replace(rb"\\", b"").replace(rb"\"", b"")
        outside = b"".join(plain.split(b'"')[::2])
        if outside.count(b"{") + outside.count(b"[") > OBJECTS_MAX:
            raise TooManyError(f"a message of more than {OBJECTS_MAX} objects")
        if outside.count(b",") > VALUES_MAX:
            raise TooManyError(f"a message of more than {VALUES_MAX} values")
    return message
