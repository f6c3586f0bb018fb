"""The state machine keeps to its table (§5)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.core import machine
from contextd.core.errors import IllegalTransition
from contextd.core.machine import REST_STATES, TRANSITIONS, TURN_STATES, State, Trigger

# Written out by hand from the contract, so that a slip in the program's table is seen.
TURN = [state for state in State if state.value not in ("idle", "failed", "producing")]
CONTRACT = {
    ("receive_message", "idle"): "processing_user_message",
    ("receive_message", "failed"): "processing_user_message",
    ("request_llm", "processing_user_message"): "awaiting_llm_response",
    ("request_llm", "processing_tool_results"): "awaiting_llm_response",
    ("request_llm", "transient_failure"): "awaiting_llm_response",
    ("first_chunk", "awaiting_llm_response"): "streaming_llm_response",
    ("end_stream", "awaiting_llm_response"): "processing_llm_response",
    ("end_stream", "streaming_llm_response"): "processing_llm_response",
    ("require_approval", "processing_llm_response"): "awaiting_tool_approval",
    ("execute_tools", "processing_llm_response"): "executing_tools",
    ("execute_tools", "awaiting_tool_approval"): "executing_tools",
    ("await_results", "executing_tools"): "awaiting_tool_results",
    ("collect_results", "processing_llm_response"): "processing_tool_results",
    ("collect_results", "awaiting_tool_approval"): "processing_tool_results",
    ("collect_results", "executing_tools"): "processing_tool_results",
    ("collect_results", "awaiting_tool_results"): "processing_tool_results",
    ("finish", "processing_llm_response"): "idle",
    ("finish", "processing_tool_results"): "idle",
    ("fail_transiently", "awaiting_llm_response"): "transient_failure",
    ("fail_transiently", "streaming_llm_response"): "transient_failure",
    ("retry", "failed"): "awaiting_llm_response",
    ("cancel", "producing"): "idle",
    ("open_message", "idle"): "producing",
    ("open_message", "failed"): "producing",
    ("open_message", "producing"): "producing",
    ("close_message", "producing"): "idle",
    ("recover", "awaiting_llm_response"): "transient_failure",
    ("recover", "streaming_llm_response"): "transient_failure",
    ("recover", "processing_user_message"): "processing_user_message",
    ("recover", "processing_llm_response"): "processing_llm_response",
    ("recover", "processing_tool_results"): "processing_tool_results",
    ("recover", "executing_tools"): "executing_tools",
    ("recover", "transient_failure"): "transient_failure",
    **{("fail", state.value): "failed" for state in TURN},
    **{("cancel", state.value): "idle" for state in TURN},
}


def test_turn_states_are_all_but_idle_failed_and_producing() -> None:
    """The contract names three states that are no turn's."""
    assert frozenset(TURN) == TURN_STATES
    assert {State.IDLE, State.FAILED} == REST_STATES


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("trigger", list(Trigger))
def test_each_trigger_leads_where_the_contract_says_or_is_refused(
    trigger: Trigger, state: State
) -> None:
    """All pairs: a row of the table is taken, any other is illegal and names what is allowed."""
    expected = CONTRACT.get((trigger.value, state.value))
    if expected is not None:
        assert machine.advance(state, trigger) == State(expected)
        return
    with pytest.raises(IllegalTransition) as refused:
        machine.advance(state, trigger)
    allowed = {name for name, source in CONTRACT if source == state.value}
    assert set(refused.value.facts["allowed"]) == allowed
    assert refused.value.facts["state"] == state.value
    assert refused.value.facts["trigger"] == trigger.value


@given(st.lists(st.sampled_from(list(Trigger)), max_size=60))
def test_any_sequence_of_triggers_keeps_to_the_table(triggers: list[Trigger]) -> None:
    """From idle, whatever is triggered: each step is a row of the table, or changes nothing."""
    state = State.IDLE
    for trigger in triggers:
        expected = CONTRACT.get((trigger.value, state.value))
        try:
            state_after = machine.advance(state, trigger)
        except IllegalTransition:
            assert expected is None
        else:
            assert state_after.value == expected
            state = state_after


def test_every_state_but_producing_can_get_back_to_rest() -> None:
    """No state is a trap: the table leads from each one to idle or failed."""
    for start in State:
        reached = {start}
        while True:
            more = {row.to_state for row in TRANSITIONS if row.from_state in reached} - reached
            if not more:
                break
            reached |= more
        assert reached & REST_STATES, start


def test_the_description_and_the_diagram_are_of_the_same_table() -> None:
    """`GET /machine` and docs/machine.md are made from what runs."""
    described = machine.describe()
    assert described.states == [state.value for state in State]
    assert described.triggers == [trigger.value for trigger in Trigger]
    rows = {(row.trigger.value, row.from_state.value) for row in described.transitions}
    assert rows == set(CONTRACT)
    diagram = machine.mermaid()
    for (trigger, source), target in CONTRACT.items():
        assert any(
            line.strip().startswith(f"{source} --> {target}:") and trigger in line
            for line in diagram.splitlines()
        ), (trigger, source)
