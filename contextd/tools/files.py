"""What a model can do in a workspace: the built-in tools (§8), and the files that a user names (§3.1)."""

import re

import msgspec

from contextd.tools import Tool, ToolError, tool, tool_of
from contextd.tools.text import clip, one_line
from contextd.tools.threads import in_thread
from contextd.tools.workspace import (
    ENTRIES_MAX,
    Entry,
    FilePart,
    Workspace,
    WorkspaceError,
    check_lines,
    path_parts,
)

SHOWN_BYTES_MAX = 65_536
WORDS_BYTES_MAX = 160  # around a file's text: which lines it is, and where it was cut

_LINES = re.compile(r":(?:(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?)?\Z")
_LINES_MEANT = re.compile(r":[0-9-]*\Z")


class FileReference(msgspec.Struct, frozen=True, kw_only=True):
    """A file, or lines of it: from 1, both included."""

    path: str
    first_line: int | None = None
    last_line: int | None = None


def workspace_tools(workspace: Workspace, *, bytes_max: int = SHOWN_BYTES_MAX) -> list[Tool]:
    """`read_file`, `list_directory` and `write_file`. `bytes_max`: how much of a file one call shows."""

    @tool(read_only=True, idempotent=True)
    def read_file(path: str, first_line: int | None = None, last_line: int | None = None) -> str:
        """Reads a text file of the workspace, whole or some lines of it.

        Args:
            path: The file, relative to the workspace, such as "docs/plan.md".
            first_line: The first line to read, counted from 1. Without it: from the start.
            last_line: The last line to read, included. Without it: to the end.
        """
        part = workspace.read(path, first_line=first_line, last_line=last_line, bytes_max=bytes_max)
        return f"{part.text}{_cut_note(part)}" or "The file is empty."

    @tool(read_only=True, idempotent=True)
    def list_directory(path: str = ".") -> str:
        """Lists what is in a folder of the workspace: a name a line, folders with a "/" at the end.

        Args:
            path: The folder, relative to the workspace. "." is the workspace itself.
        """
        listing = workspace.entries(path)
        lines = [_entry_line(entry) for entry in listing.entries]
        if listing.is_cut:
            lines.append(f"[There is more: only {ENTRIES_MAX} entries are shown.]")
        return "\n".join(lines) or "The folder is empty."

    # Idempotent: the whole file is given, so a second write leaves what the first one did.
    @tool(idempotent=True, requires_approval=True)
    def write_file(path: str, content: str) -> str:
        """Writes a text file of the workspace. Replaces it if there is one; makes folders as needed.

        Args:
            path: The file, relative to the workspace.
            content: The whole text of the file.
        """
        written = workspace.write(path, content)
        verb = "Created" if written.is_new else "Replaced"
        return f"{verb} {written.path} ({written.size_bytes} bytes)."

    marked = (read_file, list_directory, write_file)
    return [made for function in marked if (made := tool_of(function)) is not None]


def parse_file_reference(reference: str) -> FileReference:
    """`dir/a.md`, `b.py:10` (a line) or `b.py:10-20` (lines). Raises `WorkspaceError`."""
    found = _LINES.search(reference)
    if _LINES_MEANT.search(reference) and (found is None or found["first"] is None):
        raise WorkspaceError(
            f"{one_line(reference, 200)!r}: after ':' comes a line or a range of lines, as in 'b.py:10-20'."
        )
    path = reference[: found.start()] if found else reference
    first = int(found["first"]) if found else None
    last = int(found["last"] or found["first"]) if found else None
    if not path_parts(path):
        raise WorkspaceError(f"{one_line(reference, 200)!r} names no file.")
    check_lines(first, last)
    return FileReference(path=path, first_line=first, last_line=last)


async def file_reference_text(workspace: Workspace, reference: str, *, bytes_max: int) -> str:
    """What a model is shown for a reference, in at most `bytes_max` bytes.

    A line that says which file and lines, then the text as it is now. Never raises for what is wrong
    with the reference or the file: then the words for that are the text.
    """
    try:
        named = parse_file_reference(reference)
        room = bytes_max - len(named.path.encode()) - WORDS_BYTES_MAX
        part = await in_thread(
            lambda: workspace.read(
                named.path,
                first_line=named.first_line,
                last_line=named.last_line,
                bytes_max=max(room, 1),
            )
        )
    except ToolError as error:
        text = f"File {one_line(reference, 200)}: not shown. {error}"
    else:
        text = f"File {named.path}{_lines_words(part)}:\n{part.text}{_cut_note(part)}"
    return clip(text, bytes_max, "[Cut here: the rest of the file is not shown.]")


def _lines_words(part: FilePart) -> str:
    if not part.first_line:
        return " (empty)"
    total = "" if part.lines is None else f" of {part.lines}"
    return f" (lines {part.first_line} to {part.last_line}{total})"


def _cut_note(part: FilePart) -> str:
    if not part.is_cut:
        return ""
    if not part.text.endswith("\n"):
        return f"\n[Cut here: the rest of line {part.last_line} and what follows is not shown.]"
    return f"[Cut here: go on with line {part.last_line + 1}.]"


def _entry_line(entry: Entry) -> str:
    match entry.kind:
        case "folder":
            return f"{entry.name}/"
        case "link":
            return f"{entry.name} (symbolic link, not followed)"
        case "other":
            return f"{entry.name} (not a file)"
        case _:
            size = "" if entry.size_bytes is None else f" ({entry.size_bytes} bytes)"
            return f"{entry.name}{size}"
