"""The pages say what the code says: names, numbers, links and drawings."""

import re
import tempfile
from enum import StrEnum
from pathlib import Path
from urllib.parse import unquote

import machine_page
import pages
import pytest
import settings_table
from pages import ROOT

from contextd.cli import cli
from contextd.core import errors, machine, message, signal, turn
from contextd.http.problems import STATUSES, TYPE_PREFIX
from contextd.settings import NAMES, environment_name

SOURCE = {path: path.read_text() for path in sorted((ROOT / "contextd").rglob("*.py"))}
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in pages.PAGES]
SIGNALS = [
    type_.__struct_config__.tag
    for type_ in (
        signal.StateChanged,
        signal.ContentDelta,
        signal.MessageCompleted,
        signal.Heartbeat,
    )
]


def page(name: str) -> str:
    return pages.text(ROOT / name)


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_has_a_row_with_its_names_default_and_values(name: str) -> None:
    """docs/running.md gives what the code gives, and a sentence."""
    expected = list(settings_table.cells(name))
    found = [row for row in pages.rows(pages.doc("running.md")) if row[0] == expected[0]]
    assert [row[:4] for row in found] == [expected]
    assert found[0][4].endswith(".")


def test_no_page_names_a_setting_that_does_not_exist() -> None:
    """A name that begins like a setting is one, or the clients' CONTEXTD_URL."""
    known = {environment_name(name) for name in NAMES} | {url_variable()}
    assert set(re.findall(r"CONTEXTD_[A-Z0-9_]*[A-Z0-9]", pages.everything())) <= known


def url_variable() -> str:
    """The variable of the clients' `--url`."""
    (option,) = (option for option in cli.commands["ls"].params if option.name == "url")
    return str(option.envvar)


