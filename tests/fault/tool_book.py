"""What the tools of `tool_module` wrote down of their executions, read from where the last look ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Execution:
    """One execution of a tool. `gave`: what it had to say, None while it has not come to its end."""

    id: str
    mark: str
    arguments: dict[str, Any]
    at_ms: float
    gave: str | None = None


class Book:
    """The file that all executions of a run are in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        self._executions: dict[str, Execution] = {}
        self._by_mark: dict[str, list[Execution]] = {}

    def executions(self, mark: str) -> list[Execution]:
        """Of the calls with this mark, in the order in which they began."""
        self.read()
        return self._by_mark.get(mark, [])

    def count(self) -> int:
        """How many executions have begun."""
        self.read()
        return len(self._executions)

    def marks(self) -> dict[str, list[Execution]]:
        """All executions, by the marks of their calls."""
        self.read()
        return self._by_mark

    def read(self) -> None:
        """Takes in what was written since: whole lines only, the last may be under way."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole + newline)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        match line["what"]:
            case "began":
                begun = Execution(line["id"], line["mark"], line["arguments"], line["at_ms"])
                self._executions[begun.id] = begun
                self._by_mark.setdefault(begun.mark, []).append(begun)
            case "ended":
                self._executions[line["id"]].gave = line["gave"]
