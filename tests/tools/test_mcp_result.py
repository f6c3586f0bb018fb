"""Answers of MCP tools as text."""

from typing import Any

import mcp_types
import pytest

from contextd.tools.mcp_result import as_text

DATA = "aGVsbG8="  # 5 bytes


def text(*blocks: str | mcp_types.ContentBlock, structured: Any = None) -> str:
    content = [
        mcp_types.TextContent(text=block) if isinstance(block, str) else block for block in blocks
    ]
    return as_text(mcp_types.CallToolResult(content=content, structured_content=structured))


def test_texts_are_joined() -> None:
    """As they are, one below the other."""
    assert text("one", " two\n", "three") == "one\n two\n\nthree"
    assert text() == ""


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            mcp_types.ImageContent(data=DATA, mime_type="image/png"),
            "[image, image/png, 5 bytes: not shown]",
        ),
        (
            mcp_types.AudioContent(data=DATA, mime_type="audio/wav"),
            "[audio, audio/wav, 5 bytes: not shown]",
        ),
        (mcp_types.ResourceLink(name="n", uri="x://y"), "[link to n: x://y]"),
        (
            mcp_types.ResourceLink(
                name="n", title="N", uri="x://y", mime_type="text/plain", description="words"
            ),
            "[link to N: x://y (text/plain, words)]",
        ),
        (
            mcp_types.EmbeddedResource(
                resource=mcp_types.TextResourceContents(uri="x://y", text="content")
            ),
            "[resource x://y]\ncontent",
        ),
        (
            mcp_types.EmbeddedResource(
                resource=mcp_types.BlobResourceContents(uri="x://y", blob=DATA)
            ),
            "[resource x://y, 5 bytes: not shown]",
        ),
    ],
)
def test_what_is_no_text_is_described(block: mcp_types.ContentBlock, words: str) -> None:
    """In words that say what the model does not see."""
    assert text("before", block, "after") == f"before\n{words}\nafter"


@pytest.mark.parametrize(
    ("blocks", "structured", "expected"),
    [
        ([], {"a": 1}, '{"a":1}'),
        ([], [1, None], "[1,null]"),
        (["found"], {"a": [1]}, 'found\n{"a":[1]}'),
        (['{\n "a": 1 }'], {"a": 1}, '{\n "a": 1 }'),
        (["7"], {"result": 7}, "7"),
        (["7"], {"result": "7"}, "7"),
        (["words"], {"result": "words"}, "words"),
        (["1", "2"], {"result": [1, 2]}, "1\n2"),
        (["a", "b"], {"result": ["a", "b"]}, "a\nb"),
        (["7"], {"result": 8}, '7\n{"result":8}'),
        (["7"], {"result": 7, "unit": "m"}, '7\n{"result":7,"unit":"m"}'),
        (["{" * 10_000], {"a": 1}, "{" * 10_000 + '\n{"a":1}'),
    ],
)
def test_structured_content_is_said_once(blocks: list[str], structured: Any, expected: str) -> None:
    """Servers say it in the texts as well, and then it is left out."""
    assert text(*blocks, structured=structured) == expected


def test_structured_content_that_repeats_an_image_is_left_out() -> None:
    """Its letters would be of no use to a model, and there are many."""
    image = mcp_types.ImageContent(data=DATA, mime_type="image/png")
    words = "[image, image/png, 5 bytes: not shown]"
    assert text(image, structured={"result": [{"data": DATA}]}) == words
    assert text(image, structured={"width": 4}) == f'{words}\n{{"width":4}}'
