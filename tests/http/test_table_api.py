"""§5 at the wire: every row of the table is walked, and what its state promises is seen by GET."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from protocol_table import STATES, TRANSITIONS, TURN_STATES
from standing import DONE, SAID, Stage, Stand, sign
from tooling import call
from wire import Json, ok, script

Row = tuple[str, str, str]
Way = Callable[["Stages"], Stand]

ENDS = {"finish": "completed", "cancel": "cancelled", "fail": "failed"}
ENDED_CALLS = {"denied", "succeeded", "failed", "timed_out", "cancelled"}
OPEN_CALLS = {
    "processing_llm_response": {"pending", "approved"},
    "awaiting_tool_approval": {"pending", "approved"},
    "executing_tools": {"approved", "running"},
    "awaiting_tool_results": {"approved"},
}
# How the calls of a turn end that is ended in this state: what has ended stays as it did.
CALLS_AFTER = {
    "processing_llm_response": ["cancelled", "cancelled", "cancelled"],
    "awaiting_tool_approval": ["cancelled", "cancelled", "cancelled"],
    "executing_tools": ["succeeded", "cancelled", "cancelled"],
    "awaiting_tool_results": ["succeeded", "cancelled"],
    "processing_tool_results": ["succeeded"],
}
# Before these a turn has said nothing, or what it said was of an attempt that broke.
SILENT = ("processing_user_message", "awaiting_llm_response", "transient_failure")
RECOVERED = {
    "awaiting_llm_response": "transient_failure",
    "streaming_llm_response": "transient_failure",
    **{
        state: state
        for state in (
            "processing_user_message", "processing_llm_response", "processing_tool_results",
            "executing_tools", "transient_failure",
        )
    },
}  # fmt: skip


class Stages:
    """The servers of these tests; each is started when a row needs it."""

    def __init__(self, make_folder: Callable[[], Any]) -> None:
        self._make_folder = make_folder
        self._stages: dict[str, Stage] = {}
        self._stood: dict[str, dict[str, Stand]] = {}

    @property
    def patient(self) -> Stage:
        """With all the time that there is by default."""
        return self._stage("patient")

    def overdue(self, state: str) -> Stand:
        """A context that has stood in `state` for longer than a turn may, on a server in a hurry."""
        if "overdue" not in self._stood:
            stage = self._stage("overdue", turn_timeout_s=3, waiting_timeout_s=3, lease_s=1)
            self._stood["overdue"] = {state: stage.stand(state) for state in TURN_STATES}
        stand = self._stood["overdue"][state]
        stand.api.in_state(stand.context_id, "failed")
        return stand

    def recovered(self, state: str) -> Stand:
        """A context that stood in `state` when its server was killed, now with the next server."""
        if "recovered" not in self._stood:
            stage = self._stage("recovered")
            stood = {state: stage.stand(state) for state in RECOVERED}
            stage.crash()
            for stand in stood.values():
                stand.go_on(RECOVERED[stand.state])
            stage.restart()
            self._stood["recovered"] = stood
        stand = self._stood["recovered"][state]
        stand.api.in_state(stand.context_id, RECOVERED[state])
        return stand

    def close(self) -> None:
        for stage in self._stages.values():
            stage.close()

    def _stage(self, name: str, **settings: Any) -> Stage:
        if name not in self._stages:
            self._stages[name] = Stage(self._make_folder(), **settings)
        return self._stages[name]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    stages = Stages(lambda: tmp_path_factory.mktemp("stage"))
    yield stages
    stages.close()


# The ways


def stands_in(state: str) -> Way:
    """The first way into a state, on which the steps to it come by."""
    return lambda stages: stages.patient.stand(state)


def sends(text: str, state: str, **body: Any) -> Way:
    """A turn of its own, which is held in `state`."""
    return lambda stages: stages.patient.send(text, state, **body)


def goes_on(state: str, next_state: str, act: Callable[[Stand], object] = lambda _: None) -> Way:
    """From `state`, by what `act` does, to `next_state`, and no further."""

    def way(stages: Stages) -> Stand:
        stand = stages.patient.stand(state)
        stand.go_on(next_state)
        answer = act(stand)
        stand.api.in_state(stand.context_id, next_state)
        return replace(stand, turn_id=answer) if isinstance(answer, str) else stand

    return way


def cancels(state: str) -> Way:
    def way(stages: Stages) -> Stand:
        stand = stages.patient.stand(state)
        cancelled = None if state == "producing" else stand.turn_id
        answer = stand.api.cancel(stand.context_id)
        assert answer == {"state": "idle", "cancelled_turn_id": cancelled}
        return stand

    return way


def denies_all(stages: Stages) -> Stand:
    stage = stages.patient
    stand = stage.send(script(sign(), DONE), "awaiting_tool_approval")
    stand.go_on("processing_tool_results")
    answer = stage.api.decide_all(stand.context_id, "deny")
    assert answer == {"state": "processing_tool_results"}
    return stand


def is_over_the_limit(stages: Stages) -> Stand:
    """The turn ends with its results."""
    stage = stages.patient
    policy = {"mode": "auto", "allow": [], "max_depth": 5, "max_calls": 1}
    stand = stage.send(
        script(call("echo", text="1"), call("echo", text="2"), DONE),
        "processing_llm_response", approval_policy=policy,
    )  # fmt: skip
    stand.go_on()
    stage.api.in_state(stand.context_id, "idle")
    return stand


def sends_again(stand: Stand) -> str:
    return str(stand.api.send(stand.context_id, "again")["turn_id"])


def retries(stand: Stand) -> str:
    answer = ok(stand.api.http.post(f"{stand.path}/retry"), 202)
    assert answer["state"] == "awaiting_llm_response"
    assert stand.api.turn(stand.context_id, answer["turn_id"])["retry_of"] == stand.turn_id
    return str(answer["turn_id"])


def approves(stand: Stand) -> None:
    answer = stand.api.decide_all(stand.context_id, "approve")
    assert answer == {"state": "executing_tools"}


def answers(stand: Stand) -> None:
    (asked,) = [one for one in stand.calls() if one["name"] == "ask"]
    answer = stand.api.answer(stand.context_id, asked["id"])
    assert answer == {"state": "processing_tool_results"}


def opens(stand: Stand) -> None:
    ok(stand.api.http.put(f"{stand.path}/messages/other", json={"producer": {"id": "p"}}), 201)


def completes(stand: Stand) -> None:
    ok(stand.api.http.post(f"{stand.path}/messages/produced/complete", json={}))


WAYS: dict[Row, Way] = {
    ("receive_message", "idle", "processing_user_message"): stands_in("processing_user_message"),
    ("receive_message", "failed", "processing_user_message"): goes_on(
        "failed", "processing_user_message", sends_again
    ),
    ("request_llm", "processing_user_message", "awaiting_llm_response"): stands_in(
        "awaiting_llm_response"
    ),
    ("request_llm", "processing_tool_results", "awaiting_llm_response"): goes_on(
        "processing_tool_results", "awaiting_llm_response"
    ),
    ("request_llm", "transient_failure", "awaiting_llm_response"): goes_on(
        "transient_failure", "awaiting_llm_response"
    ),
    ("first_chunk", "awaiting_llm_response", "streaming_llm_response"): stands_in(
        "streaming_llm_response"
    ),
    ("end_stream", "awaiting_llm_response", "processing_llm_response"): sends(
        script({"usage": {"prompt_tokens": 1, "completion_tokens": 0}}), "processing_llm_response"
    ),
    ("end_stream", "streaming_llm_response", "processing_llm_response"): stands_in(
        "processing_llm_response"
    ),
    ("require_approval", "processing_llm_response", "awaiting_tool_approval"): stands_in(
        "awaiting_tool_approval"
    ),
    ("execute_tools", "processing_llm_response", "executing_tools"): stands_in("executing_tools"),
    ("execute_tools", "awaiting_tool_approval", "executing_tools"): goes_on(
        "awaiting_tool_approval", "executing_tools", approves
    ),
    ("await_results", "executing_tools", "awaiting_tool_results"): stands_in(
        "awaiting_tool_results"
    ),
    ("collect_results", "processing_llm_response", "processing_tool_results"): sends(
        script(call("nothing"), DONE), "processing_tool_results"
    ),
    ("collect_results", "awaiting_tool_approval", "processing_tool_results"): denies_all,
    ("collect_results", "executing_tools", "processing_tool_results"): stands_in(
        "processing_tool_results"
    ),
    ("collect_results", "awaiting_tool_results", "processing_tool_results"): goes_on(
        "awaiting_tool_results", "processing_tool_results", answers
    ),
    ("finish", "processing_llm_response", "idle"): stands_in("idle"),
    ("finish", "processing_tool_results", "idle"): is_over_the_limit,
    ("fail_transiently", "awaiting_llm_response", "transient_failure"): sends(
        script({"error": "transient", "times": 1}, DONE), "transient_failure"
    ),
    ("fail_transiently", "streaming_llm_response", "transient_failure"): stands_in(
        "transient_failure"
    ),
    ("retry", "failed", "awaiting_llm_response"): goes_on(
        "failed", "awaiting_llm_response", retries
    ),
    ("open_message", "idle", "producing"): stands_in("producing"),
    ("open_message", "failed", "producing"): goes_on("failed", "producing", opens),
    ("open_message", "producing", "producing"): goes_on("producing", "producing", opens),
    ("close_message", "producing", "idle"): goes_on("producing", "idle", completes),
    **{("cancel", state, "idle"): cancels(state) for state in (*TURN_STATES, "producing")},
    **{
        ("fail", state, "failed"): lambda stages, state=state: stages.overdue(state)
        for state in TURN_STATES
    },
    **{
        ("recover", state, target): lambda stages, state=state: stages.recovered(state)
        for state, target in RECOVERED.items()
    },
}


# What holds in each state


def check(stand: Stand, state: str) -> None:
    """What GET shows of a context in `state`, whichever way it came there."""
    context = stand.context()
    assert context["state"] == state
    streaming = state in ("streaming_llm_response", "producing")
    assert bool(context["open_messages"]) == streaming
    assert all(message["current_sequence"] >= 0 for message in context["open_messages"])
    pending = [one["id"] for one in stand.calls() if one["status"] == "pending"]
    assert context["pending_tool_calls"] == pending
    assert bool(pending) or state != "awaiting_tool_approval"
    check_detail(context)
    check_calls(stand, state)
    if stand.turn_id is not None and state != "producing":
        check_turn(stand, state)


def check_detail(context: Json) -> None:
    """`state_detail` holds what the state needs said, and nothing of a state before (§2)."""
    detail = context["state_detail"]
    if context["state"] == "failed":
        assert set(detail["error"]) == {"type", "message"}
    elif context["state"] == "transient_failure":
        assert detail["attempt"] == 1
        assert detail["wait_ms"] >= 0
        assert set(detail["error"]) == {"type", "message"}
    else:
        assert detail == {}


def check_calls(stand: Stand, state: str) -> None:
    """What has ended has a closed result; what has not is of a state where it can go on."""
    for one in stand.calls():
        assert one["status"] in ENDED_CALLS | OPEN_CALLS.get(state, set()), (state, one)
        assert stand.api.message(stand.context_id, one["message_id"])["status"] == "completed"
        has_result = one["status"] in ENDED_CALLS - {"cancelled"}
        assert (one["result_message_id"] is not None) == has_result
        if has_result:
            result = stand.api.message(stand.context_id, one["result_message_id"])
            assert (result["status"], result["kind"]) == ("completed", "tool_result")
        if state == "awaiting_tool_results" and one["status"] == "approved":
            assert one["name"] == "ask"


def check_turn(stand: Stand, state: str) -> None:
    """It runs, or has exactly one end, which its last message has too."""
    assert stand.turn_id is not None
    turn = stand.api.turn(stand.context_id, stand.turn_id)
    ends = [
        ENDS[entry["trigger"]]
        for entry in stand.journal()
        if entry["turn_id"] == stand.turn_id and entry["trigger"] in ENDS
    ]
    replies = stand.api.replies(stand.context_id, stand.turn_id)
    if state in TURN_STATES:
        assert (turn["status"], turn["ended_at"], turn["error"], ends) == (
            "running", None, None, [],
        )  # fmt: skip
    else:
        assert ends == [turn["status"]]
        assert (turn["error"] is not None) == (turn["status"] == "failed")
        assert any(message["role"] == "assistant" for message in replies)
    if state == "transient_failure":
        assert {message["status"] for message in replies} <= {"interrupted"}
    for message in replies:
        opened = message["status"] == "streaming"
        assert (message["final_sequence"] is None) == opened
        assert not opened or state == "streaming_llm_response"


def check_journal(journal: list[Json]) -> None:
    """Every entry is a row of the table, and begins where the one before ended."""
    state, revision = "idle", 0
    for entry in journal:
        row = (entry["trigger"], entry["from_state"], entry["to_state"])
        assert row in TRANSITIONS
        assert entry["from_state"] == state
        assert entry["revision"] > revision
        state, revision = entry["to_state"], entry["revision"]


def check_end(stand: Stand, from_state: str) -> None:
    """Of a turn that was ended in `from_state`: what it said stays, what it asked for is cancelled."""
    assert stand.turn_id is not None
    assert [one["status"] for one in stand.calls()] == CALLS_AFTER.get(from_state, [])
    replies = stand.api.replies(stand.context_id, stand.turn_id)
    said = next(message for message in replies if message["status"] != "interrupted")
    text = stand.api.text(stand.context_id, said["id"])
    assert text.startswith(SAID) if from_state not in SILENT else text == ""
    closed = from_state in CALLS_AFTER
    turn = stand.api.turn(stand.context_id, stand.turn_id)
    assert said["status"] == ("completed" if closed else turn["status"])


def comes_to_an_end(stand: Stand) -> None:
    """Let go, the turn ends as completed; no call has run twice, and each has its one result."""
    assert stand.turn_id is not None
    stand.go_on()
    waiting = ("awaiting_tool_approval", "awaiting_tool_results")
    state = stand.api.in_state(stand.context_id, "idle", *waiting)["state"]
    if state == "awaiting_tool_approval":
        stand.api.decide_all(stand.context_id, "approve")
        state = stand.api.in_state(stand.context_id, "awaiting_tool_results")["state"]
    if state == "awaiting_tool_results":
        for one in stand.calls():
            if one["status"] == "approved":
                stand.api.answer(stand.context_id, one["id"])
    assert stand.api.ended(stand.context_id, stand.turn_id)["status"] == "completed"
    check(stand, "idle")
    results = [m for m in stand.api.messages(stand.context_id) if m["kind"] == "tool_result"]
    assert sorted(one["result_message_id"] for one in stand.calls()) == sorted(
        message["id"] for message in results
    )
    assert stand.place.lines() in ([], ["began"])


# The rows


@pytest.mark.parametrize("row", sorted(TRANSITIONS), ids="-".join)
def test_every_row_is_walked(stages: Stages, row: Row) -> None:
    """The journal's newest entry is the row, and the context is what its new state says."""
    assert row in WAYS, "nobody has shown a way over this row"
    stand = WAYS[row](stages)
    assert stand.last_step() == row
    whose = None if "producing" in row else stand.turn_id
    assert stand.journal()[-1]["turn_id"] == whose
    check(stand, row[2])
    if row[0] in ("cancel", "fail") and stand.turn_id is not None:
        check_end(stand, row[1])
    if row[0] == "recover":
        comes_to_an_end(stand)
    elif row[2] in TURN_STATES:
        stand.api.cancel(stand.context_id)
        check(stand, "idle")
    check_journal(stand.journal())


def test_no_way_is_of_no_row() -> None:
    """The table of the test is the table of the page, state by state."""
    assert set(WAYS) == TRANSITIONS
    assert {state for _, *states in WAYS for state in states} == STATES
