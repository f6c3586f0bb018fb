"""The built-in tools (§8), and the files that a user's message names (§3.1)."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextd.core.values import JsonObject
from contextd.tools import Outcome
from contextd.tools.execution import execute
from contextd.tools.files import (
    FileReference,
    file_reference_text,
    parse_file_reference,
    workspace_tools,
)
from contextd.tools.registry import Toolbox
from contextd.tools.workspace import Workspace, WorkspaceError, line_start

ROOM_BYTES = 100_000


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


async def call(
    workspace: Workspace, name: str, arguments: JsonObject, *, bytes_max: int = ROOM_BYTES
) -> Outcome:
    tool = Toolbox({"built in": workspace_tools(workspace, bytes_max=bytes_max)}).get(name)
    assert tool is not None
    return await execute(tool, arguments, timeout_s=60, result_bytes_max=ROOM_BYTES)


def test_three_tools_are_built_in(workspace: Workspace) -> None:
    """Reading is free, writing needs a person; every parameter is described."""
    tools = workspace_tools(workspace)
    assert [
        (tool.name, tool.read_only, tool.idempotent, tool.requires_approval) for tool in tools
    ] == [
        ("read_file", True, True, False),
        ("list_directory", True, True, False),
        ("write_file", False, True, True),
    ]
    assert all(tool.description for tool in tools)
    for tool in tools:
        assert all(words["description"] for words in tool.parameters["properties"].values())
    assert list(tools[0].parameters["properties"]) == ["path", "first_line", "last_line"]
    assert tools[2].parameters["required"] == ["path", "content"]


async def test_files_are_written_listed_and_read(workspace: Workspace, tmp_path: Path) -> None:
    """As a model sees it."""
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    write = {"path": "docs/a.md", "content": "one\ntwo\n"}
    assert (await call(workspace, "write_file", write)).content == "Created docs/a.md (8 bytes)."
    assert (await call(workspace, "write_file", write)).content == "Replaced docs/a.md (8 bytes)."
    listed = await call(workspace, "list_directory", {})
    assert listed.content == "docs/\nlink (symbolic link, not followed)\npipe (not a file)"
    listed = await call(workspace, "list_directory", {"path": "docs"})
    assert listed.content == "a.md (8 bytes)"
    assert (await call(workspace, "read_file", {"path": "docs/a.md"})).content == "one\ntwo\n"
    lines = {"path": "docs/a.md", "first_line": 2, "last_line": None}
    assert (await call(workspace, "read_file", lines)).content == "two\n"


async def test_what_is_empty_or_cut_is_said_to_be(workspace: Workspace, tmp_path: Path) -> None:
    """In words, and with the line to go on with."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("one\ntwo\nthree\n")
    (tmp_path / "c").write_text("x" * 100)
    for number in range(1001):
        (tmp_path / "empty" / f"{number}").touch()
    listed = (await call(workspace, "list_directory", {"path": "empty"})).content
    assert listed.endswith("\n[There is more: only 1000 entries are shown.]")
    for path in (tmp_path / "empty").iterdir():
        path.unlink()
    assert (await call(workspace, "list_directory", {"path": "empty"})).content == (
        "The folder is empty."
    )
    assert (await call(workspace, "read_file", {"path": "a"})).content == "The file is empty."
    cut = await call(workspace, "read_file", {"path": "b"}, bytes_max=9)
    assert cut.content == "one\ntwo\n[Cut here: go on with line 3.]"
    cut = await call(workspace, "read_file", {"path": "c"}, bytes_max=9)
    assert cut.content == (
        "xxxxxxxxx\n[Cut here: the rest of line 1 and what follows is not shown.]"
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("read_file", {"path": "../secret"}),
        ("list_directory", {"path": "/"}),
        ("write_file", {"path": "../x", "content": ""}),
    ],
)
async def test_a_path_that_leads_out_is_an_error_result(
    workspace: Workspace, name: str, arguments: JsonObject
) -> None:
    """It goes to the model, and nothing was done."""
    ended = await call(workspace, name, arguments)
    assert (ended.status, ended.error) == ("failed", "tool_error")


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("dir/a.md", FileReference(path="dir/a.md")),
        ("b.py:10-20", FileReference(path="b.py", first_line=10, last_line=20)),
        ("b.py:10", FileReference(path="b.py", first_line=10, last_line=10)),
        ("b.py:7-7", FileReference(path="b.py", first_line=7, last_line=7)),
        ("a:b.md", FileReference(path="a:b.md")),
        ("a:3:4", FileReference(path="a:3", first_line=4, last_line=4)),
        ("a b/é.md", FileReference(path="a b/é.md")),
    ],
)
def test_references_name_a_file_and_perhaps_lines(reference: str, parsed: FileReference) -> None:
    """A colon before anything but digits is part of the name."""
    assert parse_file_reference(reference) == parsed


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("", "empty"),
        (":3", "empty"),
        (".:3", "names no file"),
        ("./", "names no file"),
        ("b.py:", "comes a line"),
        ("b.py:-", "comes a line"),
        ("b.py:10-", "comes a line"),
        ("b.py:-10", "comes a line"),
        ("b.py:1-2-3", "comes a line"),
        ("b.py:1234567890", "comes a line"),
        ("b.py:0", "counted from 1"),
        ("b.py:0-4", "counted from 1"),
        ("b.py:20-10", "10, comes before the first, 20"),
        ("../b.py:1", "no '..'"),
        ("/b.py", "relative"),
        ("b\x00.py", "control"),
        ("b.py:1\n", "control"),
    ],
)
def test_references_that_name_nothing_are_refused(reference: str, says: str) -> None:
    """When they are sent, so before any file is looked at."""
    with pytest.raises(WorkspaceError, match=says):
        parse_file_reference(reference)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("b.py", "File b.py (lines 1 to 4 of 4):\none\ntwo\nthree\nfour\n"),
        ("b.py:2-3", "File b.py (lines 2 to 3 of 4):\ntwo\nthree\n"),
        ("b.py:4", "File b.py (lines 4 to 4 of 4):\nfour\n"),
        ("e", "File e (empty):\n"),
        ("b.py:9", "File b.py:9: not shown. 'b.py' has no line 9 to be shown: it has 4 lines."),
        ("gone.md", "File gone.md: not shown. 'gone.md' does not exist."),
        ("../x", "File ../x: not shown. '../x': a path has no '..'."),
        ("bin", "File bin: not shown. 'bin' is not a text file."),
    ],
)
async def test_a_model_is_shown_the_file_or_why_not(
    workspace: Workspace, tmp_path: Path, reference: str, text: str
) -> None:
    """A turn goes on without a file that has gone since it was named."""
    (tmp_path / "b.py").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "e").write_text("")
    (tmp_path / "bin").write_bytes(b"\x00")
    assert await file_reference_text(workspace, reference, bytes_max=ROOM_BYTES) == text


