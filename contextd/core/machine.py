"""Everything that decides which state may follow which (§5).

The table below is the only one: the running machine, `GET /machine`, docs/machine.md and the tests
are all made from it. `transitions` is used as a pure function: one shared machine, no registered
models, nothing persisted here. An illegal trigger raises and changes nothing.
"""

import logging
from enum import StrEnum

import msgspec
from transitions import Machine, MachineError

from contextd.core.errors import IllegalTransition


class State(StrEnum):
    """What a context is doing."""

    IDLE = "idle"
    PROCESSING_USER_MESSAGE = "processing_user_message"
    AWAITING_LLM_RESPONSE = "awaiting_llm_response"
    STREAMING_LLM_RESPONSE = "streaming_llm_response"
    PROCESSING_LLM_RESPONSE = "processing_llm_response"
    AWAITING_TOOL_APPROVAL = "awaiting_tool_approval"
    EXECUTING_TOOLS = "executing_tools"
    AWAITING_TOOL_RESULTS = "awaiting_tool_results"
    PROCESSING_TOOL_RESULTS = "processing_tool_results"
    TRANSIENT_FAILURE = "transient_failure"
    FAILED = "failed"
    PRODUCING = "producing"


class Trigger(StrEnum):
    """What makes a context go from one state to another."""

    RECEIVE_MESSAGE = "receive_message"
    REQUEST_LLM = "request_llm"
    FIRST_CHUNK = "first_chunk"
    END_STREAM = "end_stream"
    REQUIRE_APPROVAL = "require_approval"
    EXECUTE_TOOLS = "execute_tools"
    AWAIT_RESULTS = "await_results"
    COLLECT_RESULTS = "collect_results"
    FINISH = "finish"
    FAIL_TRANSIENTLY = "fail_transiently"
    FAIL = "fail"
    RETRY = "retry"
    CANCEL = "cancel"
    OPEN_MESSAGE = "open_message"
    CLOSE_MESSAGE = "close_message"
    RECOVER = "recover"


REST_STATES = frozenset({State.IDLE, State.FAILED})
# Of a turn that waits for people or external tools; then nobody works on it (§6).
WAITING_STATES = frozenset({State.AWAITING_TOOL_APPROVAL, State.AWAITING_TOOL_RESULTS})
# Of a turn whose model has been asked; whoever takes it over has to ask again (§6).
RESPONDING_STATES = frozenset({State.AWAITING_LLM_RESPONSE, State.STREAMING_LLM_RESPONSE})
TURN_STATES = frozenset(State) - REST_STATES - {State.PRODUCING}


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    trigger: Trigger
    from_state: State
    to_state: State


