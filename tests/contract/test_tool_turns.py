"""Turns with tools through restarts, rival processes and cancels, over SQLite and PostgreSQL (§8)."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contextd.app import Contextd
from contextd.core.branch import BranchRequest
from contextd.core.context import ContextRequest, ExternalTool
from contextd.core.errors import ToolCallDecided
from contextd.core.tool_call import ToolCall, ToolDecision, ToolResultRequest
from contextd.core.turn import RetryRequest
from contextd.provider import Event, FatalError, ToolCallDelta

from .conftest import HeldProvider, Start
from .test_turns import DEADLINE_S, conversation, idle, journal, send, streaming, until

USER_TOOLS = Path(__file__).parent.parent / "http"
ASK = ExternalTool(
    name="ask",
    description="Asks somebody.",
    parameters={"type": "object", "properties": {"question": {"type": "string"}}},
    external=True,
)
TOOLS = [ASK, "echo", "note", "guarded", "hold", "hold_again", "meet"]


@pytest.fixture
def begin(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts contextd with the tools of `user_tools`; what those did is seen in files."""
    monkeypatch.syspath_prepend(USER_TOOLS)
    return partial(start, tools="user_tools")


class Notes:
    """A file in which a tool notes its runs, and the gate that it waits for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self._gate = folder / f"{name}-gate"

    def arguments(self) -> dict[str, str]:
        return {"path": str(self.path), "until": str(self._gate)}

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    async def has(self, *lines: str) -> None:
        await comes(lambda: self.lines() == list(lines))

    def open(self) -> None:
        self._gate.touch()


async def comes(true: Callable[[], bool]) -> None:
    """Waits until it is so; the deadline only bounds a failing test."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.005)


def asks(*calls: tuple[str, dict[str, Any]]) -> list[Event | None]:
    """A reply that calls tools."""
    deltas: list[Event | None] = [
        ToolCallDelta(id=f"call-{number}", name=name, content=json.dumps(arguments))
        for number, (name, arguments) in enumerate(calls, 1)
    ]
    return [*deltas, None]


async def go(
    contextd: Contextd, provider: HeldProvider, *calls: tuple[str, Any], **more: Any
) -> str:
    """A turn in a new context whose first reply makes these calls."""
    await contextd.service.contexts.create(ContextRequest(id="a", tools=TOOLS, **more))
    answer = await send(contextd, "Hello")
    provider.say(*asks(*calls))
    return str(answer.turn_id)


async def in_state(contextd: Contextd, state: str) -> None:
    await until(contextd, lambda context: context.state == state)


async def calls_of(contextd: Contextd) -> list[ToolCall]:
    page = await contextd.service.calls.list("a", statuses=(), cursor=None, limit=100)
    return page.items


async def statuses(contextd: Contextd) -> list[tuple[str, str, str | None]]:
    return [(one.name, one.status, one.error) for one in await calls_of(contextd)]


async def decide(contextd: Contextd, call: ToolCall, decision: Any, **more: Any) -> str:
    made = ToolDecision(tool_call_id=call.id, decision=decision, **more)
    return await contextd.service.calls.decide("a", [made])


async def answer(contextd: Contextd, call: ToolCall, content: str = "42") -> str:
    request = ToolResultRequest(content=content)
    return await contextd.service.calls.post_result("a", call.id, request)


async def told(contextd: Contextd) -> list[str]:
    """The results in the conversation, of which each call has exactly one."""
    calls = await calls_of(contextd)
    results = [message for message in await conversation(contextd) if message.role == "tool"]
    assert sorted(message.id for message in results) == sorted(
        str(one.result_message_id) for one in calls
    )
    by_id = {message.id: message for message in results}
    return [by_id[str(one.result_message_id)].content for one in calls]


