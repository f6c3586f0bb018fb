"""The short run of the tools: `python tests/fault --tools 200` is the long one (docs/faults.md)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conversation import Sent
from evidence import Evidence
from tool_book import Book
from tool_calls_verdict import CallCheck
from tool_conversation import ToolConversation
from tool_ledger import Decision, Ledger, Posted, Seen
from tool_rows import StoredCall
from tool_run import ToolRun
from tool_script import AskedCall, Round, ToolScript
from tool_verdict import check_answers
from witness import Step, StoredTurn


async def test_no_kill_makes_a_tool_run_twice_or_a_decision_be_lost(tmp_path: Path) -> None:
    """After SIGKILL: each call ran as often as it may, as it was decided, and has its one result."""
    done = await ToolRun(seed="short", folder=tmp_path, crowds=2, brief=True).run(3)
    assert done["kills"] >= 3
    assert done["executions"] > 0
    assert done["conversations compared at the end"] >= 2


# A guarded call that a person approved with other arguments, and that ran then, once.
ASKED = AskedCall("guarded", "c1.1-1", {"mark": "c1.1-1", "book": "b", "say": "a", "ms": 5})
EDITED = {**ASKED.arguments, "say": "edited"}
STORED = StoredCall(
    key=1,
    id="call",
    turn_id="turn",
    round=1,
    name="guarded",
    arguments=EDITED,
    status="succeeded",
    requires_approval=True,
    external=False,
    collected=True,
    error=None,
    created_at=1000,
    decided_at=2000,
    started_at=2010,
    message_id="asked",
    result_message_id="result",
)
BEGAN = {
    "what": "began",
    "id": "x",
    "mark": "c1.1-1",
    "at_ms": 2020.0,
    "arguments": {"mark": "c1.1-1", "say": "edited", "ms": 5},
}
ENDED = {"what": "ended", "id": "x", "gave": "done"}
RECOVERED = Step(7, "turn", "recover", "executing_tools", "executing_tools")


def _judge(
    folder: Path,
    call: StoredCall = STORED,
    *,
    lines: tuple[dict[str, Any], ...] = (BEGAN, ENDED),
    text: str = "done",
    journal: tuple[Step, ...] = (),
    decided: bool = True,
) -> list[str]:
    evidence = Evidence("seed 7")
    conversation = ToolConversation("c1", Random(1), evidence, 1, 1.0, book="b")
    script = ToolScript("", (), rounds=(Round((), (ASKED,)), Round((), ())))
    conversation.sent["c1.1"] = Sent("c1.1", script, "enqueue", respond=True)
    if decided:
        conversation.ledger.ask((Decision("call", "approve", arguments=EDITED),))
    book = Book(folder / "book")
    book.path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    check = CallCheck(
        conversation,
        book=book,
        workspace=folder,
        texts={"result": text},
        turns=[StoredTurn(1, "turn", 1, "completed", 1, None, None)],
        journal=[*journal],
    )
    check.check([call], {"turn": "c1.1"})
    return evidence.faults


def test_a_call_that_went_as_it_may_is_no_fault(tmp_path: Path) -> None:
    """Executed once as decided; or interrupted by a crash, which the model was told."""
    assert _judge(tmp_path) == []
    unknown = replace(STORED, status="failed", error="outcome_unknown")
    assert _judge(tmp_path, unknown, lines=(BEGAN,), journal=(RECOVERED,), text="unknown") == []
    assert _judge(tmp_path, unknown, lines=(), journal=(RECOVERED,), text="unknown") == []


TWICE = (BEGAN, ENDED, {**BEGAN, "id": "y"})
LIES: dict[str, Callable[[Path], list[str]]] = {
    "executed twice": lambda at: _judge(at, lines=TWICE, journal=(RECOVERED,)),
    "executed with the model's arguments": lambda at: _judge(
        at, lines=({**BEGAN, "arguments": {"mark": "c1.1-1", "say": "a", "ms": 5}}, ENDED)
    ),
    "executed before it was decided": lambda at: _judge(
        at, lines=({**BEGAN, "at_ms": 1900.0}, ENDED)
    ),
    "executed though denied": lambda at: _judge(
        at, replace(STORED, status="denied", error="denied"), text="A person denied this call."
    ),
    "executed though blocked": lambda at: _judge(
        at, replace(STORED, status="failed", error="plan_mode")
    ),
    "executed and not marked as running": lambda at: _judge(at, replace(STORED, started_at=None)),
    "a success without an end": lambda at: _judge(at, lines=(BEGAN,)),
    "a success without an execution": lambda at: _judge(at, lines=()),
    "another result": lambda at: _judge(at, text="don"),
    "no result": lambda at: _judge(at, replace(STORED, result_message_id=None)),
    "an unknown outcome without a crash": lambda at: _judge(
        at, replace(STORED, status="failed", error="outcome_unknown")
    ),
    "no end": lambda at: _judge(at, replace(STORED, status="running")),
    "cancelled in a turn that completed": lambda at: _judge(
        at, replace(STORED, status="cancelled", result_message_id=None)
    ),
    "nobody decided it": lambda at: _judge(at, decided=False),
    "nobody was asked": lambda at: _judge(
        at, replace(STORED, requires_approval=False, decided_at=None)
    ),
    "a limit that was not reached": lambda at: _judge(
        at, replace(STORED, status="failed", error="tool_limit"), lines=()
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_about_a_call_is_a_fault(tmp_path: Path, lie: Callable[[Path], list[str]]) -> None:
    """Whatever differs from what was decided and executed is accused, and names the seed."""
    faults = lie(tmp_path)
    assert faults
    assert all("seed 7" in fault for fault in faults)


ANSWERED = replace(STORED, id="asked", external=True, started_at=None)


def _compare(*calls: StoredCall, text: str = "42") -> list[str]:
    evidence = Evidence("seed 7")
    told = Ledger(evidence)
    told.take(told.ask((Decision("call", "approve", arguments=EDITED),)))
    told.take(told.ask((Posted("asked", "42", is_error=False),)))
    told.seen["call"] = Seen("running", None)
    check_answers(evidence, told, calls, {"result": text})
    return evidence.faults


def test_what_was_answered_and_is_stored_is_no_fault() -> None:
    """A call may have gone on since it was seen."""
    assert _compare(STORED, ANSWERED) == []


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ((ANSWERED,), "42"),
        ((replace(STORED, status="pending", decided_at=None), ANSWERED), "42"),
        ((replace(STORED, status="denied"), ANSWERED), "42"),
        ((replace(STORED, arguments=ASKED.arguments), ANSWERED), "42"),
        ((replace(STORED, status="approved"), ANSWERED), "42"),
        ((STORED, replace(ANSWERED, status="approved", result_message_id=None)), "42"),
        ((STORED, replace(ANSWERED, status="failed")), "42"),
        ((STORED, ANSWERED), "43"),
    ],
)
def test_an_answer_that_is_lost_or_changed_is_a_fault(
    calls: tuple[StoredCall, ...], text: str
) -> None:
    """What people were answered must be in the database after any crash."""
    assert _compare(*calls, text=text)


def test_two_answers_that_contradict_each_other_are_a_fault() -> None:
    """A call cannot have been both approved and denied, nor have two results."""
    evidence = Evidence("seed 7")
    told = Ledger(evidence)
    told.take(told.ask((Decision("call", "approve"),)))
    told.take(told.ask((Decision("call", "approve"),)))
    told.take(told.ask((Posted("asked", "42", is_error=False),)))
    assert evidence.faults == []
    told.take(told.ask((Decision("call", "deny"),)))
    told.take(told.ask((Posted("asked", "42", is_error=True),)))
    assert len(evidence.faults) == 2


def test_a_book_is_read_in_whole_lines(tmp_path: Path) -> None:
    """A line that is being written counts when it is whole."""
    book = Book(tmp_path / "book")
    line = json.dumps(BEGAN)
    book.path.write_text(line)
    assert book.executions("c1.1-1") == []
    book.path.write_text(f"{line}\n{json.dumps(ENDED)}\n")
    (execution,) = book.executions("c1.1-1")
    assert execution.gave == "done"
