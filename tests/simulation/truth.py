"""What is committed, read from the database itself after each commit, and what may never change.

Each commit is looked at as soon as it is done: sequences are dense, text that was there is as it was,
a closed message and an ended turn stay as they are, no revision goes back.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from contextd.core.machine import State, Trigger, advance


class Violation(Exception):
    """A promise was broken. The first one is kept, because contextd survives what its hooks raise."""

    first: ClassVar["Violation | None"] = None


class MessageFact:
    """One message as it is committed."""

    def __init__(self, context_id: str, row: Any) -> None:
        self.context_id = context_id
        self.id: str = row["id"]
        self.key: int = row["key"]
        self.role: str = row["role"]
        self.turn_id: str | None = row["turn_id"]
        self.producer_id: str | None = row["producer_id"]
        self.opened_revision: int = row["opened_revision"]
        self.texts: list[str] = []
        self.status = "streaming"
        self.final: int | None = None
        self.closed_revision: int | None = None
        self.revision = 0  # of its last change; a queued one changes once more when its turn starts
        self.changed_at = 0.0

    @property
    def head(self) -> int:
        return len(self.texts)

    @property
    def open(self) -> bool:
        return self.status == "streaming"

    def text(self, start: int, end: int) -> str:
        """Chunks `start` + 1 to `end`."""
        return "".join(self.texts[start:end])


class ContextFact:
    """One context as it is committed."""

    def __init__(self, row: Any) -> None:
        self.id: str = row["id"]
        self.key: int = row["key"]
        self.revision = 0
        self.state: str = row["state"]
        self.deleted_at: float | None = None
        self.messages: dict[str, MessageFact] = {}
        self.turns: dict[str, str] = {}  # their statuses


class Truth:
    """The database as it is committed. `look` reads what is new; `now` is the virtual time."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        self._now = now
        self.contexts: dict[str, ContextFact] = {}
        self._by_key: dict[int, MessageFact] = {}

    def query(self, sql: str, *parameters: Any) -> list[Any]:
        """Rows, past every server."""
        return self._database.execute(sql, parameters).fetchall()

    def message(self, context_id: str, message_id: str) -> MessageFact | None:
        """A message that was committed, also of a deleted context."""
        context = self.contexts.get(context_id)
        return None if context is None else context.messages.get(message_id)

    def context(self, context_id: str) -> ContextFact | None:
        """A context that is there."""
        context = self.contexts.get(context_id)
        return None if context is None or context.deleted_at is not None else context

    def alive(self) -> list[ContextFact]:
        """The contexts that are there."""
        return [one for one in self.contexts.values() if one.deleted_at is None]

    def look(self) -> None:
        """Takes in what the last commit changed. Raises `Violation`."""
        rows = self.query("SELECT key, id, revision, state FROM contexts")
        found = {row["id"] for row in rows}
        for row in rows:
            context = self.contexts.get(row["id"])
            if context is None:
                context = self.contexts[row["id"]] = ContextFact(row)
            self._take_context(context, row)
        for context in self.alive():
            if context.id not in found:
                context.deleted_at = self._now()
        self._take_chunks()

    def close(self) -> None:
        self._database.close()

    def _take_context(self, context: ContextFact, row: Any) -> None:
        expect(context.deleted_at is None and context.key == row["key"], f"{context.id} is back")
        if row["revision"] == context.revision:
            return
        expect(row["revision"] > context.revision, f"the revision of {context.id} went back")
        before, context.revision, context.state = context.revision, row["revision"], row["state"]
        changed = self.query(
            "SELECT m.*, h.producer_id FROM messages m JOIN heads h ON h.message_key = m.key"
            " WHERE m.context_key = ? AND m.revision > ?",
            context.key,
            before,
        )
        for each in changed:
            self._take_message(context, each)
        for turn in self.query("SELECT id, status FROM turns WHERE context_key = ?", context.key):
            _take_turn(context, turn["id"], turn["status"])

    def _take_message(self, context: ContextFact, row: Any) -> None:
        fact = context.messages.get(row["id"])
        if fact is None:
            fact = MessageFact(context.id, row)
            context.messages[fact.id] = self._by_key[fact.key] = fact
        fact.changed_at, fact.revision = self._now(), row["revision"]
        if not fact.open:
            same = (fact.status, fact.final) == (row["status"], row["final_sequence"])
            expect(same, f"{fact.id} was closed as {fact.status}, and is {row['status']} now")
        elif row["status"] != "streaming":
            fact.status, fact.final = row["status"], row["final_sequence"]
            fact.closed_revision = row["revision"]

    def _take_chunks(self) -> None:
        for key, head in self._database.execute("SELECT message_key, head FROM heads").fetchall():
            fact = self._by_key.get(key)
            if fact is None or head == fact.head or self.context(fact.context_id) is None:
                continue
            expect(head > fact.head, f"the head of {fact.id} went back to {head}")
            expect(fact.final is None or head <= fact.final, f"{fact.id} grew after its end")
            self._extend(fact, head)

    def _extend(self, fact: MessageFact, head: int) -> None:
        rows = self._database.execute(
            "SELECT sequence, content FROM chunks WHERE message_key = ? AND sequence > ?"
            " ORDER BY sequence",
            (fact.key, fact.head),
        ).fetchall()
        wanted = list(range(fact.head + 1, head + 1))
        expect([row[0] for row in rows] == wanted, f"the sequences of {fact.id} are not dense")
        fact.texts += [row[1] for row in rows]
        fact.changed_at = self._now()

    def verify(self) -> None:
        """At the end: nothing that was committed has changed, and the journal walks the table."""
        self.look()
        for context in self.alive():
            for fact in context.messages.values():
                self._verify_message(fact)
            self._verify_journal(context)

    def _verify_message(self, fact: MessageFact) -> None:
        rows = self.query(
            "SELECT sequence, content FROM chunks WHERE message_key = ? ORDER BY sequence", fact.key
        )
        stored = [(row["sequence"], row["content"]) for row in rows]
        expect(stored == list(enumerate(fact.texts, 1)), f"the text of {fact.id} changed")
        if not fact.open:
            expect(fact.final == fact.head, f"{fact.id} ends at {fact.final} with {fact.head}")

    def _verify_journal(self, context: ContextFact) -> None:
        state = "idle"
        ends: set[str] = set()
        for row in self.query(
            "SELECT * FROM journal WHERE context_key = ? ORDER BY revision", context.key
        ):
            words = f"{row['trigger']} from {row['from_state']} to {row['to_state']}"
            expect(row["from_state"] == state, f"the journal of {context.id}: {state}, {words}")
            expect(_leads(row), f"the journal of {context.id}: no {words} in the table")
            state = row["to_state"]
            if row["trigger"] in ("finish", "fail", "cancel") and row["turn_id"]:
                expect(row["turn_id"] not in ends, f"{row['turn_id']} ended twice")
                ends.add(row["turn_id"])
        expect(state == context.state, f"the journal of {context.id} ends in {state}")


def expect(true: bool, words: str) -> None:
    """Raises `Violation` with `words` where a promise does not hold."""
    if not true:
        violation = Violation(words)
        Violation.first = Violation.first or violation
        raise violation


def _take_turn(context: ContextFact, turn_id: str, status: str) -> None:
    order = ("queued", "running")
    before = context.turns.get(turn_id)
    if before not in (None, status):
        on = before in order and (status not in order or order.index(status) > order.index(before))
        expect(on, f"turn {turn_id} was {before} and is {status}")
    context.turns[turn_id] = status


def _leads(row: Any) -> bool:
    return advance(State(row["from_state"]), Trigger(row["trigger"])) == row["to_state"]