def test_no_page_names_an_option_that_does_not_exist() -> None:
    """An option in back quotes, or in a command of contextd's, belongs to one of its commands."""
    known = {
        name
        for command in (cli, *cli.commands.values())
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    named = {part for code in pages.codes(pages.everything()) for part in options(code)}
    lines = [line for text in map(pages.text, pages.PAGES) for line in pages.indented(text)]
    lines += "".join(pages.blocks(page("README.md"), "console")).splitlines()
    named |= {part for line in lines if "contextd " in line for part in options(line)}
    # Options of curl, pip and Alembic, which the pages name as well.
    assert named - {"--help", "--max-time", "--autogenerate"} <= known


def options(code: str) -> list[str]:
    return re.findall(r"(?<!\S)--[a-z][a-z-]*", code)


@pytest.mark.parametrize("error", STATUSES, ids=lambda error: error.code)
def test_each_error_code_has_a_row_with_its_status(error: type[errors.ContextdError]) -> None:
    """docs/protocol.md §1 is the list of codes."""
    found = [row for row in pages.rows(pages.doc("protocol.md")) if row[0] == f"`{error.code}`"]
    assert [row[1] for row in found] == [str(STATUSES[error])]


def test_the_protocol_lists_no_code_that_is_not_there() -> None:
    """Its rows with a status are those of the code."""
    statuses = {str(status) for status in STATUSES.values()}
    listed = {
        row[0].strip("`")
        for row in pages.rows(pages.doc("protocol.md"))
        if len(row) > 1 and row[1] in statuses
    }
    assert listed == {error.code for error in STATUSES}


def test_a_problems_type_is_as_documented() -> None:
    """Clients may compare it."""
    assert f"`{TYPE_PREFIX}`" in pages.doc("protocol.md")


@pytest.mark.parametrize(
    "names",
    [machine.State, machine.Trigger, message.MessageStatus, message.Role, turn.TurnStatus],
    ids=lambda names: names.__name__,
)
def test_the_protocol_names_each_of(names: type[StrEnum]) -> None:
    """States, triggers, statuses and roles."""
    assert {name.value for name in names} <= pages.codes(pages.doc("protocol.md"))


@pytest.mark.parametrize("state", list(machine.State))
def test_each_state_is_explained(state: machine.State) -> None:
    """A row in §5 says what the context is doing."""
    section = pages.doc("protocol.md").partition("\n## 5. ")[2].partition("\n## 6. ")[0]
    explained = [row[1] for row in pages.rows(section) if row[0] == f"`{state}`"]
    assert len(explained) == 1
    assert explained[0]


@pytest.mark.parametrize("tag", SIGNALS)
def test_each_signal_is_explained_and_in_the_glossary(tag: str) -> None:
    """§4 begins a point with its name."""
    assert f"\n- `{tag}`:" in pages.doc("protocol.md")
    assert tag in pages.codes(pages.doc("glossary.md"))


def test_the_drawn_machine_is_the_one_that_runs() -> None:
    """docs/machine.md is what the table in the code generates."""
    assert page("docs/machine.md") == machine_page.page()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_each_command_is_in_the_table_of_commands(command: str) -> None:
    """docs/running.md lists what can be typed."""
    listed = [row[0] for row in pages.rows(pages.doc("running.md"))]
    assert any(re.match(rf"`contextd {command}\b", cell) for cell in listed)


def test_no_page_names_a_command_that_does_not_exist() -> None:
    """`contextd WORD` in back quotes, and every line that runs it, names a command."""
    lines = {line for text in map(pages.text, pages.PAGES) for line in pages.indented(text)}
    lines |= pages.codes(pages.everything())
    named = {found for line in lines for found in re.findall(r"(?:^|bin/)contextd ([a-z]+)", line)}
    assert named <= set(cli.commands)
    assert named


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Relative links name a file, and a heading in it."""
    source = ROOT / name
    for link in pages.links(page(name)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = unquote(link).partition("#")
        path = (source.parent / target).resolve() if target else source
        assert path.exists(), link
        assert not anchor or anchor in pages.anchors(pages.text(path)), link


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_each_page_begins_with_its_title_and_says_something(name: str) -> None:
    """A link to an empty page leads nowhere."""
    title, _, body = page(name).partition("\n")
    assert title.startswith("# ")
    assert body.strip()


def test_each_page_can_be_reached_from_the_readme() -> None:
    """Nobody finds a page that is linked from nowhere."""
    reached, waiting = set[Path](), [pages.README]
    while waiting:
        source = waiting.pop()
        if source in reached:
            continue
        reached.add(source)
        for link in pages.links(pages.text(source)):
            target = (source.parent / link.partition("#")[0]).resolve()
            target = target / "README.md" if target.is_dir() else target
            waiting += [target] if target in pages.PAGES else []
    assert reached == set(pages.PAGES)


def test_each_section_that_the_code_cites_is_there() -> None:
    """A `§4.2` in a docstring or a page leads to a heading of docs/protocol.md."""
    cited = {
        found
        for text in (*SOURCE.values(), *map(pages.text, pages.PAGES))
        for found in re.findall(r"§(\d+(?:\.\d+)?)", text)
    }
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", pages.doc("protocol.md"), re.MULTILINE))
    assert cited <= headings


def test_files_that_the_pages_name_are_there() -> None:
    """A path below the repository's own folders exists."""
    folders = "contextd|tests|migrations|docs"
    named = {
        code
        for code in pages.codes(pages.everything())
        if re.fullmatch(rf"(?:{folders}|\.ci)/[\w./-]*", code)
    }
    assert "contextd/core/machine.py" in named
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/journey.md"])
def test_functions_that_the_pages_name_are_there(name: str) -> None:
    """`Class.method` is a method that somebody can look up."""
    code = "\n".join(SOURCE.values())
    named = [
        found.groups()
        for found in (re.fullmatch(r"([A-Z]\w+)\.(\w+)", c) for c in pages.codes(page(name)))
        if found
    ]
    assert named
    for class_, method in named:
        assert re.search(rf"^class {class_}\b", code, re.MULTILINE), class_
        assert re.search(rf"def {method}\(", code), f"{class_}.{method}"


def test_the_map_names_each_file_of_http_service_store_and_signals() -> None:
    """docs/architecture.md leaves no room's file out."""
    named = pages.codes(pages.doc("architecture.md"))
    rooms = ("http", "service", "store", "signals")
    files = {p.name for r in rooms for p in (ROOT / "contextd" / r).glob("*.py")} - {"__init__.py"}
    assert files - named == set()


def test_no_page_holds_a_path_of_this_machine() -> None:
    """What is written here is read elsewhere."""
    here = {str(ROOT), str(ROOT.parent), str(Path.home()), tempfile.gettempdir()} - {"/"}
    text = pages.everything()
    assert [place for place in here if f"{place}/" in text] == []
    assert not re.search(r"(?<![\w/.])/(?:home|root|Users)/", text)
