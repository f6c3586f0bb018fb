"""Scripts with calls of tools (§13): what they ask for, round by round, and what a turn must show.

What each tool is and what must become of a call is said here once more, from §8 and not from the server.
"""

import json
import re
from dataclasses import dataclass, replace
from itertools import groupby
from random import Random
from typing import Any

from nasty_scripts import ATTEMPTS_MAX, NASTY, WORDS, Reply, Script

PIECE_CHARS = 16  # of a call's arguments: the scripted provider writes them so
TOOL_TIMEOUT_S = 1.5
WAITS_MS = (0, 5, 50, 200, 400, 700, 1000, 3000)  # the last is beyond the limit
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@dataclass(frozen=True)
class Kind:
    """What a tool promises. `refused`: the error that every call of it ends with."""

    idempotent: bool = False
    read_only: bool = False
    guarded: bool = False
    external: bool = False
    timed: bool = False
    built_in: bool = False
    refused: str | None = None


KINDS = {
    "quick": Kind(),
    "slow": Kind(timed=True),
    "block": Kind(timed=True),
    "look": Kind(read_only=True, timed=True),
    "look_again": Kind(read_only=True, idempotent=True, timed=True),
    "again": Kind(idempotent=True, timed=True),
    "guarded": Kind(guarded=True, timed=True),
    "crash": Kind(),
    "refuse": Kind(),
    "write_file": Kind(idempotent=True, guarded=True, built_in=True),
    "list_directory": Kind(idempotent=True, read_only=True, built_in=True),
    "ask": Kind(external=True),
    "ask_first": Kind(external=True, guarded=True),
    "ask_reader": Kind(external=True, read_only=True),
    "nobody": Kind(refused="unknown_tool"),
    "careless": Kind(refused="invalid_arguments"),
}
WEIGHTS = {
    "quick": 8, "slow": 16, "block": 8, "look": 6, "look_again": 8, "again": 10, "guarded": 14,
    "crash": 4, "refuse": 4, "write_file": 4, "list_directory": 3, "ask": 10, "ask_first": 6,
    "ask_reader": 4, "nobody": 3, "careless": 3,
}  # fmt: skip
QUESTION = {
    "type": "object",
    "properties": {"mark": {"type": "string"}, "say": {"type": "string"}},
    "required": ["mark", "say"],
    "additionalProperties": False,
}


def declarations() -> list[dict[str, Any]]:
    """The external tools, as a context declares them."""
    return [
        {
            "name": name,
            "description": "Asks somebody.",
            "parameters": QUESTION,
            "external": True,
            "requires_approval": kind.guarded,
            "read_only": kind.read_only,
        }
        for name, kind in KINDS.items()
        if kind.external
    ]


def server_tools() -> list[str]:
    """The tools that the server itself has."""
    return [n for n, kind in KINDS.items() if not (kind.external or kind.refused)]


@dataclass(frozen=True)
class AskedCall:
    """A call as a script asks for it. `name` is that of its kind; no two have the same `mark`."""

    name: str
    mark: str
    arguments: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """What its tool promises."""
        return KINDS[self.name]

    @property
    def tool(self) -> str:
        """The tool's name on the wire."""
        return "slow" if self.name == "careless" else self.name

    @property
    def step(self) -> dict[str, Any]:
        """The step of the script."""
        return {"tool_call": {"name": self.tool, "arguments": self.arguments}}

    @property
    def reply(self) -> Reply:
        """The message that its arguments are streamed into."""
        text = json.dumps(self.arguments, ensure_ascii=False, separators=(",", ":"))
        starts = range(0, len(text), PIECE_CHARS)
        return Reply("tool_call", tuple(text[at : at + PIECE_CHARS] for at in starts))


@dataclass(frozen=True)
class Round:
    """One request to the model: what it says, and what it then calls."""

    said: tuple[Reply, ...]
    calls: tuple[AskedCall, ...]

    @property
    def replies(self) -> tuple[Reply, ...]:
        """All its messages, in order."""
        return (*self.said, *(call.reply for call in self.calls))


@dataclass(frozen=True)
class ToolScript(Script):
    """A script of several rounds; the last has no calls. `breaks_at`: the round of its error."""

    rounds: tuple[Round, ...] = ()
    breaks_at: int = 0

    def cut_after(self, count: int) -> "ToolScript":
        """What is played of it when the turn ends with the results of round number `count`."""
        rounds = self.rounds[:count]
        broken = self.breaks_at < count
        return replace(
            self,
            rounds=rounds,
            replies=tuple(reply for round_ in rounds for reply in round_.replies),
            transient_times=self.transient_times if broken else 0,
            fatal=self.fatal and broken,
        )


