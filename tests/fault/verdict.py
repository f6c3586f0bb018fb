"""Compares the database with what was told and asked: the end of every fault run, and of every crash.

`check_kept` holds right after a crash: nothing that was answered, signalled or pulled is lost or
changed. `check_conversation` holds when a conversation is at rest: each turn ended exactly once, with
exactly the text that its script asks for. `check_whole` is about the database by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from conversation import NOTE_ROLE, Conversation
from evidence import Evidence, Known
from nasty_scripts import ATTEMPTS_MAX, Reply, Script, is_prefix
from strict_readers import REST_STATES
from witness import Step, StoredContext, StoredMessage, StoredTurn, Witness

ENDS = {"finish": "completed", "fail": "failed", "cancel": "cancelled"}


@dataclass(frozen=True)
class _Told:
    """What had been told of a conversation at one moment, before the database is read."""

    revision: int
    title: str | None
    known: dict[str, Known]
    answers: dict[str, dict[str, Any]]
    refused: set[str]
    cancelled: set[str]
    retried: set[str]


def _told(conversation: Conversation) -> _Told:
    evidence, sent = conversation.evidence, conversation.sent.values()
    return _Told(
        revision=evidence.revision(conversation.id),
        title=conversation.title_answered,
        known=deepcopy(evidence.messages.get(conversation.id, {})),
        answers={one.message_id: one.answer for one in sent if one.answer is not None},
        refused={one.message_id for one in sent if one.refused},
        cancelled=set(conversation.cancelled_turns),
        retried=set(conversation.retried_turns),
    )


async def check_kept(truth: Witness, conversations: Iterable[Conversation]) -> None:
    """What anybody was told of these conversations is still so."""
    for conversation in conversations:
        if conversation.id in conversation.evidence.deleting and not conversation.deleted:
            continue  # asked and not answered: it may be there or not
        created, deleted = conversation.created, conversation.deleted
        told = _told(conversation)
        row = await truth.context(conversation.id)
        if row is None:
            if created and conversation.id not in conversation.evidence.deleting:
                conversation.evidence.fault("a lost context", context=conversation.id)
        elif deleted:
            conversation.evidence.fault("a deleted context is back", context=conversation.id)
        else:
            await _check_kept(truth, conversation, told, row)


async def _check_kept(
    truth: Witness, conversation: Conversation, told: _Told, row: StoredContext
) -> None:
    evidence = conversation.evidence
    if row.revision < told.revision:
        evidence.fault("a lost revision", context=row.id, stored=row.revision, told=told.revision)
    if told.title not in (None, row.title) and conversation.title_answered == told.title:
        evidence.fault("a lost title", context=row.id, stored=row.title, told=told.title)
    stored = {message.id: message for message in await truth.messages(row.key)}
    turns = {turn.id: turn for turn in await truth.turns(row.key)}
    for message_id, known in told.known.items():
        _check_known(evidence, message_id, known, stored.get(message_id))
    for message_id, answer in told.answers.items():
        script = conversation.sent[message_id].script
        if message_id not in stored or stored[message_id].text != script.content:
            evidence.fault("a lost send", message=message_id)
        if answer["turn_id"] is not None and answer["turn_id"] not in turns:
            evidence.fault("a lost turn", message=message_id, turn=answer["turn_id"])
    for message_id in told.refused & stored.keys():
        if conversation.sent[message_id].refused:
            evidence.fault("a refused send that is stored", message=message_id)
    for turn_id in told.cancelled:
        if turn_id not in turns or turns[turn_id].status != "cancelled":
            evidence.fault("a cancel that was lost", turn=turn_id)
    if missing := told.retried - turns.keys():
        evidence.fault("a retry that was lost", turns=sorted(missing))


def _check_known(
    evidence: Evidence, message_id: str, known: Known, stored: StoredMessage | None
) -> None:
    if stored is None:
        evidence.fault("a lost message", message=message_id)
        return
    ends = list(accumulate((len(chunk) for chunk in stored.chunks), initial=0))
    kept = (
        stored.head >= known.head
        and stored.text.startswith(known.text)
        and all(at < len(ends) and ends[at] == end for at, end in known.offsets.items())
    )
    if not kept:
        evidence.fault(
            "lost or changed chunks", message=message_id, told=known.head, stored=stored.head
        )
    if known.closed not in (None, (stored.status, stored.final_sequence)):
        evidence.fault("a changed end", message=message_id, told=known.closed, stored=stored.status)
    evidence.counts["messages compared after a kill"] += 1


CheckTurn = Callable[[Evidence, StoredTurn, Script, list[StoredMessage]], None]


async def check_conversation(
    truth: Witness, conversation: Conversation, check_turn: CheckTurn | None = None
) -> None:
    """A conversation at rest is exactly what its scripts ask for; `check_turn` says so of one turn."""
    evidence = conversation.evidence
    row = await truth.context(conversation.id)
    assert row is not None
    messages = await truth.messages(row.key)
    turns = await truth.turns(row.key)
    journal = await truth.journal(row.key)
    if row.state not in REST_STATES:
        evidence.fault("a context that never came to rest", context=row.id, state=row.state)
    if row.message_count != sum(not message.superseded for message in messages):
        evidence.fault("a wrong message_count", context=row.id, stored=row.message_count)
    _check_users(conversation, messages, turns)
    _check_order(conversation, messages, turns, journal)
    _check_journal(evidence, row, turns, journal)
    _check_parents(evidence, row, messages)
    by_key = {message.key: message for message in messages}
    for turn in turns:
        sent = conversation.sent.get(by_key[turn.user_message_key].id)
        if sent is not None:
            (check_turn or _check_turn)(evidence, turn, sent.script, messages)


def _check_users(
    conversation: Conversation, messages: list[StoredMessage], turns: list[StoredTurn]
) -> None:
    evidence = conversation.evidence
    first_turns = Counter(turn.user_message_key for turn in turns if turn.retry_of is None)
    for message in messages:
        if message.role not in ("user", NOTE_ROLE):
            continue
        sent = conversation.sent.get(message.id)
        if sent is None or message.text.encode() != sent.script.content.encode():
            evidence.fault("a message that nobody sent so", message=message.id)
        elif first_turns[message.key] != sent.respond:
            evidence.fault("not one turn for a message", message=message.id)


def _check_order(
    conversation: Conversation,
    messages: list[StoredMessage],
    turns: list[StoredTurn],
    journal: list[Step],
) -> None:
    """What was queued starts in the order of its sending; only an interruption goes ahead."""
    user_ids = {message.key: message.id for message in messages}
    started = {step.turn_id: step.revision for step in journal if step.trigger == "receive_message"}
    order = [
        started[turn.id]
        for turn in turns
        if turn.id in started
        and turn.retry_of is None
        and conversation.sent[user_ids[turn.user_message_key]].on_busy != "interrupt"
    ]
    if order != sorted(order):
        conversation.evidence.fault("a queue out of order", context=conversation.id, order=order)


def _check_journal(
    evidence: Evidence, row: StoredContext, turns: list[StoredTurn], journal: list[Step]
) -> None:
    state, revision = "idle", 0
    states = {0: "idle"}
    for step in journal:
        if step.from_state != state or step.revision <= revision:
            evidence.fault("a journal with a hole", context=row.id, revision=step.revision)
        state, revision = step.to_state, step.revision
        states[revision] = state
    if state != row.state or revision > row.revision:
        evidence.fault("a journal that does not end at the state", context=row.id, state=state)
    ends: dict[str | None, list[str]] = {}
    for step in journal:
        if step.trigger in ENDS:
            ends.setdefault(step.turn_id, []).append(ENDS[step.trigger])
    started = {step.turn_id for step in journal}
    for turn in turns:
        wanted = [turn.status] if turn.id in started else []
        if ends.get(turn.id, []) != wanted or (not wanted and turn.status != "cancelled"):
            evidence.fault("not exactly one end", turn=turn.id, ends=ends.get(turn.id))
    for at, told in evidence.states.get(row.id, {}).items():
        newest = max(known for known in states if known <= at)
        if states[newest] != told:
            evidence.fault("a state that never was", context=row.id, revision=at, told=told)


def _check_parents(evidence: Evidence, row: StoredContext, messages: list[StoredMessage]) -> None:
    """What is listed is one line: each hangs on the one before, past what has left the lists."""
    by_id = {message.id: message for message in messages}
    listed = sorted(
        (message for message in messages if message.depth is not None and not message.superseded),
        key=lambda message: message.depth or 0,
    )
    before: str | None = None
    for message in listed:
        parent = message.parent_id
        while parent is not None and by_id[parent].superseded:
            parent = by_id[parent].parent_id
        if parent != before:
            evidence.fault(
                "a broken line of messages", context=row.id, message=message.id, parent=parent
            )
        before = message.id


def _check_turn(
    evidence: Evidence, turn: StoredTurn, script: Script, messages: list[StoredMessage]
) -> None:
    answers = [m for m in messages if m.turn_id == turn.id and m.role == "assistant"]
    broken = [m for m in answers if m.status == "interrupted"]
    kept = [m for m in answers if m.status != "interrupted"]
    facts = {"turn": turn.id, "status": turn.status, "attempt": turn.attempt}
    evidence.counts[f"turns {turn.status}"] += 1
    evidence.counts["messages interrupted"] += len(broken)
    check_broken(evidence, turn, script, broken)
    written = [reply_of(message) for message in kept if message.head]
    # A cancel that comes between the end of the stream and that of the turn finds the messages closed.
    late = turn.status == "cancelled" and tuple(written) == script.replies
    statuses = {message.status for message in kept}
    if statuses != {turn.status} and not (late and statuses == {"completed"}):
        evidence.fault("a turn whose messages ended otherwise", statuses=statuses, **facts)
    if any(message.head == 0 for message in kept) and len(kept) > 1:
        evidence.fault("an empty message beside others", **facts)
    if turn.status == "completed":
        if tuple(written) != script.replies or not script.completes(turn.attempt):
            evidence.fault("a completed turn with another text", **facts)
    elif not script.explains(written):
        evidence.fault("a turn with a text that its script does not have", **facts)
    if turn.status == "failed" and not may_fail(turn, script):
        evidence.fault("a turn that failed without a reason", error=turn.error, **facts)


def check_broken(
    evidence: Evidence, turn: StoredTurn, script: Script, broken: list[StoredMessage]
) -> None:
    """What interrupted attempts wrote is the beginning of what the script asks for, and out of sight."""
    for message in broken:
        if not message.superseded or not any(
            is_prefix(reply_of(message), reply) for reply in script.replies
        ):
            evidence.fault(
                "an interrupted message with another text", message=message.id, turn=turn.id
            )


def may_fail(turn: StoredTurn, script: Script) -> bool:
    """Whether the script asks for it, or the attempts are used up."""
    error = turn.error or ""
    if script.fatal and "scripted_error" in error:
        return True
    exhausted = "attempts_exhausted" in error or "scripted_error" in error
    return turn.attempt == ATTEMPTS_MAX and exhausted


def reply_of(message: StoredMessage) -> Reply:
    """A message as a script would have it."""
    return Reply(message.kind, message.chunks)


# Of a deleted context rows may be left that are still to be purged: they are nobody's any more.
LIVING = """heads h JOIN messages m ON m.key = h.message_key
             JOIN contexts c ON c.key = m.context_key"""
WHOLE = {
    "a hole among sequences": """
        SELECT count(*) FROM (SELECT message_key FROM chunks GROUP BY message_key
        HAVING count(*) <> max(sequence) OR min(sequence) <> 1) AS f""",
    "a head that is not the newest chunk": """
        SELECT count(*) FROM {living} WHERE h.head <>
        (SELECT coalesce(max(k.sequence), 0) FROM chunks k WHERE k.message_key = h.message_key)""",
    "a chunk of no message": """
        SELECT count(*) FROM chunks k WHERE NOT EXISTS
        (SELECT 1 FROM messages m WHERE m.key = k.message_key)""",
    "a message without a head": """
        SELECT count(*) FROM messages m WHERE NOT EXISTS
        (SELECT 1 FROM heads h WHERE h.message_key = m.key)""",
    "an open message": "SELECT count(*) FROM {living} WHERE m.status = 'streaming'",
    "a head that is open though its message is not": """
        SELECT count(*) FROM {living} WHERE h.is_open AND m.status <> 'streaming'""",
    "a final sequence that is not the head": """
        SELECT count(*) FROM {living} WHERE m.final_sequence IS NULL OR m.final_sequence <> h.head""",
    "wrong counts of characters": """
        SELECT count(*) FROM {living} WHERE h.characters <>
        (SELECT coalesce(sum(length(k.content)), 0) FROM chunks k
         WHERE k.message_key = h.message_key)""",
    "wrong counts of bytes": """
        SELECT count(*) FROM {living} WHERE h.bytes <>
        (SELECT coalesce(max(k.end_bytes), 0) FROM chunks k WHERE k.message_key = h.message_key)""",
    "chunks whose ends do not add up": """
        SELECT count(*) FROM (SELECT end_bytes, sum({bytes}) OVER
        (PARTITION BY message_key ORDER BY sequence) AS summed FROM chunks) AS f
        WHERE end_bytes <> summed""",
    "a journal ahead of its context": """
        SELECT count(*) FROM journal j JOIN contexts c ON c.key = j.context_key
        WHERE j.revision > c.revision""",
    "a message ahead of its context": """
        SELECT count(*) FROM messages m JOIN contexts c ON c.key = m.context_key
        WHERE m.revision > c.revision OR m.opened_revision > m.revision""",
    "a context that is stuck": """
        SELECT count(*) FROM contexts WHERE state NOT IN ('idle', 'failed')""",
    "a turn that is stuck": """
        SELECT count(*) FROM turns t JOIN contexts c ON c.key = t.context_key
        WHERE t.status IN ('queued', 'running')""",
    "two running turns of one context": """
        SELECT count(*) FROM (SELECT context_key FROM turns WHERE status = 'running'
        GROUP BY context_key HAVING count(*) > 1) AS f""",
}
ALWAYS = frozenset(WHOLE) - {
    "an open message",
    "a final sequence that is not the head",
    "a context that is stuck",
    "a turn that is stuck",
}


async def check_whole(truth: Witness, evidence: Evidence, *, at_rest: bool = True) -> None:
    """The database is sound, and if everything is at rest nothing in it is unfinished."""
    if truth.sqlite_path is not None:
        for pragma in ("integrity_check", "foreign_key_check"):
            found = await truth.rows(f"PRAGMA {pragma}")
            if found not in ([("ok",)], []):
                evidence.fault(f"PRAGMA {pragma}", found=found[:5])
    size = "length(CAST(content AS BLOB))" if truth.sqlite_path else "octet_length(content)"
    for what, sql in WHOLE.items():
        if at_rest or what in ALWAYS:
            ((count,),) = await truth.rows(sql.format(bytes=size, living=LIVING))
            if count:
                evidence.fault(what, rows=count)
