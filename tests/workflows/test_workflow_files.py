"""Workflows are the files of a folder, as they are now."""

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from workflow_writing import Write

from contextd.core.errors import InvalidRequest, WorkflowNotFound
from contextd.core.workflow import Parameter, ParameterType, Workflow, parameters_schema
from contextd.workflows import Workflows
from contextd.workflows import folder as files

REVIEW = """
    title: Review
    description: Reads code and says what is wrong with it.
    parameters:
      code: {description: What to read, max_length: 100}
      style: {type: enum, choices: [short, long, no], default: short}
      remarks: {type: integer, min: 1, max: 10, default: 3}
      patience: {type: number, required: false}
      praise: {type: boolean, default: false}
"""


def names(workflows: Workflows) -> list[str]:
    return [workflow.name for workflow in workflows.list()]


def error_of(workflows: Workflows, name: str) -> str:
    error = workflows.get(name).error
    assert error is not None
    return error


def parameter(name: str, kind: ParameterType, **facts: object) -> Parameter:
    blank = dict.fromkeys(("default", "choices", "min", "max", "max_length"))
    return Parameter(**{"name": name, "type": kind, "description": "", **blank, **facts})  # type: ignore[arg-type]


def test_a_file_says_what_its_workflow_is(write: Write, workflows: Workflows) -> None:
    """Parameters are required unless a default is given, and come in the order of the file."""
    write("code:review", REVIEW)
    assert workflows.list() == [
        Workflow(
            name="code:review",
            title="Review",
            description="Reads code and says what is wrong with it.",
            parameters=[
                parameter(
                    "code",
                    ParameterType.STRING,
                    description="What to read",
                    required=True,
                    max_length=100,
                ),
                parameter(
                    "style",
                    ParameterType.ENUM,
                    required=False,
                    default="short",
                    choices=["short", "long", "no"],
                ),
                parameter(
                    "remarks", ParameterType.INTEGER, required=False, default=3, min=1, max=10
                ),
                parameter("patience", ParameterType.NUMBER, required=False),
                parameter("praise", ParameterType.BOOLEAN, required=False, default=False),
            ],
        )
    ]
    assert workflows.get("code:review") == workflows.list()[0]


def test_parameters_are_offered_as_json_schema(write: Write, workflows: Workflows) -> None:
    """What a form or a model needs to fill them in."""
    write("review", REVIEW)
    assert parameters_schema(workflows.get("review")) == {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "What to read", "maxLength": 100},
            "style": {"type": "string", "enum": ["short", "long", "no"], "default": "short"},
            "remarks": {"type": "integer", "minimum": 1, "maximum": 10, "default": 3},
            "patience": {"type": "number"},
            "praise": {"type": "boolean", "default": False},
        },
        "required": ["code"],
        "additionalProperties": False,
    }


def test_a_name_that_is_not_there_is_not_found(write: Write, workflows: Workflows) -> None:
    """Whatever the name is: it is never made into a path."""
    write("here")
    for name in ("gone", "", "../here", "here.md", "/here", "here\0"):
        with pytest.raises(WorkflowNotFound) as refused:
            workflows.get(name)
        assert refused.value.facts == {"workflow": name}
        with pytest.raises(WorkflowNotFound):
            workflows.render(name, {})


def test_files_are_read_again_when_they_change(write: Write, workflows: Workflows) -> None:
    """New, changed and removed files are seen by the next call."""
    path = write("greet", body="Hello.")
    assert workflows.render("greet", {}) == "Hello."
    write("greet", body="Good morning.")
    write("part", body="Goodbye.")
    assert workflows.render("greet", {}) == "Good morning."
    assert names(workflows) == ["greet", "part"]
    path.unlink()
    assert names(workflows) == ["part"]


