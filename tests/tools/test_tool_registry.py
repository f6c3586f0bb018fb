"""Tools come from modules that a setting names, and are found by name (§8)."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contextd.core.values import JsonObject
from contextd.tools import Tool
from contextd.tools.registry import Toolbox, ToolsetError, load_tools

Write = Callable[[str, str], None]

HEAD = "from contextd.tools import Tool, tool\n"


async def nothing(_arguments: JsonObject) -> object:
    return None


def named(name: str) -> Tool:
    return Tool(name=name, description="", parameters={"type": "object"}, run=nothing)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module into a current folder of its own; all are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def names(reference: str) -> list[str]:
    return [tool.name for tool in load_tools(reference)]


def test_a_module_gives_its_marked_functions_in_order(write: Write) -> None:
    """Each once, those it only imports not, and what is not marked not."""
    write("my_other", f"{HEAD}@tool\ndef imported() -> None: ...\n")
    write(
        "my_tools",
        f"{HEAD}from my_other import imported\n"
        "@tool\ndef zeta() -> None: ...\n"
        "@tool(name='first')\ndef alpha() -> None: ...\n"
        "def plain() -> None: ...\n"
        "again = zeta\n",
    )
    assert names("my_tools") == ["zeta", "first"]


def test_a_list_gives_exactly_what_is_in_it(write: Write) -> None:
    """Marked functions and `Tool`s, in the list's order, from wherever they are."""
    write("my_other", f"{HEAD}@tool\ndef imported() -> None: ...\n")
    write(
        "my_tools",
        f"{HEAD}from my_other import imported\n"
        "@tool\ndef one() -> None: ...\n"
        "@tool\ndef left_out() -> None: ...\n"
        "async def run(arguments): ...\n"
        "made = Tool(name='made', description='', parameters={}, run=run)\n"
        "toolset = [imported, made, one]\n",
    )
    assert names("my_tools:toolset") == ["imported", "made", "one"]


def test_a_file_in_the_current_folder_never_stands_in_for_an_installed_module(
    write: Write, tmp_path: Path
) -> None:
    """The current folder is the last to be searched, as tools may be able to write there."""
    write("my_tools", f"{HEAD}@tool\ndef one() -> None: ...\n")
    load_tools("my_tools")
    assert sys.path[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path[:-1]


@pytest.mark.parametrize(
    ("text", "reference", "says"),
    [
        ("", "my_missing", "there is no module 'my_missing'"),
        ("", "my_missing.inner", "there is no module 'my_missing.inner'"),
        ("", "my_tools.inner", "there is no module 'my_tools.inner'|raises"),
        ("import my_nowhere", "my_tools", "'my_tools' raises.*my_nowhere"),
        ("1 / 0", "my_tools", "'my_tools' raises.*ZeroDivisionError"),
        ("raise ValueError('a\\nb' * 5000)", "my_tools", "'my_tools' raises.*ValueError: a b"),
        ("raise SystemExit(3)", "my_tools", "'my_tools' raises.*SystemExit: 3"),
        ("def broken(:", "my_tools", "'my_tools' raises.*SyntaxError"),
        (f"{HEAD}@tool\ndef f(*a): ...", "my_tools", "'my_tools' raises.*'f'.*'\\*a'"),
        (f"{HEAD}@tool(name='a b')\ndef f(): ...", "my_tools", "raises.*'a b'.*A-Z"),
        ("x = 1", "my_tools", "'my_tools' has no tools"),
        ("toolset = []", "my_tools:toolset", "'my_tools:toolset' has no tools"),
        ("", "my_tools:toolset", "'my_tools' has no list 'toolset'"),
        ("toolset = 3", "my_tools:toolset", "'my_tools' has no list 'toolset'"),
        ("toolset = [print]", "my_tools:toolset", "item 1 of 'my_tools:toolset'.*@tool"),
        (
            f"{HEAD}@tool(name='x')\ndef f(): ...\n@tool(name='x')\ndef g(): ...",
            "my_tools",
            "a tool 'x' twice in my_tools",
        ),
        (
            f"{HEAD}toolset = [Tool(name='a b', description='', parameters={{}}, run=print)]",
            "my_tools:toolset",
            "my_tools:toolset: 'a b' cannot be a tool's name",
        ),
        ("", "", "not the name of a module"),
        ("", "../my_tools", "not the name of a module"),
        ("", "my_tools.py:", "not the name of a module"),
        ("", ".my_tools", "not the name of a module"),
        ("", "my_tools:a.b", "not the name of a module"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    write: Write, text: str, reference: str, says: str
) -> None:
    """Short enough for a terminal, and nothing of contextd's own raises."""
    write("my_tools", text)
    with pytest.raises(ToolsetError, match=says) as refused:
        load_tools(reference)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_toolbox_finds_tools_by_name_in_the_order_of_their_sources() -> None:
    """A name that is none of them is None, not an error."""
    one, two, three = named("b"), named("a"), named("c")
    box = Toolbox({"built in": [one, two], "my_tools": [three]})
    assert box.names() == ["b", "a", "c"]
    assert list(box) == [one, two, three]
    assert (len(box), "a" in box, "x" in box) == (3, True, False)
    assert box.get("a") is two
    assert box.get("x") is None
    assert Toolbox({}).names() == []


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"built in": [named("a")], "my_tools": [named("a")]}, "'a' in built in and in my_tools"),
        ({"my_tools": [named("a"), named("a")]}, "'a' twice in my_tools"),
        ({"my_tools": [named("a\n")]}, "my_tools: .* cannot be a tool's name"),
    ],
)
def test_a_toolbox_refuses_names_that_are_taken_or_none(
    sources: dict[str, list[Tool]], says: str
) -> None:
    """And says where both came from."""
    with pytest.raises(ToolsetError, match=says):
        Toolbox(sources)
