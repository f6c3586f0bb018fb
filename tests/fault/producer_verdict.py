"""Compares the stored text of produced messages with what their producers wrote and were told (§7).

The rules are about one moment of the database, and about what the ledgers held `before` and `after` it:
what was acknowledged before is stored, and what is stored was asked for after at the latest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evidence import Evidence
from producer_ledger import Account, Record
from producer_plan import UNFENCED, Author, MessagePlan, read_mark
from witness import StoredMessage, Witness

CLOCK_MS = 5  # the server's times are cut to milliseconds


@dataclass(frozen=True)
class Limits:
    """What the stage around a message allows. `starts_ms`: when servers were started."""

    silence_s: float
    starts_ms: Sequence[float]
    cancelled: bool  # somebody asked for a cancel of the context


@dataclass(frozen=True)
class Written:
    """One message, its producers' records, and when it was closed."""

    plan: MessagePlan
    author: Author
    before: Sequence[Record]
    after: Sequence[Record]
    limits: Limits
    closed_at_ms: float | None = None


def check_produced(evidence: Evidence, written: Written, stored: StoredMessage | None) -> None:
    """Faults for whatever of this message is lost, mixed, doubled, or ended without a reason."""
    if stored is None:
        if any(record.opened for record in written.before):
            evidence.fault("a produced message that is lost", message=written.plan.id)
        return
    evidence.counts["produced messages compared"] += 1
    marks = [read_mark(text) or (-1, -1) for text in stored.chunks]
    _check_texts(evidence, written, stored, marks)
    if written.plan.fenced:
        _check_take_overs(evidence, written, [epoch for epoch, _ in marks])
    _check_acked(evidence, written, stored, marks)
    _check_end(evidence, written, stored)


def _check_texts(
    evidence: Evidence, written: Written, stored: StoredMessage, marks: list[tuple[int, int]]
) -> None:
    """Each chunk is what a producer asked for, in this very place."""
    sent: dict[int, int] = {}
    for record in written.after:
        for epoch, sequence in record.sent.items():
            sent[epoch] = max(sequence, sent.get(epoch, 0))
    for place, (text, (epoch, sequence)) in enumerate(zip(stored.chunks, marks, strict=True), 1):
        facts = {"message": stored.id, "place": place, "mark": (epoch, sequence)}
        if sequence != place or text != written.author.text(epoch, place):
            evidence.fault("a chunk with another text", **facts)
        elif place > sent.get(epoch, 0):
            evidence.fault("a chunk that nobody wrote", **facts)
        elif written.plan.fenced != (epoch != UNFENCED):
            evidence.fault("a chunk of no epoch", **facts)
    evidence.counts["chunks compared"] += len(marks)


def _check_take_overs(evidence: Evidence, written: Written, epochs: list[int]) -> None:
    """An epoch begins right after the head that its take-over told, and there the others end."""
    begun: dict[int, int] = {}
    for record in written.after:
        for epoch, head in record.opened.items():
            if epoch in begun:
                evidence.fault("one epoch of two producers", message=written.plan.id, epoch=epoch)
            begun[epoch] = head
    for epoch, head in begun.items():
        early = [place for place, own in enumerate(epochs, 1) if own >= epoch and place <= head]
        late = [place for place, own in enumerate(epochs, 1) if own < epoch and place > head]
        if early or late:
            evidence.fault(
                "a text that is mixed",
                message=written.plan.id,
                epoch=epoch,
                head=head,
                early=early[:5],
                late=late[:5],
            )
    heads = [head for _, head in sorted(begun.items())]
    if any(later < earlier for earlier, later in pairwise(heads)):
        evidence.fault("a head that went back", message=written.plan.id, heads=heads)
    evidence.counts["take-overs compared"] += max(0, len(begun) - 1)


def _check_acked(
    evidence: Evidence, written: Written, stored: StoredMessage, marks: list[tuple[int, int]]
) -> None:
    for record in written.before:
        lost = [
            sequence
            for sequence, epoch in record.acked_texts.items()
            if sequence > len(marks) or marks[sequence - 1][0] != epoch
        ]
        if lost:
            evidence.fault(
                "acknowledged chunks that are lost", message=stored.id, sequences=lost[:5]
            )
        opened = max(record.opened.values(), default=0)
        if opened > stored.head:
            evidence.fault("a head that was told and is lost", message=stored.id, told=opened)


