"""Which tools a context has: the server's, and those that it declares as external (§8)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from contextd.core.values import JsonObject
from contextd.provider import ToolOffer
from contextd.store.stored import stored_tools
from contextd.store.tables import AnyRow
from contextd.tools import Tool


class ToolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy needs to know of a tool."""

    external: bool = False
    read_only: bool = False
    idempotent: bool = False
    requires_approval: bool = False


ALL = "*"  # what a context keeps that names no tools: all that the server has

Chosen: TypeAlias = str | Sequence[Any]


class Toolset:
    """Looks tools up for a context's row. `server_tools` are those of this process, as they are now."""

    def __init__(self, server_tools: Callable[[], Mapping[str, Tool]]) -> None:
        self._server_tools = server_tools

    def names(self) -> list[str]:
        """The server's own tools."""
        return list(self._server_tools())

    def shown(self, context: AnyRow) -> list[Any]:
        """The context's `tools` as its clients see them (§2)."""
        chosen = stored_tools(context)
        return self.names() if chosen == ALL else list(chosen)

    def get(self, context: AnyRow, name: str) -> Tool | None:
        """The server's tool of this name, if the context has it."""
        return self._get(stored_tools(context), name)

    def facts(self, context: AnyRow, name: str) -> ToolFacts | None:
        """What the policy needs to know of a tool, or None where the context has none of this name."""
        return self._facts(stored_tools(context), name)

    def schema(self, context: AnyRow, name: str) -> JsonObject | None:
        """The JSON Schema of a tool's arguments."""
        chosen = stored_tools(context)
        external = _external(chosen, name)
        if external is not None:
            schema: JsonObject = external["parameters"]
            return schema
        tool = self._get(chosen, name)
        return None if tool is None else tool.parameters

    def offers(self, context: AnyRow) -> list[ToolOffer]:
        """What the model is offered: in the mode `plan` only what is read-only."""
        chosen = stored_tools(context)
        names = self.names() if chosen == ALL else [_name(tool) for tool in chosen]
        found = []
        for name in dict.fromkeys(names):
            facts = self._facts(chosen, name)
            if facts is not None and (context.mode != "plan" or facts.read_only):
                found.append(self._offer(chosen, name))
        return found

    def _get(self, chosen: Chosen, name: str) -> Tool | None:
        if _external(chosen, name) is not None:
            return None
        mine = chosen == ALL or name in chosen
        return self._server_tools().get(name) if mine else None

    def _facts(self, chosen: Chosen, name: str) -> ToolFacts | None:
        external = _external(chosen, name)
        if external is not None:
            return ToolFacts(
                external=True,
                read_only=external["read_only"],
                requires_approval=external["requires_approval"],
            )
        tool = self._get(chosen, name)
        if tool is None:
            return None
        return ToolFacts(
            read_only=tool.read_only,
            idempotent=tool.idempotent,
            requires_approval=tool.requires_approval,
        )

    def _offer(self, chosen: Chosen, name: str) -> ToolOffer:
        external = _external(chosen, name)
        if external is not None:
            description, parameters = external["description"], external["parameters"]
        else:
            tool = self._server_tools()[name]
            description, parameters = tool.description, tool.parameters
        return ToolOffer(name=name, description=description, parameters=parameters)


def _name(tool: Any) -> str:
    return str(tool["name"]) if isinstance(tool, dict) else str(tool)


def _external(tools: Chosen, name: str) -> dict[str, Any] | None:
    """The context's own declaration, which goes before a tool of the server."""
    for tool in tools:
        if isinstance(tool, dict) and tool["name"] == name:
            return tool
    return None
