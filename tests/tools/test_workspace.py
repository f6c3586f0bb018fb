"""A workspace reads, lists and writes what is in its folder (§8)."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace_parts import SECRET, read, snapshot

from contextd.tools.workspace import (
    ENTRIES_MAX,
    FILE_BYTES_MAX,
    WRITE_BYTES_MAX,
    Entry,
    FilePart,
    Workspace,
    WorkspaceError,
)


def test_a_file_is_read_whole(workspace: Workspace, root: Path) -> None:
    """Its text exactly, line ends and all, and how many lines there are."""
    (root / "docs").mkdir()
    (root / "docs" / "a.md").write_bytes("é\r\nb\n\nd".encode())
    part = read(workspace, "docs/a.md")
    assert part == FilePart(
        path="docs/a.md", text="é\r\nb\n\nd", first_line=1, last_line=4, lines=4, is_cut=False
    )
    assert read(workspace, "./docs//a.md").text == part.text


@pytest.mark.parametrize(
    ("lines", "text", "shown"),
    [
        ({"first_line": 2}, "2\n3\n4\n", (2, 4)),
        ({"last_line": 2}, "1\n2\n", (1, 2)),
        ({"first_line": 2, "last_line": 3}, "2\n3\n", (2, 3)),
        ({"first_line": 4, "last_line": 4}, "4\n", (4, 4)),
        ({"first_line": 3, "last_line": 999_999_999}, "3\n4\n", (3, 4)),
    ],
)
def test_lines_are_counted_from_one_and_both_included(
    workspace: Workspace, root: Path, lines: dict[str, int], text: str, shown: tuple[int, int]
) -> None:
    """A last line beyond the end means the end. A last newline begins no line."""
    (root / "a").write_text("1\n2\n3\n4\n")
    part = read(workspace, "a", **lines)
    assert (part.text, (part.first_line, part.last_line)) == (text, shown)
    assert (part.lines, part.is_cut) == (4, False)


def test_an_empty_file_has_no_lines(workspace: Workspace, root: Path) -> None:
    """It can be read all the same."""
    (root / "a").write_text("")
    part = read(workspace, "a")
    assert (part.text, part.first_line, part.last_line, part.lines) == ("", 0, 0, 0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"first_line": 5}, "no line 5 .* has 4 lines"),
        ({"first_line": 999_999_999}, "no line 999999999"),
        ({"first_line": 0}, "counted from 1"),
        ({"last_line": 0}, "counted from 1"),
        ({"first_line": -1}, "counted from 1"),
        ({"first_line": 3, "last_line": 2}, "2, comes before the first, 3"),
    ],
)
def test_lines_that_there_are_not_are_refused(
    workspace: Workspace, root: Path, lines: dict[str, int], says: str
) -> None:
    """In words that give the model the numbers it needs."""
    (root / "a").write_text("1\n2\n3\n4\n")
    with pytest.raises(WorkspaceError, match=says):
        read(workspace, "a", **lines)


def test_a_text_that_is_too_long_is_cut_after_a_line(workspace: Workspace, root: Path) -> None:
    """So that the next read can go on with the line after it; joined they are the file."""
    whole = "".join(f"{number} é\n" for number in range(1, 200))
    (root / "a").write_text(whole)
    texts, first = [], 1
    while True:
        part = read(workspace, "a", 50, first_line=first)
        texts.append(part.text)
        assert len(part.text.encode()) <= 50
        if not part.is_cut:
            break
        first = part.last_line + 1
    assert "".join(texts) == whole
    assert len(texts) > 5


@pytest.mark.parametrize("bytes_max", range(1, 8))
def test_a_line_that_is_too_long_is_cut_on_a_character(
    workspace: Workspace, root: Path, bytes_max: int
) -> None:
    """Never within one, and never beyond the limit."""
    (root / "a").write_text("é😀é😀")
    part = read(workspace, "a", bytes_max)
    assert part.is_cut
    assert "é😀é😀".startswith(part.text)
    assert bytes_max - 4 < len(part.text.encode()) <= bytes_max


def test_what_is_not_utf8_is_replaced_within_the_limit(workspace: Workspace, root: Path) -> None:
    """U+FFFD is three bytes for one, which does not lift the limit."""
    (root / "a").write_bytes(b"caf\xe9")
    assert read(workspace, "a").text == "caf\ufffd"
    (root / "b").write_bytes(b"\xe9" * 90)
    part = read(workspace, "b", 100)
    assert (part.text, part.is_cut) == ("\ufffd" * 33, True)


def test_a_binary_file_is_said_to_be_one(workspace: Workspace, root: Path) -> None:
    """Nothing of it is shown."""
    (root / "a.png").write_bytes(b"\x89PNG\x00\x00")
    with pytest.raises(WorkspaceError, match="is not a text file"):
        read(workspace, "a.png")


def test_of_a_huge_file_only_the_beginning_is_looked_at(workspace: Workspace, root: Path) -> None:
    """A file of a terabyte, sparse, costs no more than the limit."""
    (root / "a").write_text("one\ntwo\n" + "x" * FILE_BYTES_MAX)
    assert read(workspace, "a", first_line=2, last_line=2).text == "two\n"
    part = read(workspace, "a")
    assert (part.text, part.lines, part.is_cut) == ("one\ntwo\n", None, True)
    with pytest.raises(WorkspaceError, match=r"no line 4 .* more than \d+ bytes"):
        read(workspace, "a", first_line=4)
    os.truncate(root / "a", 2**40)
    assert read(workspace, "a", first_line=2, last_line=2).text == "two\n"


def test_a_folder_s_entries_are_listed_by_name(workspace: Workspace, root: Path) -> None:
    """With what they are; links are not looked behind, and no name breaks a line."""
    (root / "b").mkdir()
    (root / "a.txt").write_text("four")
    (root / "c").symlink_to("/etc")
    os.mkfifo(root / "d")
    (root / "e\n").write_text("")
    (root / os.fsdecode(b"f\xff")).write_text("")
    listing = workspace.entries()
    assert listing.entries == [
        Entry(name="a.txt", kind="file", size_bytes=4),
        Entry(name="b", kind="folder"),
        Entry(name="c", kind="link"),
        Entry(name="d", kind="other"),
        Entry(name="e\ufffd", kind="file", size_bytes=0),
        Entry(name="f\ufffd", kind="file", size_bytes=0),
    ]
    assert not listing.is_cut
    assert workspace.entries("b").entries == []


def test_a_folder_with_very_many_entries_is_cut(workspace: Workspace, root: Path) -> None:
    """At the limit all are listed; one more, and it says that there are more."""
    for number in range(ENTRIES_MAX):
        (root / f"{number}").touch()
    listing = workspace.entries(".")
    assert (len(listing.entries), listing.is_cut) == (ENTRIES_MAX, False)
    (root / "more").touch()
    listing = workspace.entries(".")
    assert (len(listing.entries), listing.is_cut) == (ENTRIES_MAX, True)


def test_a_write_makes_the_file_and_its_folders(workspace: Workspace, root: Path) -> None:
    """Nothing else is left beside it."""
    written = workspace.write("new/deep/a.md", "é\n")
    assert (written.path, written.size_bytes, written.is_new) == ("new/deep/a.md", 3, True)
    assert [path.name for path in (root / "new" / "deep").iterdir()] == ["a.md"]
    assert (root / "new/deep/a.md").read_bytes() == "é\n".encode()


def test_a_write_replaces_a_file_at_once_and_keeps_its_mode(
    workspace: Workspace, root: Path
) -> None:
    """Who has the old one open still reads the old text: it was never half of each."""
    (root / "a.sh").write_text("old")
    (root / "a.sh").chmod(0o750)
    with (root / "a.sh").open() as old:
        assert not workspace.write("a.sh", "new and longer").is_new
        assert old.read() == "old"
    assert (root / "a.sh").read_text() == "new and longer"
    assert stat.S_IMODE((root / "a.sh").stat().st_mode) == 0o750


def test_a_write_through_a_hard_link_does_not_reach_the_other_name(
    workspace: Workspace, root: Path, outside: Path
) -> None:
    """The name gets another file; what is outside stays as it was."""
    os.link(outside / "secret.txt", root / "a")
    workspace.write("a", "mine")
    assert (outside / "secret.txt").read_text() == SECRET


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to("elsewhere"), "symbolic link"),
        (lambda path: (path.write_text("x"), path.chmod(0o444)), "may not be accessed"),
    ],
)
def test_only_files_that_may_be_written_are_replaced(
    workspace: Workspace, root: Path, make: Callable[[Path], object], says: str
) -> None:
    """All else stays as it is, and no file is left behind."""
    make(root / "a")
    before = snapshot(root)
    with pytest.raises(WorkspaceError, match=says):
        workspace.write("a", "new")
    assert snapshot(root) == before


def test_a_write_that_fails_leaves_nothing_behind(workspace: Workspace, root: Path) -> None:
    """A name that is too long is found out only by the system, in the middle of it."""
    with pytest.raises(WorkspaceError, match="too long"):
        workspace.write("a" * 300, "x")
    with pytest.raises(WorkspaceError, match=f"larger than {WRITE_BYTES_MAX}"):
        workspace.write("a", "é" * (WRITE_BYTES_MAX // 2) + "x")
    with pytest.raises(WorkspaceError, match="half of a surrogate pair"):
        workspace.write("a", "\ud800")
    assert list(root.iterdir()) == []


def test_what_is_no_file_is_neither_opened_for_long_nor_read(
    workspace: Workspace, root: Path
) -> None:
    """A FIFO that nobody writes to would hold up who opens it; a socket, a folder, the root."""
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    (root / "file").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root)  # the name of a socket has to be short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        for path, says in (
            ("fifo", "is not a file"),
            ("socket", "is not a file"),
            ("folder", "is a folder"),
            (".", "is a folder"),
            ("missing", "does not exist"),
            ("missing/deeper", "does not exist"),
            ("file/deeper", "not a folder"),
        ):
            with pytest.raises(WorkspaceError, match=says):
                read(workspace, path)
    with pytest.raises(WorkspaceError, match="not a folder"):
        workspace.entries("file")
    with pytest.raises(WorkspaceError, match="is a folder"):
        workspace.write(".", "x")


@pytest.mark.skipif(not os.access("/dev/null", os.R_OK), reason="no devices here")
def test_a_device_is_not_read() -> None:
    """A workspace could be a folder that has some."""
    with pytest.raises(WorkspaceError, match="is not a file"):
        read(Workspace("/dev"), "null")


def test_a_workspace_is_a_folder(tmp_path: Path) -> None:
    """One that is named through a link is the folder behind it, as its owner meant."""
    with pytest.raises(WorkspaceError, match="not a folder"):
        Workspace(tmp_path / "missing")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    Workspace(tmp_path / "link").write("a", "x")
    assert (tmp_path / "real" / "a").read_text() == "x"