def _check_end(evidence: Evidence, written: Written, stored: StoredMessage) -> None:
    facts = {"message": stored.id, "status": stored.status, "head": stored.head}
    for record in written.before:
        if record.closed not in (None, (stored.status, stored.final_sequence)):
            evidence.fault("another end than was told", told=record.closed, **facts)
    match stored.status:
        case "completed" | "failed":
            asked = any(stored.status in record.endings for record in written.after)
            if not asked or stored.head != written.plan.chunks:
                evidence.fault("an end that nobody asked for", **facts)
        case "cancelled":
            if not written.limits.cancelled:
                evidence.fault("a cancel that nobody asked for", **facts)
        case "interrupted":
            _check_silence(evidence, written, facts)


def _check_silence(evidence: Evidence, written: Written, facts: Mapping[str, object]) -> None:
    """Counted from the last write or the server's start, whichever is later."""
    closed_at_ms = written.closed_at_ms
    assert closed_at_ms is not None
    signs = [record.asked_at_ms for record in written.before]
    signs += [start for start in written.limits.starts_ms if start <= closed_at_ms]
    silent_s = (closed_at_ms - max(signs) + CLOCK_MS) / 1000
    if silent_s < written.limits.silence_s:
        evidence.fault("a producer that was not silent for long enough", silent_s=silent_s, **facts)


def records_of(accounts: Iterable[Account], message_id: str) -> list[Record]:
    """What the producers know of one message."""
    found = (account.messages.get(message_id) for account in accounts)
    return [record for record in found if record is not None]


# Of a deleted context rows may be left that are still to be purged: so all of them ask for `contexts`.
PRODUCING = {
    "a context that is producing nothing": """
        SELECT count(*) FROM contexts c WHERE c.state = 'producing' AND NOT EXISTS
        (SELECT 1 FROM messages m JOIN heads h ON h.message_key = m.key
         WHERE m.context_key = c.key AND m.status = 'streaming' AND h.producer_id IS NOT NULL)""",
    "an open produced message of a context that is not producing": """
        SELECT count(*) FROM contexts c JOIN messages m ON m.context_key = c.key
        JOIN heads h ON h.message_key = m.key
        WHERE m.status = 'streaming' AND h.producer_id IS NOT NULL AND c.state <> 'producing'""",
    "a turn that runs beside a produced message": """
        SELECT count(*) FROM contexts c JOIN turns t ON t.context_key = c.key
        WHERE t.status = 'running' AND c.state = 'producing'""",
    "a queue that nobody has started": """
        SELECT count(*) FROM contexts c JOIN turns t ON t.context_key = c.key
        WHERE t.status = 'queued' AND c.state IN ('idle', 'failed')""",
    "a journal that does not end at the state": """
        SELECT count(*) FROM contexts c JOIN journal j ON j.context_key = c.key
        WHERE j.to_state <> c.state AND j.revision =
        (SELECT max(k.revision) FROM journal k WHERE k.context_key = c.key)""",
    "a head that is closed though its message is open": """
        SELECT count(*) FROM contexts c JOIN messages m ON m.context_key = c.key
        JOIN heads h ON h.message_key = m.key
        WHERE m.status = 'streaming' AND NOT h.is_open""",
}


async def check_producing(truth: Witness, evidence: Evidence) -> None:
    """State, journal, queue and open messages agree; the counts of closed messages are those of heads."""
    for what, sql in PRODUCING.items():
        ((count,),) = await truth.rows(sql)
        if count:
            evidence.fault(what, rows=count)
    closed = await truth.rows(
        """SELECT m.id, m.stats, h.head, h.characters, h.bytes FROM contexts c
           JOIN messages m ON m.context_key = c.key JOIN heads h ON h.message_key = m.key
           WHERE m.status <> 'streaming'"""
    )
    for message_id, stats, *counted in closed:
        told = json.loads(stats)
        if [told["chunks"], told["characters"], told["bytes"]] != counted:
            evidence.fault("stats that do not fit", message=message_id, stats=told, heads=counted)