async def completed(contextd: Contextd, turn_id: str) -> None:
    """The turn came to its one end."""
    await until(contextd, idle)
    turn = await contextd.service.records.turn("a", turn_id)
    assert (turn.status, turn.error) == ("completed", None)
    assert (await journal(contextd)).count("finish") == 1


async def test_own_and_external_tools_in_one_request(
    begin: Start, provider: HeldProvider, tmp_path: Path
) -> None:
    """The server's run side by side, the external one is waited for; the model sees all, in order."""
    meet = {"folder": str(tmp_path)}
    async with begin() as contextd:
        turn_id = await go(
            contextd, provider,
            ("meet", {**meet, "name": "one", "others": ["two"]}),
            ("ask", {"question": "why"}),
            ("meet", {**meet, "name": "two", "others": ["one"]}),
        )  # fmt: skip
        await in_state(contextd, "awaiting_tool_results")
        assert await statuses(contextd) == [
            ("meet", "succeeded", None), ("ask", "approved", None), ("meet", "succeeded", None),
        ]  # fmt: skip
        asked = (await calls_of(contextd))[1]
        assert await answer(contextd, asked, "because") == "processing_tool_results"
        provider.say("done", None)
        await completed(contextd, turn_id)
        assert await told(contextd) == ["met", "because", "met"]
        shown = provider.requests[-1].history[-4:]
        assert [call.id for call in shown[0].calls] == [message.call_id for message in shown[1:]]
        assert [message.content for message in shown[1:]] == ["met", "because", "met"]
        assert await journal(contextd) == [
            "receive_message", "request_llm", "first_chunk", "end_stream", "execute_tools",
            "await_results", "collect_results", "request_llm", "first_chunk", "end_stream", "finish",
        ]  # fmt: skip


async def test_an_approval_by_another_process_after_a_restart(begin: Start, tmp_path: Path) -> None:
    """Who decided last goes on with the turn; the tool runs once, and there."""
    notes = Notes(tmp_path, "runs")
    first, one_model, two_model = HeldProvider(), HeldProvider(), HeldProvider()
    async with begin(first) as contextd:
        guarded = ("guarded", {"path": str(notes.path)})
        turn_id = await go(contextd, first, guarded, ("ask", {}))
        await in_state(contextd, "awaiting_tool_approval")
    async with begin(one_model) as one, begin(two_model) as two:
        assert "recover" not in await journal(one)
        (waiting, asked) = await calls_of(two)
        assert await decide(two, waiting, "approve") == "executing_tools"
        await in_state(one, "awaiting_tool_results")
        assert notes.lines() == ["ran"]
        assert await answer(one, asked) == "processing_tool_results"
        one_model.say("done", None)
        await completed(two, turn_id)
        assert (len(one_model.requests), len(two_model.requests)) == (1, 0)
        assert await told(two) == ["noted ran", "42"]
    assert notes.lines() == ["ran"]


async def test_all_denied(begin: Start, provider: HeldProvider, tmp_path: Path) -> None:
    """Nothing runs; the model is told why, and goes on."""
    notes = Notes(tmp_path, "runs")
    async with begin() as contextd:
        guarded = ("guarded", {"path": str(notes.path)})
        turn_id = await go(contextd, provider, guarded, guarded)
        await in_state(contextd, "awaiting_tool_approval")
        first, second = await calls_of(contextd)
        assert await decide(contextd, first, "deny") == "awaiting_tool_approval"
        assert await decide(contextd, second, "deny", reason="no!") == "processing_tool_results"
        provider.say("well", None)
        await completed(contextd, turn_id)
        assert await statuses(contextd) == [("guarded", "denied", "denied")] * 2
        assert "no!" in (await told(contextd))[1]
        steps = await journal(contextd)
        assert steps[4:6] == ["require_approval", "collect_results"]
    assert notes.lines() == []


