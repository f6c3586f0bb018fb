"""The tools of one server process, from all their sources: built in, the operator's module, MCP."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from contextd.settings import Settings, SettingsError
from contextd.tools import Tool
from contextd.tools.files import workspace_tools
from contextd.tools.registry import Toolbox, ToolsetError, load_tools
from contextd.tools.workspace import Workspace, WorkspaceError

if TYPE_CHECKING:
    from contextd.tools.mcp import McpServers


class ServerTools:
    """`by_name` are the tools as they are now: those of MCP servers come and change."""

    def __init__(self, settings: Settings, workspace: Workspace | None) -> None:
        """Raises `SettingsError` for a module or a file that cannot be used."""
        self._sources: dict[str, list[Tool]] = {}
        try:
            if workspace is not None:
                built_in = workspace_tools(workspace, bytes_max=settings.file_bytes_max)
                self._sources["the workspace"] = built_in
            if settings.tools is not None:
                self._sources[settings.tools] = load_tools(settings.tools)
            self.by_name: Mapping[str, Tool] = self._merged()
        except ToolsetError as error:
            raise SettingsError(str(error)) from None
        self._mcp = _mcp_servers(settings, self)

    async def open(self) -> None:
        """Starts the MCP servers; who does not answer soon is waited for in the background."""
        if self._mcp is not None:
            await self._mcp.open()

    async def close(self) -> None:
        """Ends the MCP servers."""
        if self._mcp is not None:
            await self._mcp.close()

    def set_mcp_tools(self, tools: list[Tool]) -> None:
        """Takes the tools of the MCP servers in place of those that they had before."""
        taken = {tool.name for source in self._sources.values() for tool in source}
        fresh = {tool.name: tool for tool in tools if tool.name not in taken}
        self.by_name = {**self._merged(), **fresh}

    def _merged(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in Toolbox(self._sources)}


def _mcp_servers(settings: Settings, tools: ServerTools) -> "McpServers | None":
    if settings.mcp_servers is None:
        return None
    # Only here: the SDK takes most of a second to import.
    try:
        from contextd.tools.mcp import McpLimits, McpServers, read_mcp_file  # noqa: PLC0415
    except ImportError:
        raise SettingsError(
            "CONTEXTD_MCP_SERVERS needs the package mcp; install contextd[mcp]"
        ) from None
    servers = read_mcp_file(Path(settings.mcp_servers))
    limits = McpLimits(
        message_bytes_max=settings.mcp_message_bytes_max, log_stderr=settings.mcp_log_stderr
    )
    return McpServers(servers, limits=limits, changed=tools.set_mcp_tools)


def open_workspace(settings: Settings) -> Workspace | None:
    """The folder of the built-in tools. Raises `SettingsError` where it cannot be used."""
    if settings.workspace is None:
        return None
    try:
        return Workspace(settings.workspace)
    except WorkspaceError as error:
        raise SettingsError(f"CONTEXTD_WORKSPACE or --workspace: {error}") from None
