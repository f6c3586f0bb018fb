"""Compares turns with tools with what was asked, answered and executed (§5, §6, §8).

`check_answers` holds at any moment, also right after a crash: what people were answered is so.
`check_turn_of` and `check_calls` hold when a conversation is at rest: each turn is what its script asks
for, round by round, and each call ended as it may, was executed no more often than it may, with the
arguments that were decided, after everything was decided.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from itertools import groupby

from evidence import Evidence
from tool_conversation import ToolConversation
from tool_ledger import Ledger, rank
from tool_rows import ENDED, StoredCall
from tool_script import Round, ToolScript
from verdict import check_broken, may_fail, reply_of
from witness import Step, StoredMessage, StoredTurn

Transition = tuple[str, str, str]


def frozen(ledger: Ledger) -> Ledger:
    """What had been answered by now, before the database is read."""
    now = copy(ledger)
    now.decisions = {
        call_id: [(item, copy(said)) for item, said in asked]
        for call_id, asked in ledger.decisions.items()
    }
    now.results = {
        call_id: [(item, copy(said)) for item, said in asked]
        for call_id, asked in ledger.results.items()
    }
    now.seen = dict(ledger.seen)
    return now


def check_answers(
    evidence: Evidence, told: Ledger, calls: Iterable[StoredCall], texts: Mapping[str, str]
) -> None:
    """Decisions and results that were taken are stored, and no call has gone back."""
    stored = {call.id: call for call in calls}
    for call_id in told.decisions:
        for decision in told.taken_decisions(call_id):
            evidence.counts["decisions compared"] += 1
            call = stored.get(call_id)
            kept = call is not None and call.decided_at is not None
            kept = kept and (call.status == "denied") == (decision.word == "deny")
            if not kept or decision.arguments not in (None, call.arguments):
                evidence.fault("a lost decision", decision=decision, stored=call)
    for call_id in told.results:
        for posted in told.taken_results(call_id):
            evidence.counts["results compared"] += 1
            call = stored.get(call_id)
            status = "failed" if posted.is_error else "succeeded"
            kept = call is not None and call.external and call.status == status
            if not kept or texts.get(call.result_message_id or "") != posted.content:
                evidence.fault("a lost result", call=call_id, stored=call)
    for call_id, seen in told.seen.items():
        call = stored.get(call_id)
        ended = rank(seen.status) == rank("denied")
        if call is None or rank(call.status) < rank(seen.status):
            evidence.fault("a call that went back", call=call_id, seen=seen, stored=call)
        elif ended and (call.status, call.result_message_id) != (
            seen.status,
            seen.result_message_id,
        ):
            evidence.fault("a call that ended otherwise", call=call_id, seen=seen, stored=call)


def check_steps(
    evidence: Evidence, context_id: str, journal: Iterable[Step], table: set[Transition]
) -> None:
    """Every step of the journal is a row of the table."""
    for step in journal:
        if (step.trigger, step.from_state, step.to_state) not in table:
            evidence.fault("a step that the table does not have", context=context_id, step=step)


class TurnCheck:
    """Checks one turn after the other of a conversation whose calls are `calls`."""

    def __init__(self, conversation: ToolConversation, calls: Iterable[StoredCall]) -> None:
        self._conversation = conversation
        self._calls: dict[str, list[StoredCall]] = {}
        for call in calls:
            self._calls.setdefault(call.turn_id, []).append(call)

    def __call__(
        self,
        evidence: Evidence,
        turn: StoredTurn,
        script: ToolScript,
        messages: list[StoredMessage],
    ) -> None:
        calls = self._calls.get(turn.id, [])
        script = _as_played(turn, script, calls)
        rounds = [list(group) for _, group in groupby(calls, key=lambda call: call.round)]
        mine = [m for m in messages if m.turn_id == turn.id]
        answers = [m for m in mine if m.role == "assistant"]
        kept = [m for m in answers if m.status != "interrupted"]
        evidence.counts[f"turns {turn.status}"] += 1
        evidence.counts["messages interrupted"] += len(answers) - len(kept)
        evidence.counts["rounds of calls"] += len(rounds)
        facts = {"turn": turn.id, "status": turn.status, "attempt": turn.attempt}
        check_broken(evidence, turn, script, [m for m in answers if m.status == "interrupted"])
        self._check_text(evidence, turn, script, kept, len(rounds))
        if turn.status == "failed" and not may_fail(turn, script):
            evidence.fault("a turn that failed without a reason", error=turn.error, **facts)
        asked = [round_ for round_ in script.rounds if round_.calls]
        if turn.status == "completed" and len(rounds) != len(asked):
            evidence.fault("a completed turn without all its calls", rounds=len(rounds), **facts)
        results = {call.result_message_id for call in calls} - {None}
        if {m.id for m in mine if m.role == "tool"} != results:
            evidence.fault("results that are not those of the calls", **facts)
        for number, (stored, wanted) in enumerate(zip(rounds, asked, strict=False), 1):
            _check_round(evidence, number, stored, wanted, facts)
        _check_order(evidence, rounds, kept, {m.id: m for m in mine}, facts)

    def _check_text(
        self,
        evidence: Evidence,
        turn: StoredTurn,
        script: ToolScript,
        kept: list[StoredMessage],
        round_count: int,
    ) -> None:
        facts = {"turn": turn.id, "status": turn.status, "attempt": turn.attempt}
        written = [reply_of(message) for message in kept if message.head]
        whole = tuple(written) == script.replies
        closed = sum(len(round_.replies) for round_ in script.rounds[:round_count])
        if any(message.status != "completed" for message in kept[:closed]):
            evidence.fault("a round with calls whose messages did not complete", **facts)
        statuses = {message.status for message in kept[closed:]}
        late = turn.status == "cancelled" and whole and statuses == {"completed"}
        if statuses - {turn.status} and not late:
            evidence.fault("a turn whose messages ended otherwise", statuses=statuses, **facts)
        said = [message for message in kept if message.head]
        # A call that was never answered, or nothing at all: then an empty message tells of the end.
        unanswered = said and (said[-1].kind, said[-1].status) == ("tool_call", "completed")
        wanted = not said or (turn.status != "completed" and bool(unanswered))
        if len(kept) - len(said) != wanted:
            evidence.fault("an end that no message tells, or more than one", **facts)
        if turn.status == "completed":
            if not whole or not script.completes(turn.attempt):
                evidence.fault("a completed turn with another text", **facts)
        elif not script.explains(written):
            evidence.fault("a turn with a text that its script does not have", **facts)


def _as_played(turn: StoredTurn, script: ToolScript, calls: list[StoredCall]) -> ToolScript:
    """Over its limit a turn completes with the results: what follows is not played."""
    over = [call.round for call in calls if call.error == "tool_limit"]
    return script.cut_after(max(over)) if over and turn.status == "completed" else script


def _check_round(
    evidence: Evidence,
    number: int,
    stored: list[StoredCall],
    wanted: Round,
    facts: dict[str, object],
) -> None:
    names = [call.name for call in stored]
    if names != [call.tool for call in wanted.calls] or {c.round for c in stored} != {number}:
        evidence.fault("other calls than were asked for", round=number, names=names, **facts)
    open_calls = [call.id for call in stored if call.status not in ENDED]
    if open_calls:
        evidence.fault("calls without an end", calls=open_calls, **facts)
    answered = all(call.collected and call.result_message_id for call in stored)
    if facts["status"] == "completed" and not answered:
        evidence.fault("a completed turn with a call without result", round=number, **facts)


def _check_order(
    evidence: Evidence,
    rounds: list[list[StoredCall]],
    kept: list[StoredMessage],
    by_id: Mapping[str, StoredMessage],
    facts: dict[str, object],
) -> None:
    """The calls of a reply, then their results, then what the model says next."""
    begins: list[tuple[int, int]] = []  # of each round of calls: its last call, its last result
    for calls in rounds:
        asked = [by_id[call.message_id].depth or 0 for call in calls]
        given = [by_id[c.result_message_id].depth or 0 for c in calls if c.result_message_id]
        if asked != sorted(asked) or (given and min(given) < max(asked)):
            evidence.fault("results before their calls", round=calls[0].round, **facts)
        begins.append((max(asked), max(given, default=0)))
    for last_asked, last_given in begins:
        after = [m.depth or 0 for m in kept if (m.depth or 0) > last_asked]
        if after and min(after) < last_given:
            evidence.fault("a reply before the results that it answers", **facts)
