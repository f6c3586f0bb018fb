"""No path leads out of a workspace (§8)."""

import itertools
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workspace_parts import SECRET, read, snapshot

from contextd.tools.workspace import PARTS_MAX, Workspace, WorkspaceError


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "empty"),
        ("/etc/passwd", "relative"),
        ("//etc/passwd", "relative"),
        ("..", "no '..'"),
        ("../outside/secret.txt", "no '..'"),
        ("a/../../outside/secret.txt", "no '..'"),
        ("a/..", "no '..'"),
        ("..\\outside\\secret.txt", "separated by '/'"),
        ("C:\\secret.txt", "separated by '/'"),
        ("a\x00b", "control"),
        ("a\n", "control"),
        ("a\x7f", "control"),
        ("\udcff", "broken"),
        ("a/" * (PARTS_MAX + 1), "parts"),
        ("a" * 5_000, "bytes"),
    ],
)
def test_paths_that_could_mean_something_else_are_refused(
    workspace: Workspace, outside: Path, path: str, says: str
) -> None:
    """By every operation, before the disk is looked at, in a line that a model can read."""
    for operation in (
        lambda: read(workspace, path),
        lambda: workspace.entries(path),
        lambda: workspace.write(path, "x"),
    ):
        with pytest.raises(WorkspaceError, match=says) as refused:
            operation()
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()


def test_links_are_followed_nowhere(workspace: Workspace, root: Path, outside: Path) -> None:
    """Not to a file, not through a folder, not where they stay inside, and not to be written."""
    (root / "inside.txt").write_text("fine")
    (root / "to_file").symlink_to(outside / "secret.txt")
    (root / "to_folder").symlink_to(outside)
    (root / "to_root").symlink_to(".")
    (root / "to_inside").symlink_to("inside.txt")
    (root / "dangling").symlink_to(outside / "new.txt")
    before = snapshot(root.parent)
    for path in ("to_file", "to_folder/secret.txt", "to_root/inside.txt", "to_inside", "dangling"):
        with pytest.raises(WorkspaceError, match="link"):
            read(workspace, path)
        with pytest.raises(WorkspaceError, match="link"):
            workspace.write(path, "x")
    for path in ("to_folder", "to_root", "to_folder/deeper"):
        with pytest.raises(WorkspaceError, match="link"):
            workspace.entries(path)
    assert snapshot(root.parent) == before


def swap(root: Path, over: threading.Event) -> None:
    """`d` is a folder and a link by turns. A folder that a write makes in between is put away."""
    folder, link, aside = root / "d", root / "l", root / "aside"
    made = itertools.count()

    def put(source: Path) -> None:
        while source.is_symlink() or source.exists():
            try:
                os.rename(source, folder)
            except OSError:
                os.rename(folder, root / f"made{next(made)}")

    while not over.is_set():
        os.rename(folder, aside)
        put(link)
        os.rename(folder, link)
        put(aside)


def test_a_folder_that_is_swapped_for_a_link_all_the_time_is_no_way_out(
    workspace: Workspace, root: Path, outside: Path
) -> None:
    """Between any two steps of a read, a list or a write: it is what is inside, or an error."""
    (root / "d").mkdir()
    (root / "d" / "secret.txt").write_text("inside")
    (root / "l").symlink_to(outside)
    (outside / "more.txt").write_text(SECRET)
    before = snapshot(outside)
    over = threading.Event()
    swapping = threading.Thread(target=swap, args=(root, over))
    swapping.start()
    seen: Counter[str] = Counter()
    try:
        for number in range(20_000):
            for operation in (
                lambda: read(workspace, "d/secret.txt").text,
                lambda: "leak" if "more.txt" in str(workspace.entries("d").entries) else "False",
                lambda: workspace.write(f"d/new{number}/a", "x").is_new,  # noqa: B023
            ):
                try:
                    seen[str(operation())] += 1
                except WorkspaceError as error:
                    seen["link" if "link" in str(error) else "gone"] += 1
            if seen["inside"] > 30 and seen["link"] > 30:
                break
    finally:
        over.set()
        swapping.join()
    assert seen["inside"]
    assert seen["link"]
    assert set(seen) <= {"inside", "False", "True", "link", "gone"}
    assert seen["True"], "writes and their folders came about"
    assert SECRET not in seen
    assert snapshot(outside) == before


PLAIN = ".. . ~ a A b.txt link loop up folder file C: %2e%2e ... ..; ..%00 secret.txt outside"
ODD = ["", "/", "\\", "\0", ".. ", " ..", ".\u200c.", "..\u200d", "\uff0e\uff0e", "\u2025"]
PIECES = st.sampled_from([*PLAIN.split(), *ODD, "\u2215", "\u00e9", "e\u0301", "\ud800"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, min_size=1, max_size=6), st.sampled_from(["/", "\\", "//", "/./"]))
def test_no_path_leads_out(
    workspace: Workspace, root: Path, outside: Path, pieces: list[str], separator: str
) -> None:
    """Whatever it is made of: nothing outside is read, listed, made or changed."""
    if not (root / "link").is_symlink():
        (root / "link").symlink_to(outside)
        (root / "file").symlink_to(outside / "secret.txt")
        (root / "loop").symlink_to("loop")
        (root / "up").symlink_to("..")
        (root / "folder").mkdir()
    before = snapshot(outside), sorted(path.name for path in root.parent.iterdir())
    path = separator.join(pieces)
    for operation in (
        lambda: read(workspace, path).text,
        lambda: workspace.entries(path).entries,
        lambda: workspace.write(path, "x"),
    ):
        try:
            found = operation()
        except WorkspaceError:
            continue
        assert SECRET not in str(found)
        assert "'secret.txt', kind='file', size_bytes=18" not in str(found)
    assert (snapshot(outside), sorted(path.name for path in root.parent.iterdir())) == before