def tool_script(random: Random, name: str, book: str) -> ToolScript:
    """A script whose calls are marked by `name`, and whose tools write into `book`."""
    maker = _Maker(random, name, book)
    count = random.choices((0, 1, 2, 3, 4, 6), (8, 30, 30, 18, 10, 4))[0]
    rounds, steps = [], [[{"rate": random.choice((0, 0, 200, 1000))}]]
    for _ in range(count):
        said, saying = maker.talk(random.choice((0, 0, 1, 3)))
        saying.insert(0, USAGE)  # else the calls of two rounds would be one request
        calls = tuple(maker.call() for _ in range(random.choice((1, 1, 2, 3, 5))))
        rounds.append(Round(said, calls))
        steps.append([*saying, *(call.step for call in calls)])
    said, saying = maker.talk(random.choice((0, 1, 2)) if count else 2)
    rounds.append(Round(said, ()))
    steps.append(saying)
    breaks_at, times, fatal = random.randrange(count + 1), 0, False
    if random.random() < 0.15:
        fatal = random.random() < 0.4
        times = 0 if fatal else random.choice((1, 1, 2, ATTEMPTS_MAX))
        error = {"error": "fatal"} if fatal else {"error": "transient", "times": times}
        place = 0 if fatal else random.randint(0, len(rounds[breaks_at].said))
        steps[breaks_at + 1].insert(place, error)
        if fatal:
            rounds = [*rounds[:breaks_at], Round((), ())]
    content = json.dumps({"script": [s for part in steps for s in part]}, ensure_ascii=False)
    whole = ToolScript(content, (), times, fatal, tuple(rounds), breaks_at)
    return whole.cut_after(len(rounds))


def edited(random: Random, name: str, arguments: dict[str, Any], words: str) -> dict[str, Any]:
    """Other arguments for a call, as a person may give them: of the same mark."""
    if name == "write_file":
        return {**arguments, "content": words}
    changed = {**arguments, "say": words}
    return changed | ({"ms": random.choice(WAITS_MS)} if "ms" in arguments else {})


class _Maker:
    def __init__(self, random: Random, name: str, book: str) -> None:
        self._random = random
        self._name = name
        self._book = book
        self._made = 0

    def talk(self, count: int) -> tuple[tuple[Reply, ...], list[dict[str, Any]]]:
        """Messages of text and thinking, and the steps that say them."""
        steps: list[dict[str, Any]] = []
        written: list[tuple[str, str]] = []
        for _ in range(count):
            match self._random.choice(("chunks", "thinking", "text", "delay")):
                case "chunks":
                    chunks = self._random.choices(NASTY, k=self._random.randint(1, 8))
                    steps.append({"chunks": chunks})
                    written += [("text", chunk) for chunk in chunks]
                case "delay":
                    steps.append({"delay_ms": self._random.choice((1, 10, 60))})
                case field:
                    words = self._random.choices(WORDS, k=self._random.randint(1, 6))
                    steps.append({field: "".join(words)})
                    written += [
                        (field, word) for word in re.findall(r"\s*\S+\s*|\s+", "".join(words))
                    ]
        replies = tuple(
            Reply(kind, tuple(chunk for _, chunk in group))
            for kind, group in groupby(written, key=lambda pair: pair[0])
        )
        return replies, steps

    def call(self) -> AskedCall:
        self._made += 1
        name = self._random.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        mark = f"{self._name}-{self._made}"
        return AskedCall(name, mark, self._arguments(name, mark))

    def _arguments(self, name: str, mark: str) -> dict[str, Any]:
        kind, say = KINDS[name], self._random.choice(NASTY)
        match name:
            case "write_file":
                return {"path": f"{mark}.txt", "content": f"{mark} {say}"}
            case "list_directory":
                return {"path": "."}
            case "nobody":
                return {"mark": mark}
            case "careless":
                return {"mark": mark, "book": self._book, "say": say, "ms": "a while"}
        if kind.external:
            return {"mark": mark, "say": say}
        arguments = {"mark": mark, "book": self._book, "say": say}
        return arguments | ({"ms": self._random.choice(WAITS_MS)} if kind.timed else {})
