"""Which tools there are: those of modules that the settings name, and all of them by name (§8)."""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType

from contextd.tools import Tool
from contextd.tools.functions import REASON_CHARS_MAX, check_name, tool_of
from contextd.tools.text import one_line


class ToolsetError(Exception):
    """The tools cannot be had; the message names what is wrong and fits on one line."""


class Toolbox:
    """Tools by name. It never changes."""

    def __init__(self, sources: Mapping[str, Iterable[Tool]]) -> None:
        """`sources`: tools by where they come from, a word for people ("built in", a module's name).

        Raises `ToolsetError` where two tools have one name, or a name is none.
        """
        self._tools: dict[str, Tool] = {}
        origins: dict[str, str] = {}
        for source, tools in sources.items():
            for tool in tools:
                _check(tool, source, origins)
                origins[tool.name] = source
                self._tools[tool.name] = tool

    def get(self, name: str) -> Tool | None:
        """The tool of this name, if there is one."""
        return self._tools.get(name)

    def names(self) -> list[str]:
        """All names, in the order of the sources."""
        return list(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools


def load_tools(reference: str) -> list[Tool]:
    """The tools that `reference` names.

    `"my_tools"`: every function that the module marks with `@tool`, in its order; what it only imports
    from elsewhere is not among them. `"my_tools:toolset"`: the list of that name in it, of marked
    functions or of `Tool`s. A module is also looked for in the current folder, after all other places.

    Raises `ToolsetError`.
    """
    module_name, colon, list_name = reference.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or (
        colon and not list_name.isidentifier()
    ):
        raise ToolsetError(
            f"{one_line(reference, 80)!r} is not the name of a module: it has to be like 'my_tools' "
            "or 'my_tools:toolset'"
        )
    module = _import(module_name)
    tools = _listed(module, list_name) if colon else _marked(module)
    if not tools:
        raise ToolsetError(f"{reference!r} has no tools: mark functions with @tool")
    Toolbox({reference: tools})  # refuses what is wrong with the names
    return tools


def _check(tool: Tool, source: str, origins: Mapping[str, str]) -> None:
    try:
        check_name(tool.name)
    except ValueError as error:
        raise ToolsetError(f"{source}: {error}") from None
    if tool.name not in origins:
        return
    other = origins[tool.name]
    where = f"twice in {source}" if other == source else f"in {other} and in {source}"
    raise ToolsetError(f"there is a tool {tool.name!r} {where}")


def _import(name: str) -> ModuleType:
    # The last place, so that a file in the current folder never stands in for an installed module.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ToolsetError(f"there is no module {name!r}") from None
        raise _import_error(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error


def _import_error(name: str, error: BaseException) -> ToolsetError:
    why = one_line(f"{type(error).__name__}: {error}", REASON_CHARS_MAX)
    return ToolsetError(f"module {name!r} raises when it is imported: {why}")


def _marked(module: ModuleType) -> list[Tool]:
    own = [
        value
        for value in vars(module).values()
        if not isinstance(value, Tool) and getattr(value, "__module__", None) == module.__name__
    ]
    found = {id(tool): tool for value in own if (tool := tool_of(value)) is not None}
    return list(found.values())  # once each, also where it has two names in the module


def _listed(module: ModuleType, name: str) -> list[Tool]:
    values = getattr(module, name, None)
    if not isinstance(values, list | tuple):
        raise ToolsetError(f"module {module.__name__!r} has no list {name!r}")
    tools = []
    for number, value in enumerate(values, 1):
        tool = tool_of(value)
        if tool is None:
            raise ToolsetError(
                f"item {number} of '{module.__name__}:{name}' is no tool: it is of type "
                f"{type(value).__name__}; mark the function with @tool"
            )
        tools.append(tool)
    return tools