async def test_edited_arguments(begin: Start, provider: HeldProvider, tmp_path: Path) -> None:
    """What a person made of the arguments is what runs, also after a restart."""
    notes = Notes(tmp_path, "runs")
    async with begin() as contextd:
        guarded = ("guarded", {"path": str(notes.path), "line": "as asked"})
        turn_id = await go(contextd, provider, guarded, guarded)
        await in_state(contextd, "awaiting_tool_approval")
        first, second = await calls_of(contextd)
        edited = {"path": str(notes.path), "line": "edited"}
        await decide(contextd, first, "approve", arguments=edited)
    async with begin() as contextd:
        await decide(contextd, second, "deny")
        provider.say("done", None)
        await completed(contextd, turn_id)
        assert [one.arguments for one in await calls_of(contextd)] == [edited, guarded[1]]
        assert (await told(contextd))[0] == "noted edited"
    assert notes.lines() == ["edited"]


async def test_plan_mode(begin: Start, provider: HeldProvider, tmp_path: Path) -> None:
    """Offers and runs what is read-only; the rest is refused to the model, which goes on."""
    notes = Notes(tmp_path, "runs")
    async with begin() as contextd:
        calls = [("note", {"path": str(notes.path)}), ("echo", {"text": "x"}), ("ask", {})]
        turn_id = await go(contextd, provider, *calls, mode="plan")
        provider.say("planned", None)
        await completed(contextd, turn_id)
        assert [offer.name for offer in provider.requests[0].tools] == ["echo", "hold_again"]
        assert await statuses(contextd) == [
            ("note", "failed", "plan_mode"), ("echo", "succeeded", None),
            ("ask", "failed", "plan_mode"),
        ]  # fmt: skip
        assert len(await told(contextd)) == 3
    assert notes.lines() == []


@pytest.mark.parametrize("decisions", [("approve", "deny"), ("deny", "approve")])
async def test_two_deciders_at_once(begin: Start, tmp_path: Path, decisions: Sequence[str]) -> None:
    """Of two processes one wins each call; the other hears of it, and nothing runs twice."""
    notes = Notes(tmp_path, "runs")
    models = HeldProvider(), HeldProvider()
    async with begin(models[0]) as one, begin(models[1]) as two:
        guarded = [("guarded", {"path": str(notes.path), "line": str(n)}) for n in range(6)]
        turn_id = await go(one, models[0], *guarded)
        await in_state(one, "awaiting_tool_approval")
        calls = await calls_of(one)
        answers = await asyncio.gather(
            *(
                decide(process, call, decision)
                for call in calls
                for process, decision in zip((one, two), decisions, strict=True)
            ),
            return_exceptions=True,
        )
        for model in models:
            model.say("done", None)
        await completed(two, turn_id)
        winners = []
        for first, second in zip(answers[::2], answers[1::2], strict=True):
            lost = [isinstance(each, ToolCallDecided) for each in (first, second)]
            assert sorted(lost) == [False, True], (first, second)
            winners.append(decisions[lost.index(False)])
        ended = {"approve": "succeeded", "deny": "denied"}
        assert [one.status for one in await calls_of(two)] == [ended[each] for each in winners]
        assert len(await told(two)) == 6
        assert sum(len(model.requests) for model in models) == 2
    ran = [str(n) for n, winner in enumerate(winners) if winner == "approve"]
    assert sorted(notes.lines()) == ran


