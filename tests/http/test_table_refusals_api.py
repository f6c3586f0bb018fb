"""§5 at the wire: what may be asked of a context in each state, and what is refused there.

Each operation is tried in each state. A refusal says why, with all its facts, and changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
from protocol_table import STATES, TRANSITIONS, TURN_STATES
from standing import Stage, Stand
from tooling import call, verdict
from wire import Json, ok, problem, script

BUSY = (*TURN_STATES, "producing")
WITH_CALLS = (
    "processing_llm_response", "awaiting_tool_approval", "executing_tools",
    "awaiting_tool_results", "processing_tool_results",
)  # fmt: skip
# A turn before, whose call has ended.
BEFORE = script({"text": "first "}, call("nothing"))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`do` asks for it. Where it is not `taken` it is 409 with `code`, which may depend on the state."""

    name: str
    do: Callable[[Stand], httpx.Response]
    taken: tuple[str, ...]
    code: Callable[[str], str]
    trigger: str = ""


def open_call(stand: Stand) -> str:
    """The call that somebody outside could decide or answer first; else the newest there is."""
    calls = stand.api.calls(stand.context_id)
    wanted = [one for one in calls if one["name"] == "ask" and one["status"] == "approved"]
    return str((wanted or calls)[-1]["id"])


def decided_call(stand: Stand) -> str:
    """A call that waits for no decision."""
    calls = stand.api.calls(stand.context_id)
    return str([one for one in calls if one["status"] != "pending"][-1]["id"])


def pending_call(stand: Stand) -> str:
    pending = stand.context()["pending_tool_calls"]
    return str(pending[0]) if pending else decided_call(stand)


def send(stand: Stand) -> httpx.Response:
    return stand.api.post_message(stand.context_id, "x", on_busy="reject")


def retry(stand: Stand) -> httpx.Response:
    return stand.api.http.post(f"{stand.path}/retry")


def produce(stand: Stand) -> httpx.Response:
    return stand.api.http.put(f"{stand.path}/messages/new", json={"producer": {"id": "p"}})


def decide(stand: Stand, decision: str = "approve") -> httpx.Response:
    return stand.api.post_decisions(stand.context_id, verdict(pending_call(stand), decision))


def deny_decided(stand: Stand) -> httpx.Response:
    return stand.api.post_decisions(stand.context_id, verdict(decided_call(stand), "deny"))


def post_result(stand: Stand) -> httpx.Response:
    return stand.api.post_result(stand.context_id, open_call(stand), content="late")


