"""What people asked of the calls of one conversation, and what they were answered (§8).

Each decision and each result is noted before it goes out. One whose answer was lost may have been taken
or not; one that was taken is so for ever, also after a kill, and one that was refused never is.
"""

from dataclasses import dataclass, field
from typing import Any

from evidence import Evidence

RANKS = {"pending": 0, "approved": 1, "running": 2}  # of the others: an end, which is for ever


@dataclass(frozen=True)
class Decision:
    """What a person says to one call. `arguments`: those that replace the model's."""

    call_id: str
    word: str
    reason: str | None = None
    arguments: dict[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """As it goes out."""
        body: dict[str, Any] = {"tool_call_id": self.call_id, "decision": self.word}
        if self.reason is not None:
            body["reason"] = self.reason
        return body if self.arguments is None else {**body, "arguments": self.arguments}


@dataclass(frozen=True)
class Posted:
    """A result of an external call."""

    call_id: str
    content: str
    is_error: bool


@dataclass
class Said:
    """One request, of decisions or of a result. `outcome`: open | taken | refused."""

    items: tuple[Decision, ...] | tuple[Posted, ...]
    outcome: str = "open"


@dataclass(frozen=True)
class Seen:
    """A call as it was last answered."""

    status: str
    result_message_id: str | None


@dataclass
class Ledger:
    """Of one conversation, by the ids of its calls."""

    evidence: Evidence
    decisions: dict[str, list[tuple[Decision, Said]]] = field(default_factory=dict)
    results: dict[str, list[tuple[Posted, Said]]] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)

    def ask(self, items: tuple[Decision, ...] | tuple[Posted, ...]) -> Said:
        """Notes what is going to be asked."""
        said = Said(items)
        for item in items:
            if isinstance(item, Decision):
                self.decisions.setdefault(item.call_id, []).append((item, said))
            else:
                self.results.setdefault(item.call_id, []).append((item, said))
        return said

    def take(self, said: Said) -> None:
        """It was answered with 202: nothing that was taken before may say otherwise."""
        said.outcome = "taken"
        for item in said.items:
            if isinstance(item, Decision):
                self._require_one_decision(item.call_id)
            elif len(set(self.taken_results(item.call_id))) > 1:
                self.evidence.fault("two results of one call were taken", call=item.call_id)

    def refuse(self, said: Said, *, decided: bool) -> None:
        """It was answered with 409; `decided`: as the call was decided otherwise, which no repeat is."""
        if decided and all(self._is_repeat(item) for item in said.items):
            self.evidence.fault("a repeat that was refused", items=said.items)
        said.outcome = "refused"

    def taken_decisions(self, call_id: str) -> list[Decision]:
        """Those that were answered with 202."""
        return [one for one, said in self.decisions.get(call_id, []) if said.outcome == "taken"]

    def taken_results(self, call_id: str) -> list[Posted]:
        """Those that were answered with 202."""
        return [one for one, said in self.results.get(call_id, []) if said.outcome == "taken"]

    def possible_decisions(self, call_id: str) -> list[Decision]:
        """Those that were not refused."""
        return [one for one, said in self.decisions.get(call_id, []) if said.outcome != "refused"]

    def possible_results(self, call_id: str) -> list[Posted]:
        """Those that were not refused."""
        return [one for one, said in self.results.get(call_id, []) if said.outcome != "refused"]

    def see(self, item: dict[str, Any]) -> None:
        """A call as the API shows it. Answers may overtake each other, so only ends must agree."""
        now = Seen(item["status"], item["result_message_id"])
        was = self.seen.setdefault(item["id"], now)
        if rank(was.status) == rank(now.status) and was != now:
            self.evidence.fault("a call that ended twice", call=item["id"], was=was, now=now)
        if rank(now.status) > rank(was.status):
            self.seen[item["id"]] = now

    def _require_one_decision(self, call_id: str) -> None:
        taken = self.taken_decisions(call_id)
        edits = [one.arguments for one in taken if one.arguments is not None]
        if len({one.word for one in taken}) > 1 or any(one != edits[0] for one in edits):
            self.evidence.fault("a call that was decided twice", call=call_id, taken=taken)

    def _is_repeat(self, item: Decision | Posted) -> bool:
        if isinstance(item, Posted):
            return item in self.taken_results(item.call_id)
        return any(
            one.word == item.word and item.arguments in (None, one.arguments)
            for one in self.taken_decisions(item.call_id)
        )


def rank(status: str) -> int:
    """How far a call has come."""
    return RANKS.get(status, 3)