async def test_another_process_takes_over_while_tools_run(begin: Start, tmp_path: Path) -> None:
    """Only what is idempotent runs again; what the first process finds out later is nobody's."""
    once, again = Notes(tmp_path, "once"), Notes(tmp_path, "again")
    mine, other = HeldProvider(), HeldProvider()
    hung = {"lease_s": 3600, "poll_s": 3600}  # it neither renews its lease nor looks
    async with begin(mine, **hung) as one, begin(other, lease_s=3600) as two:
        turn_id = await go(
            one, mine, ("hold", once.arguments()), ("hold_again", again.arguments()), ("ask", {})
        )
        await once.has("began")
        await again.has("began")
        await one.service.recovery.leases.give_back()  # as if that had been for as long as a lease
        await again.has("began", "began")
        asked = (await calls_of(two))[2]
        assert await answer(one, asked) == "executing_tools"
        once.open()
        again.open()
        other.say("done", None)
        await completed(two, turn_id)
        assert await statuses(one) == [
            ("hold", "failed", "outcome_unknown"), ("hold_again", "succeeded", None),
            ("ask", "succeeded", None),
        ]  # fmt: skip
        await comes(lambda: one.turns.running == 0)
        results = await told(one)
        assert results[0].startswith("outcome_unknown")
        assert results[1:] == ["released", "42"]
        assert (await journal(one)).count("recover") == 1
        assert len(mine.requests) == len(other.requests) == 1
    assert once.lines().count("began") == 1
    assert again.lines().count("began") == 2


async def test_results_by_way_of_another_process(begin: Start) -> None:
    """Each to both at once: every call has one result, and the turn goes on once, in either."""
    models = HeldProvider(), HeldProvider()
    async with begin(models[0]) as one, begin(models[1]) as two:
        turn_id = await go(one, models[0], *[("ask", {"question": str(n)}) for n in range(4)])
        await in_state(two, "awaiting_tool_results")
        calls = await calls_of(two)
        await asyncio.gather(
            *(answer(process, call, call.id) for call in calls for process in (one, two))
        )
        for model in models:
            model.say("done", None)
        await completed(one, turn_id)
        assert await told(two) == [call.id for call in calls]
        assert (await journal(two)).count("collect_results") == 1
        assert sum(len(model.requests) for model in models) == 2


async def test_a_cancel_by_another_process_while_a_tool_runs(begin: Start, tmp_path: Path) -> None:
    """Its calls are cancelled at once; the process that runs the tool stops it."""
    notes = Notes(tmp_path, "runs")
    mine = HeldProvider()
    async with begin(mine, lease_s=3) as one, begin(HeldProvider()) as two:
        turn_id = await go(one, mine, ("hold", notes.arguments()), ("ask", {}))
        await notes.has("began")
        cancelled = await two.service.steps.cancel("a", None)
        assert (cancelled.state, cancelled.cancelled_turn_id) == ("idle", turn_id)
        await notes.has("began", "stopped")
        await comes(lambda: one.turns.running == 0)
        assert [one.status for one in await calls_of(two)] == ["cancelled", "cancelled"]
        with pytest.raises(ToolCallDecided):
            await answer(one, (await calls_of(one))[1])
        assert (await journal(one))[-1] == "cancel"
        *_, text, said, end = await conversation(one)
        assert [m.role for m in (text, said, end)] == ["assistant"] * 3
        assert (end.status, end.final_sequence) == ("cancelled", 0)


async def test_a_cancel_by_another_process_while_somebody_is_waited_for(begin: Start) -> None:
    """No process owns the turn then: whoever is asked ends it, and a decision comes too late."""
    mine = HeldProvider()
    async with begin(mine) as one, begin(HeldProvider()) as two:
        turn_id = await go(one, mine, ("ask", {}))
        await in_state(one, "awaiting_tool_results")
        (asked,) = await calls_of(one)
        assert (await two.service.steps.cancel("a", None)).cancelled_turn_id == turn_id
        with pytest.raises(ToolCallDecided):
            await answer(one, asked)
        assert await statuses(one) == [("ask", "cancelled", "cancelled")]


