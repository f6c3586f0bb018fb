"""The project's pages as the tests read them."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@cache
def text(path: Path) -> str:
    """The page."""
    return path.read_text(encoding="utf-8")


def doc(name: str) -> str:
    """A page of docs/."""
    return text(ROOT / "docs" / name)


def everything() -> str:
    """All pages, one after the other."""
    return "\n".join(text(page) for page in PAGES)


def codes(markdown: str) -> set[str]:
    """What stands in back quotes outside of fenced blocks."""
    return set(_CODE.findall(_FENCE.sub("", markdown)))


def blocks(markdown: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for found, body in _FENCE.findall(markdown) if found == language]


def links(markdown: str) -> list[str]:
    """Targets of links, outside of fenced blocks."""
    return _LINK.findall(_FENCE.sub("", markdown))


def anchors(markdown: str) -> set[str]:
    """What a link's `#…` may name: headings, lower-case, punctuation out, spaces as hyphens."""
    headings = _HEADING.findall(_FENCE.sub("", markdown))
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def indented(markdown: str) -> list[str]:
    """Lines of code that are set by indentation."""
    return [line.strip() for line in markdown.splitlines() if line.startswith("    ")]


def rows(markdown: str) -> Iterator[list[str]]:
    """The cells of each row of each table, without headings and rules."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not set("".join(cells)) <= {"-", ":"}:
            yield cells


def extras() -> set[str]:
    """The optional dependencies that pip can be asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])