@pytest.mark.parametrize("bytes_max", [200, 201, 2_000])
async def test_what_a_model_is_shown_has_a_limit(
    workspace: Workspace, tmp_path: Path, bytes_max: int
) -> None:
    """All of it together, and the cut is said."""
    (tmp_path / "a").write_text("é line\n" * 10_000)
    text = await file_reference_text(workspace, "a", bytes_max=bytes_max)
    assert len(text.encode()) <= bytes_max
    assert text.startswith("File a (lines 1 to ")
    *lines, note = text.splitlines()
    assert set(lines[1:]) == {"é line"}
    assert lines[0] == f"File a (lines 1 to {len(lines) - 1} of 10000):"
    assert note == f"[Cut here: go on with line {len(lines)}.]"


@given(
    st.lists(st.sampled_from([b"", b"a", b"x" * 40_000, b"\n" * 70_000]), max_size=6),
    st.booleans(),
    st.integers(1, 200_000),
)
@settings(max_examples=60, deadline=None)
def test_a_line_is_found_wherever_it_is(pieces: list[bytes], ended: bool, line: int) -> None:
    """Counted by blocks, it begins where a reader who goes line by line would find it."""
    data = b"\n".join(pieces) + b"\n" * ended
    lines = data.split(b"\n")
    expected = len(b"\n".join(lines[: line - 1])) + (line > 1) if line <= len(lines) else len(data)
    assert line_start(data, line) == expected