def _table() -> tuple[Transition, ...]:
    s, t = State, Trigger
    turn_states = tuple(state for state in State if state in TURN_STATES)
    staying = (
        s.PROCESSING_USER_MESSAGE,
        s.PROCESSING_LLM_RESPONSE,
        s.PROCESSING_TOOL_RESULTS,
        s.EXECUTING_TOOLS,
        s.TRANSIENT_FAILURE,
    )
    responding = (s.AWAITING_LLM_RESPONSE, s.STREAMING_LLM_RESPONSE)
    rows: list[tuple[Trigger, tuple[State, ...], State | None]] = [
        (t.RECEIVE_MESSAGE, (s.IDLE, s.FAILED), s.PROCESSING_USER_MESSAGE),
        (
            t.REQUEST_LLM,
            (s.PROCESSING_USER_MESSAGE, s.PROCESSING_TOOL_RESULTS, s.TRANSIENT_FAILURE),
            s.AWAITING_LLM_RESPONSE,
        ),
        (t.FIRST_CHUNK, (s.AWAITING_LLM_RESPONSE,), s.STREAMING_LLM_RESPONSE),
        (t.END_STREAM, responding, s.PROCESSING_LLM_RESPONSE),
        (t.REQUIRE_APPROVAL, (s.PROCESSING_LLM_RESPONSE,), s.AWAITING_TOOL_APPROVAL),
        (
            t.EXECUTE_TOOLS,
            (s.PROCESSING_LLM_RESPONSE, s.AWAITING_TOOL_APPROVAL),
            s.EXECUTING_TOOLS,
        ),
        (t.AWAIT_RESULTS, (s.EXECUTING_TOOLS,), s.AWAITING_TOOL_RESULTS),
        (
            t.COLLECT_RESULTS,
            (
                s.PROCESSING_LLM_RESPONSE,
                s.AWAITING_TOOL_APPROVAL,
                s.EXECUTING_TOOLS,
                s.AWAITING_TOOL_RESULTS,
            ),
            s.PROCESSING_TOOL_RESULTS,
        ),
        (t.FINISH, (s.PROCESSING_LLM_RESPONSE, s.PROCESSING_TOOL_RESULTS), s.IDLE),
        (t.FAIL_TRANSIENTLY, responding, s.TRANSIENT_FAILURE),
        (t.FAIL, turn_states, s.FAILED),
        (t.RETRY, (s.FAILED,), s.AWAITING_LLM_RESPONSE),
        (t.CANCEL, (*turn_states, s.PRODUCING), s.IDLE),
        (t.OPEN_MESSAGE, (s.IDLE, s.FAILED, s.PRODUCING), s.PRODUCING),
        (t.CLOSE_MESSAGE, (s.PRODUCING,), s.IDLE),
        (t.RECOVER, responding, s.TRANSIENT_FAILURE),
        (t.RECOVER, staying, None),
    ]
    return tuple(
        Transition(trigger=trigger, from_state=source, to_state=target or source)
        for trigger, sources, target in rows
        for source in sources
    )


TRANSITIONS: tuple[Transition, ...] = _table()


class MachineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """The machine as `GET /machine` answers it (§5)."""

    states: list[str]
    triggers: list[str]
    transitions: list[Transition]


class _Position:
    """What `transitions` moves: only a place for the state, thrown away after each step."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state: str = state.value


# The library logs each step at INFO; contextd's own log says what it needs to.
logging.getLogger("transitions").setLevel(logging.WARNING)


def _build() -> Machine:
    machine = Machine(
        model=None,
        states=[state.value for state in State],
        initial=State.IDLE.value,
        auto_transitions=False,
        queued=False,
    )
    for row in TRANSITIONS:
        machine.add_transition(row.trigger.value, row.from_state.value, row.to_state.value)
    return machine


_machine = _build()


def allowed(state: State) -> list[Trigger]:
    """The triggers that the table has for `state`, in the table's order."""
    return [Trigger(name) for name in _machine.get_triggers(state.value)]


def advance(state: State, trigger: Trigger) -> State:
    """The state that `trigger` leads to from `state`.

    Raises `IllegalTransition` when the table has no such row; the caller's state is untouched.
    """
    position = _Position(state)
    try:
        _machine.events[trigger.value].trigger(position)
    except MachineError:
        names = [name.value for name in allowed(state)]
        raise IllegalTransition(state=state.value, trigger=trigger.value, allowed=names) from None
    return State(position.state)


def describe() -> MachineDescription:
    """The table as data."""
    return MachineDescription(
        states=[state.value for state in State],
        triggers=[trigger.value for trigger in Trigger],
        transitions=list(TRANSITIONS),
    )


def mermaid() -> str:
    """The table as a Mermaid state diagram, drawn by the library from the machine that runs."""
    from transitions.extensions import GraphMachine  # noqa: PLC0415 - only needed for drawing

    graph = GraphMachine(
        states=[state.value for state in State],
        initial=State.IDLE.value,
        auto_transitions=False,
        graph_engine="mermaid",
        title="title: The states of a context",
    )
    for row in TRANSITIONS:
        graph.add_transition(row.trigger.value, row.from_state.value, row.to_state.value)
    return str(graph.get_graph().source)
