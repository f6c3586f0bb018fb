"""What an MCP server answered, as text for the model."""

from collections.abc import Iterator

import mcp_types
import msgspec
from mcp import ClientSession

MISFIT = "[The structured content does not fit the schema that the tool itself declares.]"
_MISFIT_MARK = "contextd/misfit"  # in the `_meta` of such a result


def let_misfits_pass(session: ClientSession) -> None:
    """Marks a result that misses its tool's own schema, where the SDK would throw it away.

    The tool has run by then, so the model should see what came of it. The SDK has no setting for this;
    its session calls `validate_tool_result` on itself.
    """
    validate = session.validate_tool_result

    async def mark(name: str, result: mcp_types.CallToolResult) -> None:
        try:
            await validate(name, result)
        except RuntimeError:
            result.meta = {**(result.meta or {}), _MISFIT_MARK: True}

    session.validate_tool_result = mark  # type: ignore[method-assign]


def as_text(result: mcp_types.CallToolResult) -> str:
    """Texts as they are, one below the other; what is no text is described in words.

    Structured content follows as JSON, unless the texts say it already or it repeats an image, a sound
    or a file. What misses the tool's own schema is followed by a word on that. Empty where there is
    nothing.
    """
    parts = [_block(block) for block in result.content]
    structured = result.structured_content
    if structured is not None and not _is_said(structured, result.content):
        json = msgspec.json.encode(structured).decode()
        if not any(data in json for data in _binary(result.content)):
            parts.append(json)
    if (result.meta or {}).get(_MISFIT_MARK):
        parts.append(MISFIT)
    return "\n".join(part for part in parts if part)


def _block(block: mcp_types.ContentBlock) -> str:
    match block:
        case mcp_types.TextContent():
            return block.text
        case mcp_types.ImageContent() | mcp_types.AudioContent():
            return f"[{block.type}, {block.mime_type}, {_bytes(block.data)}: not shown]"
        case mcp_types.ResourceLink():
            about = ", ".join(word for word in (block.mime_type, block.description) if word)
            return f"[link to {block.title or block.name}: {block.uri}{about and f' ({about})'}]"
        case mcp_types.EmbeddedResource():
            return _resource(block.resource)


def _resource(
    resource: mcp_types.TextResourceContents | mcp_types.BlobResourceContents,
) -> str:
    if isinstance(resource, mcp_types.TextResourceContents):
        return f"[resource {resource.uri}]\n{resource.text}"
    kind = f", {resource.mime_type}" if resource.mime_type else ""
    return f"[resource {resource.uri}{kind}, {_bytes(resource.blob)}: not shown]"


def _binary(blocks: list[mcp_types.ContentBlock]) -> Iterator[str]:
    for block in blocks:
        match block:
            case mcp_types.ImageContent() | mcp_types.AudioContent() if block.data:
                yield block.data
            case mcp_types.EmbeddedResource(resource=mcp_types.BlobResourceContents(blob=blob)) if (
                blob
            ):
                yield blob


def _bytes(base64: str) -> str:
    return f"{len(base64) * 3 // 4 - base64[-2:].count('=')} bytes"


def _is_said(structured: object, blocks: list[mcp_types.ContentBlock]) -> bool:
    """Servers repeat structured content as text: whole, or what is in its only field `result`."""
    said = [_value(block.text) for block in blocks if isinstance(block, mcp_types.TextContent)]
    if structured in said:
        return True
    if not isinstance(structured, dict) or set(structured) != {"result"}:
        return False
    result = structured["result"]
    texts = [block.text for block in blocks if isinstance(block, mcp_types.TextContent)]
    return result in said or result in texts or (bool(said) and result in (said, texts))


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