OPERATIONS = [
    Operation(
        name="send", do=send, taken=("idle", "failed"), code=lambda _: "context_busy",
    ),
    Operation(
        name="retry", do=retry, taken=("failed",), code=lambda _: "illegal_transition",
        trigger="retry",
    ),
    Operation(
        name="produce", do=produce, taken=("idle", "failed", "producing"),
        code=lambda _: "context_busy",
    ),
    Operation(
        name="decide", do=decide, taken=("processing_llm_response", "awaiting_tool_approval"),
        code=lambda _: "tool_call_decided",
    ),
    Operation(
        name="decide_otherwise", do=deny_decided, taken=(), code=lambda _: "tool_call_decided",
    ),
    Operation(
        name="result", do=post_result, taken=("executing_tools", "awaiting_tool_results"),
        code=lambda state: (
            "illegal_transition"
            if state in ("processing_llm_response", "awaiting_tool_approval")
            else "tool_call_decided"
        ),
        trigger="collect_results",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def stood(stage: Stage) -> Callable[[str], Stand]:
    """A context for each state, for what is refused there: it stays as it is."""
    stands: dict[str, Stand] = {}

    def stand(state: str) -> Stand:
        if state not in stands:
            stands[state] = stage.stand(state, BEFORE)
        return stands[state]

    return stand


def check_facts(refused: Json, state: str, operation: Operation) -> None:
    """The facts of §1: enough to tell the caller's user what is going on."""
    if refused["code"] == "tool_call_decided":
        assert isinstance(refused["tool_call_id"], str)
        return
    assert refused["state"] == state
    if refused["code"] == "illegal_transition":
        assert refused["trigger"] == operation.trigger
        allowed = {trigger for trigger, source, _ in TRANSITIONS if source == state}
        assert sorted(refused["allowed"]) == sorted(allowed)


# What is refused


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_each_operation_in_each_state(
    stage: Stage, stood: Callable[[str], Stand], operation: Operation, state: str
) -> None:
    """Taken where the contract says so; elsewhere 409 with its facts, and nothing has changed."""
    if state in operation.taken:
        stand = stage.stand(state)
        assert operation.do(stand).status_code in (201, 202)
        stand.api.cancel(stand.context_id)
        return
    stand = stood(state)
    before = stand.held()
    refused = problem(operation.do(stand), 409, operation.code(state))
    check_facts(refused, state, operation)
    assert stand.held() == before


@pytest.mark.parametrize("state", sorted(STATES))
def test_can_send_tells_of_a_refusal_before_it(stood: Callable[[str], Stand], state: str) -> None:
    """§2: whether a send now would get 409, which depends on `on_busy` of the context."""
    stand = stood(state)
    assert stand.context()["can_send"] is True
    patched = ok(stand.api.http.patch(stand.path, json={"on_busy": "reject"}))
    assert patched["can_send"] is (state in ("idle", "failed"))
    if not patched["can_send"]:
        refused = problem(stand.api.post_message(stand.context_id, "x"), 409, "context_busy")
        assert refused["state"] == state
    ok(stand.api.http.patch(stand.path, json={"on_busy": "enqueue"}))


@pytest.mark.parametrize("state", sorted(STATES))
def test_a_cancel_of_another_turn_changes_nothing(
    stood: Callable[[str], Stand], state: str
) -> None:
    """200 with null: a click that comes late hits nobody; and so where nothing runs (§6)."""
    stand = stood(state)
    before = stand.held()
    old = next(entry["turn_id"] for entry in stand.journal() if entry["turn_id"])
    nothing = {"state": state, "cancelled_turn_id": None}
    assert stand.api.cancel(stand.context_id, turn_id=old) == nothing
    assert ok(stand.api.http.post(f"{stand.path}/turns/{old}/cancel")) == nothing
    if state in ("idle", "failed"):
        assert stand.api.cancel(stand.context_id) == nothing
    assert stand.held() == before


# What is taken in every state


@pytest.mark.parametrize("state", sorted(BUSY))
def test_a_send_queues_in_every_busy_state(stage: Stage, state: str) -> None:
    """The turn is not touched: no step, one revision; the queue goes on when it is cancelled."""
    stand = stage.stand(state)
    before, journal = stand.context(), stand.journal()
    answer = stand.api.send(stand.context_id, "next", on_busy="enqueue")
    assert (answer["state"], answer["queued"]) == (state, True)
    assert answer["revision"] == before["revision"] + 1
    assert stand.context()["queued_messages"] == 1
    assert stand.journal() == journal
    stand.api.cancel(stand.context_id)
    stand.go_on()
    assert stand.api.ended(stand.context_id, answer["turn_id"])["status"] == "completed"
    cancel, start = stand.journal()[len(journal) :][:2]
    assert (cancel["trigger"], start["trigger"]) == ("cancel", "receive_message")
    assert start["revision"] == cancel["revision"] + 1


@pytest.mark.parametrize("state", sorted(BUSY))
def test_a_send_interrupts_every_busy_state(stage: Stage, state: str) -> None:
    """What runs is cancelled and this one started, in one transaction: two steps in a row (§3.1)."""
    stand = stage.stand(state)
    stand.go_on(state, "processing_user_message")
    journal = stand.journal()
    answer = stand.api.send(stand.context_id, "now", on_busy="interrupt")
    assert (answer["state"], answer["queued"]) == ("processing_user_message", False)
    steps = stand.journal()[len(journal) :]
    assert [(step["trigger"], step["from_state"]) for step in steps] == [
        ("cancel", state), ("receive_message", "idle"),
    ]  # fmt: skip
    assert steps[1]["revision"] == answer["revision"] == steps[0]["revision"] + 1
    if stand.turn_id is not None:
        assert stand.api.turn(stand.context_id, stand.turn_id)["status"] == "cancelled"
    assert stand.api.turn(stand.context_id, answer["turn_id"])["status"] == "running"
    stand.api.cancel(stand.context_id)


@pytest.mark.parametrize("state", sorted(STATES))
def test_a_message_without_a_turn_is_taken_in_every_state(
    stood: Callable[[str], Stand], state: str
) -> None:
    """`respond: false` stores the message, makes no step and starts nothing (§3.1)."""
    stand = stood(state)
    journal = stand.journal()
    answer = stand.api.send(stand.context_id, "a note", respond=False)
    assert (answer["state"], answer["turn_id"]) == (state, None)
    assert stand.journal() == journal
    assert stand.context()["state"] == state


@pytest.mark.parametrize("state", sorted(STATES))
def test_a_delete_is_taken_in_every_state(stage: Stage, state: str) -> None:
    """All is gone at once, and the step that was on its way finds nothing (§2)."""
    stand = stage.stand(state)
    assert stand.api.http.delete(stand.path).status_code == 204
    for operation in (send, retry, produce):
        gone = problem(operation(stand), 404, "context_not_found")
        assert gone["context_id"] == stand.context_id
    for path in ("", "/turns", "/tool-calls", "/transitions", "/messages"):
        problem(stand.api.http.get(stand.path + path), 404, "context_not_found")
    stand.place.open()


# After a cancel


@pytest.mark.parametrize("state", WITH_CALLS)
def test_what_comes_after_a_cancel_changes_nothing(stage: Stage, state: str) -> None:
    """Late results, late decisions, a tool that ends, a step that was on its way: all for nothing."""
    stand = stage.stand(state)
    stand.api.cancel(stand.context_id)
    settled = stand.held()
    for one in stand.calls():
        if one["status"] == "cancelled":
            late = stand.api.post_result(stand.context_id, one["id"], content="late")
            assert problem(late, 409, "tool_call_decided")["tool_call_id"] == one["id"]
            denied = stand.api.post_decisions(stand.context_id, verdict(one["id"], "deny"))
            assert problem(denied, 409, "tool_call_decided")["tool_call_id"] == one["id"]
    stand.place.open()
    stand.go_on()
    assert stand.held() == settled
    assert stand.api.run(stand.context_id, "on")[1]["status"] == "completed"
    _, journal, calls, messages = stand.held()
    assert journal[: len(settled[1])] == settled[1]
    assert calls == settled[2]
    assert messages[: len(settled[3])] == settled[3]
