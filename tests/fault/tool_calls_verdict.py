"""Compares each call of a conversation at rest with its script, its deciders and the tools' book (§8)."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evidence import Evidence
from tool_book import Book, Execution
from tool_conversation import ToolConversation
from tool_rows import StoredCall
from tool_script import AskedCall
from witness import Step, StoredMessage, StoredTurn

REFUSALS = ("unknown_tool", "invalid_arguments", "plan_mode", "tool_limit")
DENIED = "A person denied this call."


class CallCheck:
    """Of one conversation. `texts`: of all messages, by id. `workspace`: where files are written."""

    def __init__(
        self,
        conversation: ToolConversation,
        *,
        book: Book,
        workspace: Path,
        texts: Mapping[str, str],
        turns: list[StoredTurn],
        journal: list[Step],
    ) -> None:
        self._conversation = conversation
        self._evidence: Evidence = conversation.evidence
        self._ledger = conversation.ledger
        self._book = book
        self._workspace = workspace
        self._texts = texts
        self._statuses = {turn.id: turn.status for turn in turns}
        self._recoveries = Counter(
            step.turn_id
            for step in journal
            if step.trigger == "recover" and step.from_state == "executing_tools"
        )
        self._by_mark: dict[str, list[StoredCall]] = {}
        self._rounds: dict[tuple[str, int], list[StoredCall]] = {}

    def check(self, calls: list[StoredCall], messages: dict[str, str]) -> None:
        """`messages`: the user's message that each turn answers, by the turn's id."""
        asked: list[tuple[StoredCall, AskedCall, int]] = []
        places: Counter[str] = Counter()
        for call in calls:
            script = self._conversation.script_of(messages[call.turn_id])
            wanted = [one for round_ in script.rounds for one in round_.calls]
            place = places[call.turn_id]
            places[call.turn_id] += 1
            asked.append((call, wanted[place], place + 1))
            self._by_mark.setdefault(wanted[place].mark, []).append(call)
            self._rounds.setdefault((call.turn_id, call.round), []).append(call)
        for call, wanted_call, place in asked:
            self._check_call(call, wanted_call, place)

    def _check_call(self, call: StoredCall, asked: AskedCall, place: int) -> None:
        counts = self._evidence.counts
        counts[f"calls {call.status}"] += 1
        if call.error is not None:
            counts[f"calls with the error {call.error}"] += 1
        executions = self._executions(call, asked)
        counts["executions"] += len(executions)
        self._check_decided(call, asked)
        self._check_limit(call, asked, place)
        self._check_executions(call, asked, executions)
        self._check_end(call, asked, executions)
        if asked.name == "write_file":
            self._check_file(call, asked)

    def _fault(self, what: str, call: StoredCall, asked: AskedCall, **facts: object) -> None:
        self._evidence.fault(what, kind=asked.name, mark=asked.mark, call=call, **facts)

    def _executions(self, call: StoredCall, asked: AskedCall) -> list[Execution]:
        """Those of this call: a turn that was tried again has another call of the same mark."""
        siblings = self._by_mark[asked.mark]
        begins = [one.created_at for one in siblings]
        found = []
        for execution in self._book.executions(asked.mark):
            owners = [at for at in begins if at <= execution.at_ms + 1]
            if not owners:
                self._fault("an execution before its call", call, asked, execution=execution)
            elif max(owners) == call.created_at:
                found.append(execution)
        return found

    def _check_decided(self, call: StoredCall, asked: AskedCall) -> None:
        possible = self._ledger.possible_decisions(call.id)
        words = {decision.word for decision in possible}
        word = "deny" if call.status == "denied" else "approve"
        if call.decided_at is not None and word not in words:
            self._fault("a decision that nobody made", call, asked)
        waits_for_ever = call.requires_approval and call.decided_at is None
        if waits_for_ever and call.status != "cancelled":
            self._fault("a call that went on undecided", call, asked)
        edits = [decision.arguments for decision in possible if decision.arguments is not None]
        if call.arguments != asked.arguments and call.arguments not in edits:
            self._fault("arguments that nobody gave", call, asked)
        allowed = [name for names in self._conversation.policies["allow"] for name in names]
        guarded = asked.kind.guarded and asked.name not in allowed
        if guarded and not call.requires_approval and call.error not in REFUSALS:
            self._fault("a guarded call that nobody was asked about", call, asked)
        free = not asked.kind.guarded and "manual" not in self._conversation.policies["mode"]
        if free and call.requires_approval:
            self._fault("a free call that somebody was asked about", call, asked)
        if call.requires_approval:
            self._evidence.counts["calls that waited for a person"] += 1

    def _check_limit(self, call: StoredCall, asked: AskedCall, place: int) -> None:
        """The policy may have changed meanwhile: what any of its values allows is allowed."""
        policies = self._conversation.policies
        may = place > min(policies["max_calls"]) or call.round > min(policies["max_depth"])
        must = place > max(policies["max_calls"]) or call.round > max(policies["max_depth"])
        over = call.error == "tool_limit"
        if (over and not may) or (must and not over):
            self._fault("a wrong limit", call, asked, place=place)

    def _check_executions(
        self, call: StoredCall, asked: AskedCall, executions: list[Execution]
    ) -> None:
        recovered = self._recoveries[call.turn_id]
        again = recovered if asked.kind.idempotent else 0
        if len(executions) > 1 + again:
            self._fault("a call that was executed too often", call, asked, times=executions)
        self._evidence.counts["executions again, of idempotent tools"] += max(
            0, len(executions) - 1
        )
        if executions and (call.started_at is None or call.external):
            self._fault("an execution of a call that was not started", call, asked)
        given = {name: value for name, value in (call.arguments or {}).items() if name != "book"}
        for execution in executions:
            if execution.arguments != given:
                self._fault("an execution with other arguments", call, asked, was=execution)
            self._check_all_decided(call, asked, execution)
        refused = call.error in REFUSALS or call.status == "denied"
        interrupted = call.error == "plan_mode" and asked.kind.idempotent and recovered
        if executions and refused and not interrupted:
            self._fault("a refused call that ran", call, asked, executions=executions)

    def _check_all_decided(self, call: StoredCall, asked: AskedCall, execution: Execution) -> None:
        for other in self._rounds[call.turn_id, call.round]:
            undecided = other.decided_at is None or other.decided_at > execution.at_ms + 1
            if other.requires_approval and undecided:
                self._fault("an execution before all was decided", call, asked, other=other)

    def _check_end(self, call: StoredCall, asked: AskedCall, executions: list[Execution]) -> None:
        text = self._texts.get(call.result_message_id or "")
        fits = False
        match call.status:
            case "cancelled":
                ended = self._statuses[call.turn_id] in ("cancelled", "failed")
                fits = text is None and ended
            case "denied":
                fits = text is not None and self._is_denial(call, text)
            case "timed_out":
                fits = not call.external and bool(executions or asked.kind.built_in)
            case "succeeded" | "failed" if call.external and call.error in (None, "tool_error"):
                fits = self._was_posted(call, text)
            case "succeeded":
                own = asked.name not in ("crash", "refuse") and asked.kind.refused is None
                fits = own and (asked.kind.built_in or text in _given(executions))
            case "failed":
                fits = self._may_fail(call, asked, executions, text or "")
        if not fits:
            self._fault("a wrong end of a call", call, asked, text=text, executions=executions)

    def _may_fail(
        self, call: StoredCall, asked: AskedCall, executions: list[Execution], text: str
    ) -> bool:
        match call.error:
            case "unknown_tool" | "invalid_arguments":
                return asked.kind.refused == call.error
            case "tool_limit":
                return True
            case "plan_mode":
                return "plan" in self._conversation.modes and not asked.kind.read_only
            case "outcome_unknown":
                self._evidence.counts["outcomes unknown, executed"] += bool(executions)
                return not asked.kind.idempotent and self._recoveries[call.turn_id] > 0
            case "tool_error":
                return asked.name == "refuse" and text in _given(executions)
            case "tool_exception":
                return asked.name == "crash" and bool(_given(executions))
        return False

    def _is_denial(self, call: StoredCall, text: str) -> bool:
        said = [one for one in self._ledger.possible_decisions(call.id) if one.word == "deny"]
        return any(
            text == DENIED if one.reason is None else text.startswith(DENIED) and one.reason in text
            for one in said
        )

    def _was_posted(self, call: StoredCall, text: str | None) -> bool:
        return any(
            posted.content == text and posted.is_error == (call.status == "failed")
            for posted in self._ledger.possible_results(call.id)
        )

    def _check_file(self, call: StoredCall, asked: AskedCall) -> None:
        path = self._workspace / f"{asked.mark}.txt"
        ran = [one for one in self._by_mark[asked.mark] if one.started_at is not None]
        contents = {(one.arguments or {}).get("content", "") for one in ran}
        if path.exists() and path.read_bytes().decode() not in contents:
            self._fault("a file that no call has written so", call, asked)
        if call.status == "succeeded" and not path.exists():
            self._fault("a file that was not written", call, asked)


def check_marks(book: Book, conversations: Mapping[str, ToolConversation]) -> None:
    """No tool that is not idempotent ran more often than turns were tried again. Holds at any moment."""
    for mark, executions in book.marks().items():
        message_id, _, number = mark.rpartition("-")
        conversation = conversations[message_id.partition(".")[0]]
        asked = conversation.asked(message_id, int(number))
        if not asked.kind.idempotent and len(executions) > 1 + conversation.retries_max:
            conversation.evidence.fault("a call that was executed too often", times=executions)


def user_messages(turns: list[StoredTurn], messages: list[StoredMessage]) -> dict[str, str]:
    """The user's message that each turn answers, by the turn's id."""
    by_key = {message.key: message.id for message in messages}
    return {turn.id: by_key[turn.user_message_key] for turn in turns}


def _given(executions: list[Execution]) -> list[str]:
    return [execution.gave for execution in executions if execution.gave is not None]
