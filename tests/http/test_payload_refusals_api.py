"""§3.1 at the wire: payloads that are refused, with the field that is wrong."""

import os
from pathlib import Path

import pytest
from filing import files, post, workflow
from wire import Api, Json, invalid, problem

BAD_FILES = [
    ({"type": "file_reference"}, "payload.paths"),
    (files(), "payload.paths"),
    (files(*["here.md"] * 101), "payload.paths"),
    ({"type": "file_reference", "paths": "here.md"}, "payload.paths"),
    ({"type": "file_reference", "paths": [1]}, "payload.paths[0]"),
    (files(""), "payload.paths[0]"),
    (files("here.md", "a\0b"), "payload.paths[1]"),
    (files("here.md", "missing.md"), "payload.paths[1]"),
    (files("here.md", "here.md", "x" * 5000), "payload.paths[2]"),
    (files("x" * 300), "payload.paths[0]"),
    (files("folder"), "payload.paths[0]"),
    (files("."), "payload.paths[0]"),
    (files("folder/"), "payload.paths[0]"),
    (files("link.md"), "payload.paths[0]"),
    (files("linked/inner.md"), "payload.paths[0]"),
    (files("pipe"), "payload.paths[0]"),
    (files("binary"), "payload.paths[0]"),
    (files("../here.md"), "payload.paths[0]"),
    (files("folder/../here.md"), "payload.paths[0]"),
    (files("/etc/hostname"), "payload.paths[0]"),
    (files("folder\\inner.md"), "payload.paths[0]"),
    (files("here.md/inner.md"), "payload.paths[0]"),
    (files("here.md:0"), "payload.paths[0]"),
    (files("here.md:3"), "payload.paths[0]"),
    (files("here.md:2-1"), "payload.paths[0]"),
    (files("here.md:"), "payload.paths[0]"),
    (files("here.md:1-"), "payload.paths[0]"),
    (files("here.md:-2"), "payload.paths[0]"),
    (files("here.md:99999999999999999999"), "payload.paths[0]"),
    (files(":1"), "payload.paths[0]"),
    (files("here.md", content="x"), "payload.content"),
    (files("here.md", display_text=1), "payload.display_text"),
    (files("here.md", display_text="a\0b"), "payload.display_text"),
    ({"type": "workflow"}, "payload.workflow"),
    ({"type": "workflow", "workflow": "a b"}, "payload.workflow"),
    ({"type": "workflow", "workflow": 1}, "payload.workflow"),
    ({"type": "workflow", "workflow": "review", "parameters": []}, "payload.parameters"),
    ({"type": "workflow", "workflow": "review", "paths": []}, "payload.paths"),
    ({"type": "other", "content": "x"}, "payload.type"),
    ({"content": "x"}, "payload.type"),
]


@pytest.mark.parametrize(("payload", "field"), BAD_FILES)
def test_refused_payloads(filing: Api, files_folder: Path, payload: Json, field: str) -> None:
    """400 that names the field; nothing is stored."""
    _furnish(files_folder)
    context_id = filing.create()
    invalid(post(filing, context_id, payload), field)
    invalid(post(filing, context_id, payload, respond=False), field)
    context = filing.context(context_id)
    assert (context["revision"], context["message_count"]) == (1, 0)


def _furnish(root: Path) -> None:
    """What there is to refer to: a file, a folder, a pipe, links, and a file that is no text."""
    (root / "here.md").write_text("one\ntwo\n")
    (root / "folder").mkdir(exist_ok=True)
    (root / "folder" / "inner.md").write_text("inner\n")
    (root / "binary").write_bytes(b"a\0b")
    if not (root / "pipe").exists():
        os.mkfifo(root / "pipe")
        (root / "link.md").symlink_to("here.md")
        (root / "linked").symlink_to("folder")


def test_without_a_workspace(api: Api) -> None:
    """A reference is 400; there is nothing to refer to."""
    context_id = api.create()
    body = problem(post(api, context_id, files("a.md")), 400, "invalid_request")
    assert all(error["field"].startswith("payload") for error in body["errors"]), body
    assert api.context(context_id)["message_count"] == 0


def test_an_unknown_context_comes_first(filing: Api) -> None:
    """404 whatever is wrong with the payload's files."""
    problem(post(filing, "nobody", files("missing.md")), 404, "context_not_found")
    problem(post(filing, "nobody", workflow("missing")), 404, "context_not_found")
