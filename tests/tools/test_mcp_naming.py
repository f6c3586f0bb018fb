"""What MCP tools are called, and what is believed of them."""

import re
from typing import Any

import mcp_types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.values import JsonObject
from contextd.tools import Tool
from contextd.tools.mcp_file import McpServer
from contextd.tools.mcp_naming import DESCRIPTION_CHARS_MAX, offered, tool_name

SERVER_NAMES = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9]|[_-][A-Za-z0-9]){0,15}", fullmatch=True)


async def nothing(_arguments: JsonObject) -> object:
    return ""


def offer(hints: dict[str, Any] | None = None, **entry: Any) -> Tool:
    annotations = None if hints is None else mcp_types.ToolAnnotations(**hints)
    tool = mcp_types.Tool(name="t", input_schema={"type": "object"}, annotations=annotations)
    return offered(McpServer(name="s", command="c", **entry), tool, nothing)


def test_a_name_that_fits_is_kept() -> None:
    """The server's, two underscores, the tool's own."""
    assert tool_name("files", "read_file") == "files__read_file"
    assert tool_name("f", "x" * 61) == f"f__{'x' * 61}"


@pytest.mark.parametrize("tool", ["a.b", "a b", "ä", "a/b", "", "x" * 62, "\ud800"])
def test_a_name_that_does_not_fit_is_made_to(tool: str) -> None:
    """And ends with a hash of what it was, so it is the same next time."""
    name = tool_name("f", tool)
    assert re.fullmatch(r"f__[A-Za-z0-9_-]{0,61}", name)
    assert re.search(r"-[0-9a-f]{8}$", name)
    assert len(name) <= 64
    assert name == tool_name("f", tool)


@given(SERVER_NAMES, st.text(max_size=80), SERVER_NAMES, st.text(max_size=80))
def test_no_two_tools_have_one_name(server: str, tool: str, other: str, another: str) -> None:
    """Of whatever servers, and every name is one that a model's server takes."""
    first, second = tool_name(server, tool), tool_name(other, another)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", first)
    assert (first == second) == ((server, tool) == (other, another))


def test_underscores_do_not_make_one_name_of_two() -> None:
    """`a` with `_b` and `a_` with `b` would be alike, so no server is called `a_`."""
    assert tool_name("a", "_b") == "a___b"
    assert tool_name("a", "b__c") == "a__b__c"
    assert tool_name("a-b", "c") != tool_name("a", "b__c")


@pytest.mark.parametrize(
    ("hints", "read_only", "idempotent", "requires_approval"),
    [
        (None, False, False, True),
        ({}, False, False, True),
        ({"read_only_hint": True}, True, True, False),
        ({"read_only_hint": True, "destructive_hint": True}, True, True, False),
        ({"read_only_hint": False}, False, False, True),
        ({"destructive_hint": False}, False, False, False),
        ({"destructive_hint": True}, False, False, True),
        ({"idempotent_hint": True}, False, True, True),
        ({"destructive_hint": False, "idempotent_hint": True}, False, True, False),
    ],
)
def test_hints(
    hints: dict[str, Any] | None, read_only: bool, idempotent: bool, requires_approval: bool
) -> None:
    """A tool of which nothing is known may do anything."""
    tool = offer(hints)
    assert (tool.read_only, tool.idempotent, tool.requires_approval) == (
        read_only,
        idempotent,
        requires_approval,
    )


@pytest.mark.parametrize(
    ("asked", "requires_approval"),
    [(True, True), (False, False), (("t",), True), (("other",), False), ((), False)],
)
@pytest.mark.parametrize("hints", [None, {"read_only_hint": True}, {"destructive_hint": True}])
def test_the_file_has_the_last_word(
    asked: bool | tuple[str, ...], requires_approval: bool, hints: dict[str, Any] | None
) -> None:
    """Whatever the server hints."""
    assert offer(hints, requires_approval=asked).requires_approval is requires_approval


def test_the_file_can_say_that_a_tool_is_idempotent() -> None:
    """By the server's own name for it."""
    assert offer(None, idempotent=("t",)).idempotent
    assert not offer(None, idempotent=("other",)).idempotent


def test_a_tool_is_described_by_what_there_is() -> None:
    """Its description, or else a title; cut where it is endless."""
    server = McpServer(name="s", command="c")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    described = mcp_types.Tool(name="t", title="T", description="d" * 20_000, input_schema=schema)
    tool = offered(server, described, nothing)
    assert tool.description == "d" * DESCRIPTION_CHARS_MAX
    assert tool.parameters == schema
    assert tool.run is nothing
    titled = mcp_types.Tool(name="t", title="T", input_schema=schema)
    assert offered(server, titled, nothing).description == "T"
