"""A producer's checkpoint: a file of lines that only grows, so that a SIGKILL can tear only the last.

A producer writes down what it is about to ask before it asks, and what it was answered before it goes
on. Who comes after it reads where to go on; the verdict reads what must be stored, and what may be.
"""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """What one producer knows of one message.

    `opened`: by epoch, the least head that an answer to a take-over told. `sent`: by epoch, the
    newest sequence that was asked for. `closed`: as it was told. `asked_at_ms`: when the last write
    that was answered went out, by the clock on the wall.
    """

    intended: int = 0
    opened: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    acked: int = 0
    acked_texts: dict[int, int] = field(default_factory=dict)  # sequence: the epoch of its text
    endings: set[str] = field(default_factory=set)
    closed: tuple[str, int] | None = None
    stale: bool = False
    asked_at_ms: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do for its producer."""
        return self.closed is not None or self.stale


@dataclass
class Account:
    """Everything that one ledger holds."""

    messages: dict[str, Record] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    gone: bool = False
    done: bool = False

    def record(self, message_id: str) -> Record:
        """Empty at first."""
        return self.messages.setdefault(message_id, Record())


class Ledger:
    """The writing side. Each line is one `write` to a file opened for appending."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if os.fstat(self._file).st_size:
            os.write(self._file, b"\n")  # ends what a kill may have torn

    def note(self, what: str, **facts: Any) -> None:
        """One more line."""
        line = json.dumps({"what": what, **facts}) + "\n"
        os.write(self._file, line.encode())

    def count(self, name: str, number: int = 1) -> None:
        """For the figures of the run."""
        self.note("count", name=name, number=number)

    def fault(self, what: str, **facts: Any) -> None:
        """The server did what it must not."""
        self.note("fault", fault=what, facts={name: repr(fact) for name, fact in facts.items()})


def now_ms() -> float:
    """The clock on the wall, which the server's times are of."""
    return time.time() * 1000


def read_ledger(path: str | Path) -> Account:
    """What the lines say together; a torn one says nothing."""
    account = Account()
    if not Path(path).exists():
        return account
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        _take(account, entry)
    return account


def _take(account: Account, entry: dict[str, Any]) -> None:
    match entry.pop("what"):
        case "count":
            account.counts[entry["name"]] += entry["number"]
        case "fault":
            account.faults.append(entry)
        case "gone":
            account.gone = True
        case "done":
            account.done = True
        case what:
            _take_of_message(account.record(entry["message"]), what, entry)


def _take_of_message(record: Record, what: str, entry: dict[str, Any]) -> None:
    match what:
        case "intended":
            record.intended = max(record.intended, entry["epoch"])
        case "opened":
            epoch, head = entry["epoch"], entry["head"]
            record.intended = max(record.intended, epoch)
            record.opened[epoch] = min(head, record.opened.get(epoch, head))
            record.asked_at_ms = max(record.asked_at_ms, entry["asked_at_ms"])
        case "sending":
            epoch = entry["epoch"]
            record.sent[epoch] = max(entry["sequence"], record.sent.get(epoch, 0))
        case "acked":
            _take_acked(record, entry)
        case "ending":
            record.endings.add(entry["status"])
        case "closed":
            record.closed = entry["status"], entry["final"]
        case "stale":
            record.stale = True


def _take_acked(record: Record, entry: dict[str, Any]) -> None:
    first, last = entry["first"], entry["last"]
    record.acked_texts.update(dict.fromkeys(range(first, last + 1), entry["epoch"]))
    record.acked = max(record.acked, last)
    if entry["accepted"]:
        record.asked_at_ms = max(record.asked_at_ms, entry["asked_at_ms"])
