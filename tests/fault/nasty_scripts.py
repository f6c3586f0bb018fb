"""Scripts for the scripted provider (§13) with text that breaks careless code, and what each must give.

The expected answer is worked out here from §13 alone, so that it is an oracle and not a copy of the
server's own reading of a script.
"""

import json
import re
from dataclasses import dataclass
from itertools import groupby
from random import Random
from typing import Any

ATTEMPTS_MAX = 4

# Each is a chunk by itself, or a piece of one. What is here has broken some encoder, splitter, framing
# or terminal at some time; the lines that look like SSE or JSON would break a stream that carried text.
NASTY = (
    "🙂",
    "👩‍👩‍👧‍👦",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301",
    "\u0301\u0327",  # combining marks with nothing before them
    "مرحبا بالعالم ",
    "שלום\u200f",
    "\u202eright to left override\u202c",
    "\u2067isolated\u2069",
    "\r\n",
    "\r",
    "\n\n",
    "\\",
    "\\n\\r\\u0041",
    '"',
    "'\"`",
    "\ufeff",
    "\u2028",
    "\u2029",
    "\u0085",
    "\u00a0",
    "\u200b",
    "\u200d",
    "\u2060\ufe0f",
    " ",
    "\t",
    "\x01\x1b[2J\x7f",
    "data: {}\n\n",
    "id: 1\n",
    "event: message\nretry: 0\n\n",
    ": comment\n\n",
    '{"script": [{"error": "fatal"}]}',
    "</script><!--",
    "%00%F0%9F%99%82",
    "' OR 1=1; --",
    "\ud7ff\ue000\ufffd\ufffe\uffff",
    "\U0010ffff",
    "\U0001d518\U0001d52b\U0001d526 ",
    "日本語テキスト",
    "ﷺ",
    "0",
    "null",
    "x" * 700,
    "🧵" * 300,
)
WORDS = ("one ", "naïve ", "🙂 ", "señor ", "дом ", "tail\n", "\\ ", '"quoted" ', "end ")


@dataclass(frozen=True)
class Reply:
    """One message of the answer: its kind and its chunks."""

    kind: str
    chunks: tuple[str, ...]

    @property
    def text(self) -> str:
        """The chunks, joined."""
        return "".join(self.chunks)


@dataclass(frozen=True)
class Script:
    """What a user's message asks for. `content` is the message's text, JSON or plain."""

    content: str
    replies: tuple[Reply, ...]
    transient_times: int = 0
    fatal: bool = False

    def completes(self, attempt: int) -> bool:
        """Whether attempt number `attempt` can end well, if nothing breaks it."""
        return not self.fatal and attempt > self.transient_times

    def explains(self, found: list[Reply]) -> bool:
        """Whether `found` is what one attempt had written when it was broken off anywhere."""
        if not found:
            return True
        if len(found) > len(self.replies):
            return False
        *whole, last = found
        return all(a == b for a, b in zip(whole, self.replies, strict=False)) and is_prefix(
            last, self.replies[len(whole)]
        )


def is_prefix(found: Reply, wanted: Reply) -> bool:
    """Whether `found` is `wanted` cut between two chunks."""
    return found.kind == wanted.kind and found.chunks == wanted.chunks[: len(found.chunks)]


def plain_script(random: Random) -> Script:
    """A plain text, which is said back a word at a time."""
    text = "".join(random.choices(WORDS, k=random.randint(1, 12))) + random.choice(NASTY).strip()
    content = text.lstrip("\ufeff") or "x"
    answer = f"You said: {content}"
    return Script(content, (Reply("text", tuple(re.findall(r"\s*\S+\s*|\s+", answer))),))


def nasty_script(random: Random, *, seconds_max: float, faults: bool = True) -> Script:
    """A script that takes at most about `seconds_max` to play, once.

    `faults`: it may also fail, for a while or for good.
    """
    if random.random() < 0.1:
        return plain_script(random)
    rate = random.choice((0, 0, 50, 100, 200, 1000))
    budget = int((rate or 2000) * seconds_max * random.random()) + 1
    steps: list[dict[str, Any]] = [{"rate": rate}]
    written: list[tuple[str, str]] = []
    while len(written) < budget and len(steps) < 12:
        _add_step(random, steps, written, budget - len(written))
    transient_times, fatal = 0, False
    if faults and random.random() < 0.25:
        transient_times = random.choice((1, 1, 2, 3, ATTEMPTS_MAX))
        fatal = random.random() < 0.2
        written = _break(random, steps, written, fatal=fatal, times=transient_times)
        transient_times = 0 if fatal else transient_times
    replies = tuple(
        Reply(kind, tuple(chunk for _, chunk in group))
        for kind, group in groupby(written, key=lambda pair: pair[0])
    )
    content = json.dumps({"script": steps}, ensure_ascii=random.random() < 0.5)
    return Script(content, replies, transient_times, fatal)


def _add_step(
    random: Random, steps: list[dict[str, Any]], written: list[tuple[str, str]], left: int
) -> None:
    match random.choice(("chunks", "chunks", "chunks", "repeat", "text", "thinking", "delay")):
        case "chunks":
            chunks = [_chunk(random) for _ in range(min(left, random.randint(1, 40)))]
            steps.append({"chunks": chunks})
            # A model's U+0000 is stored as U+FFFD (§3.1).
            written += [("text", chunk.replace("\x00", "\ufffd")) for chunk in chunks]
        case "repeat":
            times, chunk = min(left, random.randint(1, 200)), random.choice(NASTY)
            steps.append({"repeat": times, "text": chunk})
            written += [("text", chunk)] * times
        case "delay":
            steps.append({"delay_ms": random.choice((1, 10, 50, 100))})
        case field:
            said = [random.choice(WORDS) for _ in range(min(left, random.randint(1, 10)))]
            steps.append({field: "".join(said)})
            written += [(field, word) for word in said]


def _chunk(random: Random) -> str:
    pieces = random.choices(NASTY, k=random.choice((1, 1, 1, 2, 3)))
    return ("\x00" if random.random() < 0.01 else "").join(pieces)


def _break(
    random: Random,
    steps: list[dict[str, Any]],
    written: list[tuple[str, str]],
    *,
    fatal: bool,
    times: int,
) -> list[tuple[str, str]]:
    """Puts an error among the steps; returns what can be written (all of it, unless it is fatal)."""
    if fatal:
        steps.append({"error": "fatal"})
        steps.append({"text": "never said"})
        return written
    place = random.randint(1, len(steps))
    steps.insert(place, {"error": "transient", "times": times})
    return written