def test_a_file_that_did_not_change_is_not_read_again(
    write: Write, workflows: Workflows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call costs a look at the folder."""
    write("greet")
    before = workflows.list()

    def unexpected(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(files, "read", unexpected)
    assert workflows.list() == before


@pytest.mark.parametrize("folder", [None, Path("/nowhere/at/all")])
def test_without_a_folder_there_are_no_workflows(folder: Path | None) -> None:
    """Nothing to list, and nothing to complain about."""
    workflows = Workflows(folder)
    assert workflows.list() == []
    with pytest.raises(WorkflowNotFound):
        workflows.get("any")


def test_other_files_are_passed_over(
    folder: Path, tmp_path: Path, write: Write, workflows: Workflows
) -> None:
    """Other endings, other names, hidden files, folders, pipes, and links that lead out."""
    write("kept")
    outside = tmp_path / "secret.md"
    outside.write_text("---\n---\nsecret", encoding="utf-8")
    for name in ("notes.txt", ".hidden.md", "two words.md", f"{'x' * 65}.md", "ä.md", ".md"):
        (folder / name).write_text("---\n---\nhello", encoding="utf-8")
    (folder / "folder.md").mkdir()
    os.mkfifo(folder / "pipe.md")
    (folder / "out.md").symlink_to(outside)
    (folder / "broken.md").symlink_to(tmp_path / "gone.md")
    (folder / "circle.md").symlink_to(folder / "circle.md")
    assert names(workflows) == ["kept"]


def test_a_link_within_the_folder_is_followed(folder: Path, workflows: Workflows) -> None:
    """So a folder that is laid out with links can be mounted."""
    (folder / "..data").mkdir()
    (folder / "..data" / "greet.md").write_text("---\n---\nHello.", encoding="utf-8")
    (folder / "greet.md").symlink_to(Path("..data") / "greet.md")
    assert workflows.render("greet", {}) == "Hello."


def test_a_file_that_turns_into_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """Between the look and the reading."""
    (tmp_path / "secret.md").write_text("---\n---\nsecret", encoding="utf-8")
    (folder / "greet.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(files.UnreadableFile):
        files.read(folder / "greet.md")


def test_a_broken_file_does_the_others_no_harm(
    folder: Path, write: Write, workflows: Workflows
) -> None:
    """It is listed with its error, logged once, and cannot be sent."""
    write("good")
    (folder / "bad.md").write_text("no front matter", encoding="utf-8")
    with capture_logs() as logs:
        listed = {workflow.name: workflow.error for workflow in workflows.list()}
        workflows.list()
    assert listed == {"bad": "it must begin with YAML between two lines of ---", "good": None}
    assert [entry["workflow"] for entry in logs] == ["bad"]
    with pytest.raises(InvalidRequest) as refused:
        workflows.render("bad", {})
    assert refused.value.facts["errors"][0].field == "payload.workflow"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"---\n---\n" + b"x" * files.FILE_BYTES_MAX, "larger than 65536 bytes"),
        (b"---\n---\n\xff", "not UTF-8"),
        (b"---\n---\n\0", "U+0000"),
        (b"", "must begin with YAML"),
    ],
)
def test_a_file_that_is_no_text_of_a_bounded_size_is_broken(
    folder: Path, workflows: Workflows, data: bytes, words: str
) -> None:
    """And says why."""
    (folder / "bad.md").write_bytes(data)
    assert words in error_of(workflows, "bad")


def test_line_ends_and_a_mark_of_the_byte_order_do_not_matter(
    folder: Path, workflows: Workflows
) -> None:
    """Editors on other systems write them."""
    (folder / "greet.md").write_bytes("\ufeff---\r\ntitle: Hi\r\n---\r\nOne\r\nTwo\r\n".encode())
    assert workflows.get("greet").title == "Hi"
    assert workflows.render("greet", {}) == "One\nTwo"


def test_the_number_of_workflows_is_bounded(
    write: Write, workflows: Workflows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first by name count; the others are not there."""
    monkeypatch.setattr(files, "FILES_MAX", 2)
    for name in ("c", "a", "b"):
        write(name)
    assert names(workflows) == ["a", "b"]


@pytest.mark.parametrize(
    ("front_matter", "words"),
    [
        ("title: [1]", "Expected `str"),
        ("tittle: x", "unknown field `tittle`"),
        ("- a", "Expected `object`"),
        ("title: a\ntitle: b", "line 2: the same key twice"),
        ("a: &x 1\nb: *x", "line 3: aliases are not read here"),
        ("title: !!python/object:os.system x", "line 2: could not determine a constructor"),
        ("title: {", "line 3: expected the node content"),
        ("title: !!int x", "not YAML that can be read"),
        ("title: !!bool x", "not YAML that can be read"),
        ("title: !!timestamp x", "not YAML that can be read"),
        (f"parameters: {{x: {{type: integer, max: !!int {10**30}}}}}", "within 2^53"),
        ("parameters: {x: {type: number, max: !!float .inf}}", "within 2^53"),
        ("? [a]\n: b", "a key that is no word"),
        ("[" * 5000, "not YAML that can be read"),
        ("parameters: {x: {type: text}}", "Invalid enum value 'text'"),
        ("parameters: {x: {type: enum}}", "choices go with the type enum"),
        ("parameters: {x: {choices: [a]}}", "choices go with the type enum"),
        ("parameters: {x: {type: enum, choices: [a, a]}}", "choices must be different"),
        ("parameters: {x: {type: enum, choices: [1]}}", "Expected `str`"),
        ("parameters: {x: {min: 1}}", "min and max go with"),
        ("parameters: {x: {type: integer, min: 2, max: 1}}", "min is above max"),
        ("parameters: {x: {type: integer, max_length: 2}}", "max_length goes with"),
        ("parameters: {x: {max_length: 0}}", "max_length must be 1 to"),
        ("parameters: {x: {required: true, default: a}}", "a required parameter has no default"),
        ("parameters: {x: {type: integer, default: a}}", "its default must be a whole number"),
        ("parameters: {x: {type: integer, max: 1, default: 2}}", "its default must be at most 1"),
        ("parameters: {for: {}}", "its name must be"),
        ("parameters: {a-b: {}}", "its name must be"),
        ("parameters: {" + ", ".join(f"p{n}: {{}}" for n in range(65)) + "}", "more than 64"),
    ],
)
def test_front_matter_that_makes_no_sense_is_refused_in_words(
    write: Write, workflows: Workflows, front_matter: str, words: str
) -> None:
    """For whoever wrote the file."""
    write("bad", front_matter)
    assert words in error_of(workflows, "bad")


def test_words_of_yaml_are_what_they_look_like(write: Write, workflows: Workflows) -> None:
    """`no` and a date are words, in choices and titles alike."""
    choices = "parameters: {x: {type: enum, choices: [yes, no, on, 2026-11-21], default: no}}"
    write("plain", f"title: 2026-11-21\n{choices}", "{{ x }}")
    assert workflows.get("plain").title == "2026-11-21"
    assert workflows.render("plain", {}) == "no"
    assert workflows.render("plain", {"x": "2026-11-21"}) == "2026-11-21"
