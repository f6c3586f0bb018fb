"""What a tool of an MCP server is called here, and what is believed of it.

A name is the server's, two underscores, and the tool's own: `files__read`. It holds only A-Z a-z 0-9 _ -
and at most 64 of them, which every model's server takes. Where the tool's own name does not fit, the rest
becomes `_`, and a few characters of a hash end the name. A server's name has no "__" and no "_" at its
end, so the first "__" ends it, and no two tools get the same name. The name depends on nothing but the
two, so it is the same after a restart.
"""

import hashlib
import re

import mcp_types

from contextd.tools import Tool, ToolCallable
from contextd.tools.mcp_file import McpServer

TOOL_NAME_CHARS_MAX = 64
DESCRIPTION_CHARS_MAX = 10_000
_HASH_CHARS = 8


def tool_name(server: str, tool: str) -> str:
    """The name under which contextd offers the tool of the server."""
    name = f"{server}__{tool}"
    fitting = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if fitting == name and tool and len(name) <= TOOL_NAME_CHARS_MAX:
        return name
    digest = hashlib.sha256(f"{server}\0{tool}".encode("utf-8", "surrogatepass")).hexdigest()
    ending = f"-{digest[:_HASH_CHARS]}"
    return fitting[: TOOL_NAME_CHARS_MAX - len(ending)] + ending


def offered(server: McpServer, tool: mcp_types.Tool, run: ToolCallable) -> Tool:
    """The tool as contextd offers it.

    Whoever lists a server trusts it, so its hints count, and the file has the last word:

    - *read only*: the server says so.
    - *idempotent*: the server says so, or the file, or it is read only.
    - *requires approval*: as the file says. Where it says nothing, every tool does that is neither
      read only nor said to destroy nothing; a tool without hints does.
    """
    hints = tool.annotations or mcp_types.ToolAnnotations()
    read_only = hints.read_only_hint is True
    idempotent = read_only or hints.idempotent_hint is True or tool.name in server.idempotent
    return Tool(
        name=tool_name(server.name, tool.name),
        description=(tool.description or tool.title or hints.title or "")[:DESCRIPTION_CHARS_MAX],
        parameters=tool.input_schema,
        run=run,
        read_only=read_only,
        idempotent=idempotent,
        requires_approval=_requires_approval(server, tool.name, hints, read_only=read_only),
    )


def _requires_approval(
    server: McpServer, name: str, hints: mcp_types.ToolAnnotations, *, read_only: bool
) -> bool:
    asked = server.requires_approval
    if asked is None:
        return not read_only and hints.destructive_hint is not False
    return asked if isinstance(asked, bool) else name in asked
