"""The short run of the producers: `python tests/fault --producers 500` is the long one (docs/faults.md)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from evidence import Evidence
from producer_ledger import Ledger, Record, read_ledger
from producer_plan import Author, MessagePlan, ProducerPlan, decoded, read_mark
from producer_run import ProducerRun
from producer_verdict import Limits, Written, check_produced
from witness import StoredMessage

AUTHOR = Author("seed", "m")
SILENCE_S = 3.0


async def test_producers_and_their_server_may_die_at_any_moment(tmp_path: Path) -> None:
    """Killed, cut off, frozen, overtaken, cancelled: stored is exactly what was written, up to a chunk."""
    done = await ProducerRun(seed="short", folder=tmp_path, stages=2, brief=True).run(12)
    assert done["faults"] >= 12
    assert done["chunks acknowledged"] > 0
    assert done["produced messages compared"] > 0
    assert done["contexts compared at the end"] >= 1


async def test_a_producer_that_repeats_what_has_no_number_is_found(tmp_path: Path) -> None:
    """The run can fail: what is stored twice ends it, with the seed."""
    run = ProducerRun(seed="seed 7", folder=tmp_path, stages=2, brief=True, planted="repeat")
    doubled = r"(?s)(another text|answered otherwise|head that moved|cannot be).*seed 7"
    with pytest.raises(AssertionError, match=doubled):
        await run.run(200)


# A message of three chunks in epoch 1, and three in epoch 2 after a take-over at head 3.
STORED = StoredMessage(
    key=1,
    id="m",
    turn_id=None,
    parent_id=None,
    depth=1,
    superseded=False,
    revision=1,
    role="assistant",
    kind="text",
    status="completed",
    final_sequence=6,
    head=6,
    chunks=tuple(AUTHOR.text(1 if place <= 3 else 2, place) for place in range(1, 7)),
)


def _first() -> Record:
    acked = dict.fromkeys(range(1, 4), 1)
    return Record(1, opened={1: 0}, sent={1: 5}, acked=3, acked_texts=acked, asked_at_ms=1000.0)


def _second() -> Record:
    acked = dict.fromkeys(range(4, 7), 2)
    return Record(
        2,
        opened={2: 3},
        sent={2: 6},
        acked=6,
        acked_texts=acked,
        endings={"completed"},
        closed=("completed", 6),
        asked_at_ms=2000.0,
    )


def _judge(
    stored: StoredMessage | None = STORED,
    records: list[Record] | None = None,
    *,
    chunks: int = 6,
    closed_at_ms: float = 9000.0,
    starts_ms: tuple[float, ...] = (0.0,),
) -> list[str]:
    evidence = Evidence("seed 7")
    records = [_first(), _second()] if records is None else records
    limits = Limits(SILENCE_S, starts_ms, cancelled=False)
    plan = MessagePlan("m", chunks)
    written = Written(plan, AUTHOR, records, records, limits, closed_at_ms)
    check_produced(evidence, written, stored)
    return evidence.faults


def _with_chunks(*chunks: str) -> StoredMessage:
    return replace(STORED, chunks=chunks, head=len(chunks), final_sequence=len(chunks))


def _interrupted(records: list[Record]) -> list[Record]:
    return [replace(record, closed=None, endings=set()) for record in records]


def test_what_was_written_is_no_fault() -> None:
    """A take-over at its head, and silence that was long enough, are not accused."""
    assert _judge() == []
    ended = replace(STORED, status="interrupted")
    records = _interrupted([_first(), _second()])
    assert _judge(ended, records, closed_at_ms=5000.0) == []


LIES: dict[str, Callable[[], list[str]]] = {
    "a lost message": lambda: _judge(None),
    "a lost chunk": lambda: _judge(_with_chunks(*STORED.chunks[:5])),
    "a chunk twice": lambda: _judge(_with_chunks(*STORED.chunks, STORED.chunks[5]), chunks=7),
    "two chunks exchanged": lambda: _judge(
        _with_chunks(*STORED.chunks[:4], STORED.chunks[5], STORED.chunks[4])
    ),
    "a character less": lambda: _judge(_with_chunks(*STORED.chunks[:5], STORED.chunks[5][:-1])),
    "the loser's chunk after the take-over": lambda: _judge(
        _with_chunks(*STORED.chunks[:3], AUTHOR.text(1, 4), *STORED.chunks[4:]),
        [_first(), replace(_second(), acked_texts={5: 2, 6: 2})],
    ),
    "the winner's chunk before it": lambda: _judge(
        _with_chunks(*STORED.chunks[:2], AUTHOR.text(2, 3), *STORED.chunks[3:]),
        [replace(_first(), acked_texts={1: 1, 2: 1}), _second()],
    ),
    "a chunk that nobody sent": lambda: _judge(
        _with_chunks(*STORED.chunks, AUTHOR.text(2, 7)), chunks=7
    ),
    "one epoch twice": lambda: _judge(records=[_first(), _second(), Record(opened={2: 3})]),
    "an end too early": lambda: _judge(chunks=7),
    "an end that nobody asked for": lambda: _judge(
        records=[_first(), replace(_second(), endings=set())]
    ),
    "another end": lambda: _judge(replace(STORED, status="failed")),
    "a cancel that nobody asked for": lambda: _judge(
        replace(STORED, status="cancelled"), _interrupted([_first(), _second()])
    ),
    "a silence that was too short": lambda: _judge(
        replace(STORED, status="interrupted"),
        _interrupted([_first(), _second()]),
        closed_at_ms=4900.0,
    ),
    "a silence across a restart": lambda: _judge(
        replace(STORED, status="interrupted"),
        _interrupted([_first(), _second()]),
        starts_ms=(0.0, 8000.0),
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_is_a_fault_that_names_the_seed(lie: Callable[[], list[str]]) -> None:
    """Whatever differs from what was written and told is accused."""
    faults = lie()
    assert faults
    assert all("seed 7" in fault for fault in faults)


def test_a_ledger_that_a_kill_has_torn_is_still_read(tmp_path: Path) -> None:
    """Only the last line can be torn, and who goes on writes behind it."""
    path = tmp_path / "ledger"
    Ledger(str(path)).note("intended", message="m", epoch=4)
    with path.open("a") as file:
        file.write('{"what": "inten')
    Ledger(str(path)).note("opened", message="m", epoch=5, head=2, asked_at_ms=1.0)
    record = read_ledger(path).record("m")
    assert (record.intended, record.opened) == (5, {5: 2})


def test_a_plan_and_a_text_are_the_same_in_every_process() -> None:
    """What a producer is given is what the verdict compares with."""
    plan = ProducerPlan("p", "c", "s", 1, "port", "ledger", (MessagePlan("m", 3, ("batch",)),))
    assert decoded(plan.encoded()) == plan
    text = Author("s", "m").text(7, 12)
    assert text == Author("s", "m").text(7, 12)
    assert read_mark(text) == (7, 12)
    assert read_mark("no mark") is None