async def test_two_processes_recover_at_once(begin: Start, tmp_path: Path) -> None:
    """One of them claims the turn; what is idempotent runs once more, and not twice more."""
    notes = Notes(tmp_path, "runs")
    models = [HeldProvider() for _ in range(3)]
    async with begin(models[0]) as contextd:
        turn_id = await go(contextd, models[0], ("hold_again", notes.arguments()))
        await notes.has("began")
    async with (
        begin(models[0], lease_s=3600, poll_s=3600) as owner,
        begin(models[1], lease_s=3600) as one,
        begin(models[2], lease_s=3600) as two,
    ):
        await notes.has("began", "stopped", "began")
        await owner.service.recovery.leases.give_back()
        await asyncio.gather(one.turns.look(), two.turns.look())
        await comes(lambda: one.turns.running + two.turns.running == 1)
        await notes.has("began", "stopped", "began", "began")
        notes.open()
        for model in models:
            model.say("done", None)
        await completed(two, turn_id)
        assert (await journal(one)).count("recover") == 2
        assert await told(one) == ["released"]
        assert sum(len(model.requests) for model in models) == 2


@pytest.mark.parametrize("first", ["cancel", "decide"])
async def test_a_cancel_and_a_decision_at_once(begin: Start, tmp_path: Path, first: str) -> None:
    """By two processes: the decision comes before the cancel, or is refused; the turn has one end."""
    notes = Notes(tmp_path, "runs")
    models = HeldProvider(), HeldProvider()
    async with begin(models[0]) as one, begin(models[1]) as two:
        turn_id = await go(one, models[0], ("guarded", {"path": str(notes.path)}))
        await in_state(two, "awaiting_tool_approval")
        (call,) = await calls_of(one)
        works = [one.service.steps.cancel("a", None), decide(two, call, "approve")]
        if first == "decide":
            works.reverse()
        answers = await asyncio.gather(*works, return_exceptions=True)
        cancelled, decided = answers if first == "cancel" else reversed(answers)
        assert (cancelled.state, cancelled.cancelled_turn_id) == ("idle", turn_id)
        await comes(lambda: one.turns.running + two.turns.running == 0)
        (call,) = await calls_of(one)
        if isinstance(decided, ToolCallDecided):
            assert call.status == "cancelled"
            assert notes.lines() == []
        else:
            assert decided == "executing_tools"
            assert call.status in ("cancelled", "succeeded")
        turn = await one.service.records.turn("a", turn_id)
        assert turn.status == "cancelled"
        steps = await journal(two)
        assert [steps.count(end) for end in ("cancel", "finish", "fail")] == [1, 0, 0]


async def test_a_retry_goes_on_after_the_rounds(
    begin: Start, provider: HeldProvider, tmp_path: Path
) -> None:
    """Queued, over a restart, and once more: tools that succeeded are not run again (§6)."""
    notes = Notes(tmp_path, "runs")
    async with begin() as contextd:
        turn_id = await go(contextd, provider, ("note", {"path": str(notes.path), "line": "1"}))
        provider.say(*asks(("note", {"path": str(notes.path), "line": "2"})))
        provider.say("half", FatalError("rejected", "no"))
        await in_state(contextd, "failed")
        await contextd.service.branches.create("a", BranchRequest(name="x", from_message_id=None))
        await send(contextd, "meanwhile", branch="x")
        provider.say("some")
        await until(contextd, streaming)
        queued = await contextd.service.retries.retry_turn("a", turn_id)
        assert queued.state == "streaming_llm_response"
    async with begin() as contextd:
        provider.say("all", None, "again", FatalError("rejected", "no"))
        await in_state(contextd, "failed")
        turn = await contextd.service.records.turn("a", queued.turn_id)
        assert (turn.status, turn.retry_of, turn.branch) == ("failed", turn_id, "main")
        shown = [(message.role, message.content) for message in provider.requests[-1].history]
        rounds = [("assistant", ""), ("tool", "noted")] * 2
        assert shown == [("user", "Hello"), *rounds]
        await contextd.service.retries.retry("a", RetryRequest(from_start=True))
        provider.say("done", None)
        await until(contextd, idle)
        assert [message.content for message in provider.requests[-1].history] == ["Hello"]
    assert notes.lines() == ["1", "2"]
